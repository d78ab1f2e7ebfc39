"""Tars that are there already made into a data set where they lie: an index beside them, not a byte of them changed."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.checksum import ChecksumName, best_checksum
from data_pipeline.dataset.index import FIELD_COLUMNS, INDEX_FOLDER, IndexWriter, Row
from data_pipeline.dataset.manifest import MANIFEST_FILE, SHARD_FOLDER, load_manifest, read_manifest, write_manifest
from data_pipeline.dataset.new_manifest import new_manifest
from data_pipeline.dataset.spans import SpanReader
from data_pipeline.dataset.tar_clips import Unusable
from data_pipeline.dataset.tar_listing import COPY_AGAIN, IndexSettings, ListedTars, list_tars
from data_pipeline.dataset.tar_pass import IndexedTar, ListedClip, TarPass
from data_pipeline.dataset.threads import Progress, check_workers, in_order, ticks
from data_pipeline.errors import DataError, Problem
from data_pipeline.schema import FIELDS, Manifest, ShardEntry, row_shape
from data_pipeline.shard.statistics import Summary, merged
from data_pipeline.shard.walk import BadTar
from data_pipeline.sources.stored import reason


def index_tars(
    folder: Path,
    settings: IndexSettings | None = None,
    *,
    workers: int = 1,
    replace: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Make a data set of the .tar files in a folder, by writing an index and a manifest beside them.

    All headers are looked at first, so that what is wrong is said before a value is read. Shards are the tars in
    the order of their names.

    Args:
        folder: Of the tars.
        settings: How they are understood.
        workers: Threads that read tars.
        replace: Index anew what was indexed before.
        progress: Called with (clips done, clips in all).

    Returns:
        The manifest.

    Raises:
        DataError: Names each tar, sample and member that cannot be indexed as it is (up to 20), and what to do.
    """
    settings = settings or IndexSettings()
    check_workers(workers)
    with _alone(folder):
        _check_folder(folder, replace)
        listed = list_tars(folder, settings)
        manifest, index, summary = read_tars(folder, listed, workers, progress)
        with _writing(folder):
            (folder / MANIFEST_FILE).unlink(missing_ok=True)
            _remove_columns(folder)
            files = index.write(folder) | summary.write(folder, listed.partitions)
            write_manifest(folder, changed(manifest, files=files))
    return load_manifest(folder, field="tars")


def read_tars(
    folder: Path,
    listed: ListedTars,
    workers: int = 1,
    progress: Progress | None = None,
    checksum: ChecksumName | None = None,
) -> tuple[Manifest, IndexWriter, Summary]:
    """Read every tar from its first byte to its last.

    Args:
        folder: Of the tars.
        listed: What their headers say.
        workers: Threads.
        progress: Called with (clips done, clips in all).
        checksum: Of the fields; None takes the best of this machine.

    Returns:
        The manifest of a data set indexed in place, without the files beside the shards; its index; its statistics.

    Raises:
        DataError: A value is not finite, or a tar has changed since it was listed.
    """
    like, every = listed.like, listed.sample_every
    one = TarPass(folder, listed.layout, like, len(listed.partitions), every, checksum or best_checksum())
    rows: list[Row] = []
    shards: list[ShardEntry] = []

    def parts() -> Iterator[dict[str, np.ndarray]]:
        for done in _passes(one, listed, workers, progress):
            rows.extend(done.rows)
            shards.append(done.entry)
            yield done.statistics

    summary = merged(parts())
    index = IndexWriter(tuple(sorted(like.specs)))
    for row in rows:
        index.add(row)
    dtypes: dict[str, Any] = {name: like.specs[name].dtype for name in sorted(like.specs)}
    manifest = new_manifest(
        rows,
        widths={name: row_shape(name, spec.shape) for name, spec in like.specs.items()},
        dtypes=dtypes,
        partitions=listed.partitions,
        provenance=listed.provenance,
        action_alignment=listed.action_alignment,
        checksum=one.checksum,
        container="tar",
        shard_folder=".",
        seed=0,
        sample_every=every,
        conversion=None,
        shards=shards,
        files={},
    )
    return manifest, index, summary


def _passes(one: TarPass, listed: ListedTars, workers: int, progress: Progress | None) -> Iterator[IndexedTar]:
    tick = ticks(progress, len(listed.clips))

    def run(tar: tuple[int, tuple[str, list[ListedClip]]], reader: SpanReader) -> IndexedTar:
        number, (name, clips) = tar
        try:
            return one.run(name, number, clips, reader, tick)
        except Unusable as error:
            raise DataError(Problem("tars", name, str(error), error.fix)) from error
        except (OSError, BadTar) as error:
            raise DataError(Problem("tars", name, reason(error), COPY_AGAIN)) from error

    return in_order(run, enumerate(listed.listed()), workers)


def _check_folder(folder: Path, replace: bool) -> None:
    if not (folder / MANIFEST_FILE).exists():
        return
    if not replace:
        rule = f"the folder has a {MANIFEST_FILE}: its tars are indexed already"
        raise DataError(Problem("tars", folder, rule, "set replace=true to index them anew"))
    try:
        own = read_manifest(folder, "tars").shard_folder == SHARD_FOLDER
    except DataError:
        # Damaged, as may be the reason why it is made anew; whose it was, its shards tell.
        own = (folder / SHARD_FOLDER).is_dir()
    if own:
        rule = f"the data set there has its shards in {SHARD_FOLDER}/"
        raise DataError(Problem("tars", folder, rule, f"name {folder / SHARD_FOLDER} to index these tars"))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    if not folder.is_dir():
        raise DataError(Problem("tars", folder, "the folder does not exist", "correct the path"))
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        rule = "another process is indexing it"
        raise DataError(Problem("tars", folder, rule, "wait for it, or end it")) from None
    finally:
        os.close(descriptor)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        for path in (*folder.glob("*.tmp"), *(folder / INDEX_FOLDER).glob("*.tmp")):
            if path.name.removesuffix(".tmp").endswith((".npy", ".npz", ".txt", ".json")):
                path.unlink(missing_ok=True)
        rule = f"the index cannot be written beside the tars ({error.strerror or error})"
        fix = "make room or the folder writable, and run this again; the tars are as they were"
        raise DataError(Problem("tars", error.filename or folder, rule, fix)) from error


def _remove_columns(folder: Path) -> None:
    """Remove columns of fields that an earlier index had."""
    for name in FIELDS:
        for part in FIELD_COLUMNS:
            (folder / INDEX_FOLDER / f"{name}_{part}.npy").unlink(missing_ok=True)
