"""Damaged parts of a data set made again, from the source of its clips or its own shards: the same bytes or none."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.cache import file_sha256, sync_path
from data_pipeline.dataset.index_tars import read_tars
from data_pipeline.dataset.manifest import SHARD_FOLDER
from data_pipeline.dataset.samples import samples
from data_pipeline.dataset.tar_clips import TarClip, Unusable
from data_pipeline.dataset.tar_listing import IndexSettings, ListedTars
from data_pipeline.errors import DataError
from data_pipeline.schema import Manifest
from data_pipeline.shard.lock import PartLock
from data_pipeline.shard.run import WHOLE, rebuild_shard
from data_pipeline.shard.walk import BadTar, open_regular
from data_pipeline.sources.base import SourceClip
from data_pipeline.sources.clip_source import as_split
from data_pipeline.sources.layout import FEATURES_DTYPES
from data_pipeline.sources.stored import reason

_WORKSHOP = ".repair-"
_NOT_TARS = "only tars are mended: remove the data set and make it again with `hopescale data shard`"
_FOREIGN = "its tars are somebody else's: copy the tar again, or index them anew with replace=true"


@dataclass
class Repaired:
    """What was made again.

    Attributes:
        names: Shards and files that are as the manifest says again.
        failed: Why others are not, by name.
    """

    names: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def repair(folder: Path, manifest: Manifest, damaged: Iterable[str], source: Path | str | None = None) -> Repaired:
    """Make damaged shards again from the source that the user names, and damaged files beside them from the shards.

    Nothing is replaced but by bytes with the sha256 of the manifest.

    Args:
        folder: Of the data set.
        manifest: Of the data set.
        damaged: Names of shards, and of files beside them.
        source: What the data set was made of; without, no shard is made again.
    """
    named = set(damaged)
    files = sorted(named.intersection(manifest.files))
    shards = {entry.name: entry for entry in manifest.shards}
    # Without an index nobody has looked at the shards yet, and it can only be made from sound ones.
    wanted = [name for name in shards if files or name in named]
    done = Repaired()
    if manifest.container != "tar":
        done.failed |= dict.fromkeys(sorted(named), _NOT_TARS)
        return done
    try:
        with PartLock(folder, WHOLE), _workshop(folder) as workshop:
            for name in wanted:
                _repair_shard(folder, manifest, name, shards[name].sha256, workshop, done, source, asked=name in named)
            if files:
                _repair_files(folder, manifest, files, workshop, done)
    except (DataError, OSError) as error:
        left = {*named.intersection(shards), *files}.difference(done.names, done.failed)
        done.failed |= dict.fromkeys(left, str(error))
    return done


@contextmanager
def _workshop(folder: Path) -> Iterator[Path]:
    """A folder on the same file system, from which files are renamed into place; killed repairs' are removed."""
    for left in folder.glob(f"{_WORKSHOP}*"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
    place = Path(tempfile.mkdtemp(prefix=_WORKSHOP, dir=folder))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _repair_shard(
    folder: Path,
    manifest: Manifest,
    name: str,
    sha256: str,
    workshop: Path,
    done: Repaired,
    source: Path | str | None,
    *,
    asked: bool,
) -> None:
    path = folder / manifest.shard_folder / name
    if _has_digest(path, sha256):
        if asked:
            done.failed[name] = "its bytes are as they were written: make the data set again"
        return
    if manifest.shard_folder != SHARD_FOLDER:
        done.failed[name] = _FOREIGN
        return
    try:
        rebuild_shard(folder, path.stem, workshop, source)
    except DataError as error:
        done.failed[name] = str(error)
        return
    _put(workshop / SHARD_FOLDER / name, path, sha256, name, "the source gives other bytes than it did", done)


def _repair_files(folder: Path, manifest: Manifest, names: list[str], workshop: Path, done: Repaired) -> None:
    try:
        listed = _listed(folder / manifest.shard_folder, manifest)
        again, index, summary = read_tars(folder / manifest.shard_folder, listed, checksum=manifest.checksum)
        if again.num_clips == manifest.num_clips:
            index.write(workshop)
            summary.write(workshop, listed.partitions)
    except (DataError, Unusable) as error:
        done.failed |= dict.fromkeys(names, f"the shards cannot be indexed: {error}")
        return
    except (OSError, BadTar) as error:
        done.failed |= dict.fromkeys(names, f"the shards cannot be read: {reason(error)}")
        return
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        _put(workshop / name, folder / name, manifest.files[name], name, "the shards give another file", done)


def _put(made: Path, path: Path, sha256: str, name: str, otherwise: str, done: Repaired) -> None:
    if not _has_digest(made, sha256):
        done.failed[name] = otherwise
        return
    os.replace(made, path)
    sync_path(path.parent)
    done.names.append(name)


def _has_digest(path: Path, sha256: str) -> bool:
    return path.is_file() and not path.is_symlink() and file_sha256(path) == sha256


def _listed(folder: Path, manifest: Manifest) -> ListedTars:
    """Return the clips of all shards in the order of the manifest, as their own descriptions have them.

    Raises:
        OSError: A shard cannot be read.
        BadTar: A shard is damaged.
        Unusable: A clip does not say its partition and split, as clips of our own shards do.
    """
    features = manifest.dtypes["features"]
    settings = IndexSettings(
        tokens=manifest.tokens,
        features_dtype=features if features in FEATURES_DTYPES else None,
        action_alignment=manifest.action_alignment,
        statistics="all" if manifest.statistics_share == 1 else "sample",
    )
    layout, counts, clips, lengths = settings.layout(), {}, [], []
    like: TarClip | None = None
    for entry in manifest.shards:
        before = len(clips)
        descriptor = open_regular(folder / entry.name)
        try:
            for sample in samples(descriptor):
                clip = layout.clip(descriptor, sample)
                like = like or clip
                partition, split = (clip.description.get(name) for name in ("partition", "split"))
                if partition not in manifest.partitions or split is None:
                    raise Unusable(f"{entry.name}: clip {clip.key} does not say its partition and split")
                clips.append(SourceClip(clip.key, partition, as_split(split), {}, "", entry.name))
                lengths.append(clip.length)
        finally:
            os.close(descriptor)
        counts[entry.name] = len(clips) - before
    if like is None:
        raise Unusable("there are no clips")
    return ListedTars(
        layout=layout,
        like=like,
        tars=counts,
        clips=clips,
        lengths=lengths,
        partitions=tuple(manifest.partitions),
        provenance=manifest.provenance,
        action_alignment=manifest.action_alignment,
        statistics=settings.statistics,
    )
