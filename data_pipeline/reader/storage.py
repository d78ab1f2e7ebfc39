"""Opening a data set: where its manifest, its index and its shards are read from, here or behind a URL."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.dataset.index import Index
from data_pipeline.dataset.manifest import load_manifest
from data_pipeline.dataset.view import open_view, viewed_partitions
from data_pipeline.errors import DataError, Problem
from data_pipeline.reader.address import RemoteFolder, data_address
from data_pipeline.reader.fetching import FetchFailed, LocalFiles, open_source_file
from data_pipeline.reader.node_folder import NodeFolder
from data_pipeline.reader.remote import RemoteFiles, fetch_description
from data_pipeline.reader.shard_store import ShardStore, StorageStats
from data_pipeline.reader.staging import StagedShards
from data_pipeline.schema import DataConfig, Manifest, Split

__all__ = ["LocalShards", "OpenedDataset", "ShardStore", "StorageStats", "open_dataset"]

_SPLITS: tuple[Split, ...] = ("train", "heldout")
_COPY_AGAIN = "copy the data set again, or make it again with `hopescale data shard`"


class LocalShards:
    """Shards that are read where they lie."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Take the data set that `load_manifest` has checked."""
        self._folder = folder / manifest.shard_folder
        self._entries = manifest.shards

    def open(self, shard: int) -> int:
        """Return a descriptor of a shard.

        Raises:
            DataError: It is missing, not a regular file, or not as long as the manifest says.
        """
        entry = self._entries[shard]
        path = self._folder / entry.name
        try:
            descriptor = open_source_file(path)
        except FetchFailed as error:
            raise DataError(Problem(f"data.path: shard {entry.name}", path, str(error), _COPY_AGAIN)) from error
        size = os.fstat(descriptor).st_size
        if size != entry.bytes:
            os.close(descriptor)
            rule = f"it has {size} bytes, the manifest says {entry.bytes}"
            raise DataError(Problem(f"data.path: shard {entry.name}", path, rule, _COPY_AGAIN))
        return descriptor

    def expect(self, shards: Sequence[int]) -> None:
        """Do nothing: they are here."""

    def recheck(self, shard: int) -> None:
        """Do nothing: there is no other copy to take."""

    def where(self, shard: int) -> str:
        """Return the path of a shard."""
        return str(self._folder / self._entries[shard].name)

    def stats(self) -> StorageStats:
        """Return zeros: nothing is copied."""
        return StorageStats()

    def close(self) -> None:
        """Do nothing: nothing is held."""


@dataclass(frozen=True)
class OpenedDataset:
    """A data set that was found and checked.

    Attributes:
        folder: Local folder of the manifest, the index, the statistics and the mean frame.
        manifest: What it says of itself.
        store: Where its shards come from.
    """

    folder: Path
    manifest: Manifest
    store: ShardStore


def open_dataset(config: DataConfig) -> OpenedDataset:
    """Find the data set that the settings name, fetching all but its shards if it is remote.

    Raises:
        DataError: It is not there, damaged, not made for training, or does not fit the staging folder.
        MissingExtra: A package that its URL needs is not installed.
    """
    address = data_address(config)
    if isinstance(address, RemoteFolder):
        return _open_remote(config, address)
    manifest = load_manifest(address)
    _check_container(manifest, str(address))
    if config.staging.folder is None:
        return OpenedDataset(address, manifest, LocalShards(address, manifest))
    node = NodeFolder(Path(config.staging.folder), config.staging.max_bytes)
    store = StagedShards(manifest, LocalFiles(address / manifest.shard_folder), node)
    return _with_room(config, OpenedDataset(address, manifest, store))


def _open_remote(config: DataConfig, address: RemoteFolder) -> OpenedDataset:
    if config.staging.folder is None:
        rule = f"{address.shown()} is read through copies on the node"
        fix = "name a folder on the node's own disk or in its memory, e.g. /dev/shm/hopescale"
        raise DataError(Problem("data.staging.folder", None, rule, fix))
    source = RemoteFiles(address, config.allowed_schemes)
    node = NodeFolder(Path(config.staging.folder), config.staging.max_bytes)
    folder, manifest = fetch_description(source, node, threading.Event())
    _check_container(manifest, address.shown())
    store = StagedShards(manifest, source.below(manifest.shard_folder), node)
    return _with_room(config, OpenedDataset(folder, manifest, store))


def _check_container(manifest: Manifest, where: str) -> None:
    if manifest.container != "tar":
        rule = f"its container is {manifest.container}, which is for analysis"
        raise DataError(Problem("data.path", where, rule, "shard the clips to tars for training, with format=tar"))


def _with_room(config: DataConfig, opened: OpenedDataset) -> OpenedDataset:
    """Return the data set if what is needed at about the same time fits the staging folder."""
    try:
        _check_room(config, opened)
    except BaseException:
        opened.store.close()
        raise
    return opened


def _check_room(config: DataConfig, opened: OpenedDataset) -> None:
    limit = config.staging.max_bytes
    if limit is None:
        return
    sizes = sorted((opened.manifest.shards[shard].bytes for shard in _shards_in_use(config, opened)), reverse=True)
    if config.order == "full" and sum(sizes) > limit:
        rule = f"data.order=full reads from all shards at any time, and those of the view have {sum(sizes)} bytes"
        raise DataError(Problem("data.staging.max_bytes", limit, rule, "set data.order=windowed, or allow as many"))
    # Each part of a mixture goes through groups of its own.
    count = config.order_shards * max(1, len(config.mixture))
    group = sum(sizes[:count])
    if group > limit:
        rule = (
            f"the {count} shards that data.order_shards={config.order_shards} reads at a time have up to {group} bytes"
        )
        raise DataError(Problem("data.staging.max_bytes", limit, rule, "lower data.order_shards, or allow as many"))


def _shards_in_use(config: DataConfig, opened: OpenedDataset) -> set[int]:
    """Return the shards that hold clips of the view, of either split."""
    manifest, used = opened.manifest, set[int]()
    if not set(viewed_partitions(manifest, config)) <= set(manifest.partitions):
        # Said of the view, with the names that are meant, by whoever reads it.
        return used
    for split in _SPLITS:
        try:
            view = open_view(Index(opened.folder, manifest), manifest, config, split)
        except DataError:
            continue
        used |= set(np.unique(view.shards).tolist())
    return used
