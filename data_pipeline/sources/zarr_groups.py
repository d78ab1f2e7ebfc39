"""Zarr groups, v2 or v3: all clips stacked in a few arrays, or one sub-group a clip."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from data_pipeline.errors import DataError, Problem, missing_extra
from data_pipeline.schema import FIELDS
from data_pipeline.sources.base import SourceClip
from data_pipeline.sources.clip_source import ClipSource, FoundClip
from data_pipeline.sources.labels import natural
from data_pipeline.sources.layout import FEATURES_DTYPES, REQUIRED
from data_pipeline.sources.npy_file import BadArray
from data_pipeline.sources.provenance import stated_by
from data_pipeline.sources.stored import Seen, StoredArray, reason
from data_pipeline.sources.zarr_metadata import MAX_BYTES, TEXT, ZarrArray, attributes, is_array, is_group, zarr_array

LABELS = ("key", "partition", "split", "length", "rows")
_NAMES = ("partition", "split")
MAX_CLIPS = 10_000_000


@dataclass(frozen=True)
class ZarrPart:
    """A row of a stacked array without its padding, or a whole array.

    Attributes:
        array: Where it lies.
        row: Of the first axis; None means the whole array.
        length: How much of the next axis belongs to the clip.
        empty_chunks: Read chunks without a file as zeros.
    """

    array: ZarrArray
    row: int | None
    length: int
    empty_chunks: bool

    def __str__(self) -> str:
        return self.array.shown if self.row is None else f"{self.array.shown}[{self.row}]"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the part."""
        stored = self.array.shape if self.row is None else self.array.shape[1:]
        return (self.length, *stored[1:])

    def look(self) -> Seen:
        """See `StoredArray`."""
        if self.array.dtype == TEXT:
            raise BadArray("it holds text, not numbers")
        nbytes = math.prod(self.shape) * np.dtype(self.array.dtype).itemsize
        if nbytes > MAX_BYTES:
            raise BadArray(f"the clip's part {list(self.shape)} has {nbytes} bytes, more than {MAX_BYTES}")
        return Seen(self.array.dtype, self.shape, self.array.row_stamp(self.row, empty_chunks=self.empty_chunks))

    def read(self) -> tuple[np.ndarray, str]:
        """See `StoredArray`."""
        seen = self.look()
        rows = slice(0, self.length)
        values = zarr_values(self.array, rows if self.row is None else (self.row, rows))
        return np.ascontiguousarray(values, values.dtype.newbyteorder("=")), seen.stamp


def zarr_values(array: ZarrArray, selection: Any) -> np.ndarray:
    """Return part of an array.

    Raises:
        MissingExtra: The zarr package is not installed.
        ValueError: Its chunks are damaged.
    """
    opened = _opened(array)
    if opened.shape != array.shape:
        raise BadArray(f"the zarr package says its shape is {list(opened.shape)}, not {list(array.shape)}")
    try:
        return np.asarray(opened[selection])
    except Exception as error:  # codecs raise whatever their libraries do
        raise BadArray(f"its chunks cannot be read ({type(error).__name__}: {error})") from error


# Opening takes about as long as reading a clip.
@lru_cache(maxsize=64)
def _opened(array: ZarrArray) -> Any:
    try:
        import zarr
        from zarr.storage import LocalStore
    except ImportError:
        raise missing_extra("zarr", "zarr", "reading zarr groups") from None
    store = LocalStore(array.folder, read_only=True)
    try:
        return zarr.open_array(store=store, mode="r", zarr_format=3 if array.version == 3 else 2)
    except Exception as error:  # metadata that passed our checks may still not be theirs
        raise BadArray(f"the zarr package cannot open it ({type(error).__name__}: {error})") from error


@dataclass(kw_only=True)
class _ZarrSource(ClipSource):
    """What both kinds share.

    Attributes:
        features: Name of the array; None means `features`. The same holds for the other fields.
        actions: See features.
        states: See features; an array named here must be there.
        extrinsics: See states.
        features_scale: See states.
        empty_chunks: Read chunks without a file as zeros: zarr does not write chunks of zeros, and an incomplete copy
            looks the same.
    """

    features: str | None = None
    actions: str | None = None
    states: str | None = None
    extrinsics: str | None = None
    features_scale: str | None = None
    empty_chunks: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self._names():
            chosen = getattr(self, name)
            if chosen is not None and (".." in PurePosixPath(chosen).parts or chosen.startswith("/") or not chosen):
                fix = "name an array inside the group"
                raise DataError(Problem(f"source.{name}", chosen, "leads out of the group", fix))

    def _names(self) -> tuple[str, ...]:
        return FIELDS

    def _array(self, name: str, group: str = "") -> ZarrArray | None:
        """Return the array of a field, or None if there is none and none is needed."""
        chosen = getattr(self, name)
        shown = f"{group}{'/' if group else ''}{chosen or name}"
        # A folder whose metadata are damaged or lost is an error, not an absent field.
        needed = chosen is not None or name in REQUIRED or os.path.lexists(self.path / shown)
        return zarr_array(self.path / shown, shown) if needed else None


@dataclass(kw_only=True)
class ZarrStacked(_ZarrSource):
    """A group with features `[clips, F, N, E]`, actions `[clips, rows, A]`, and other fields stacked alike.

    Beside them there may be an array of keys (else `clip_00000` and so on), of partitions, of splits, of lengths in
    stored frames, what follows them being padding, and of rows of actions. Attributes of the group may be `partitions`
    and `splits`, names for arrays of numbers, and entries of the provenance; `stored_type` of the features says what
    unsigned integers are. That is how `hopescale data shard` writes its own groups.

    Attributes:
        key: Name of the array of keys; None means `key`, which may be absent. The same holds for the following.
        partition: See key.
        split: See key.
        length: See key.
        rows: See key.
    """

    key: str | None = None
    partition: str | None = None
    split: str | None = None
    length: str | None = None
    rows: str | None = None

    kind = "zarr"
    _opened: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was read so far: a worker reads its own."""
        return {**self.__dict__, "_opened": {}}

    def _names(self) -> tuple[str, ...]:
        return (*FIELDS, *LABELS)

    def found(self) -> Iterable[FoundClip]:
        """See `ClipSource`."""
        self._opened.clear()
        arrays, labels = self._open()
        dtype, stated = self._attributes()
        for row in range(arrays["features"].shape[0]):
            key = str(labels["key"][row]) if "key" in labels else f"clip_{row:05d}"
            if not key and "length" in labels and labels["length"][row] == 0:
                # A row whose clip the sharder left out.
                continue
            partition, split = (str(labels[name][row]) or None if name in labels else None for name in _NAMES)
            where = f"row {row}"
            try:
                parts = self._parts(row)
                yield FoundClip(key, where, parts, partition, split, features_dtype=dtype, stated=stated)
            except ValueError as error:
                yield FoundClip(key, where, problem=f"{where}: {error}")

    def again(self, clip: SourceClip) -> Mapping[str, StoredArray]:
        """See `ClipSource`."""
        row = int(clip.where.removeprefix("row "))
        arrays, labels = self._open()
        keys = labels.get("key")
        if row >= arrays["features"].shape[0] or (keys is not None and str(keys[row]) != clip.key):
            raise self._unreadable(clip, f"{clip.where} is another clip now")
        try:
            return self._parts(row)
        except ValueError as error:
            raise self._unreadable(clip, f"{clip.where}: {error}") from error

    def _open(self) -> tuple[dict[str, ZarrArray], dict[str, np.ndarray]]:
        if self._opened:
            return self._opened["arrays"], self._opened["labels"]
        arrays: dict[str, ZarrArray] = {}
        labels: dict[str, np.ndarray] = {}
        for name in (*FIELDS, *LABELS):
            try:
                array = self._array(name)
                if array is not None and name in FIELDS:
                    arrays[name] = array
                elif array is not None:
                    labels[name] = self._label(name, array)
            except (OSError, ValueError) as error:
                raise self._unusable(name, reason(error)) from error
        clips = arrays["features"].shape[0]
        if clips > MAX_CLIPS:
            raise self._unusable("features", f"it claims {clips} clips, more than {MAX_CLIPS}")
        for name, array in {**arrays, **labels}.items():
            if array.shape[0] != clips or (name in FIELDS and len(array.shape) < 2):
                raise self._unusable(name, f"its shape is {list(array.shape)}, and features have {clips} clips")
        self._opened = {"arrays": arrays, "labels": labels}
        return arrays, labels

    def _label(self, name: str, array: ZarrArray) -> np.ndarray:
        wanted = "text" if name in ("key", "partition", "split") else "integer"
        fits = "int" in array.dtype or (array.dtype == TEXT and wanted == "text")
        if not fits or len(array.shape) != 1 or array.shape[0] > MAX_CLIPS:
            raise BadArray(f"it is {array.dtype} {list(array.shape)}, not one {wanted} a clip")
        if array.shape[0] * array.itemsize > MAX_BYTES:
            raise BadArray(f"its {array.shape[0]} texts of {array.itemsize} bytes take more than {MAX_BYTES}")
        # A lost chunk would move clips to the first partition or split, and a pipe in its place would wait for ever.
        array.row_stamp(None, empty_chunks=self.empty_chunks)
        values = zarr_values(array, slice(None))
        names = attributes(self.path).get(f"{name}s")
        if name in _NAMES and values.dtype.kind in "iu" and isinstance(names, list):
            if values.size and not 0 <= values.min() <= values.max() < len(names):
                raise BadArray(f"it holds numbers from {values.min()} to {values.max()} for {len(names)} names")
            return np.array(list(map(str, names)))[values]
        return np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values

    def _attributes(self) -> tuple[str | None, dict[str, str]]:
        """Return what the attributes say of the features' type and of the provenance."""
        try:
            stored_type = attributes(self.path / (self.features or "features")).get("stored_type")
            return stored_type if stored_type in FEATURES_DTYPES else None, stated_by(attributes(self.path))
        except (OSError, ValueError) as error:
            rule = f"its attributes cannot be used: {reason(error)}"
            raise DataError(Problem("source", self.path, rule, "correct them")) from error

    def _parts(self, row: int) -> dict[str, StoredArray]:
        arrays, _ = self._open()
        padded = arrays["features"].shape[1]
        frames = self._frames(row)
        parts: dict[str, StoredArray] = {}
        for name, array in arrays.items():
            length = array.shape[1]
            if name == "actions":
                length = self._rows(row, length, frames)
            elif name != "features_scale":
                # Whatever has one row a frame, or a fixed number less, is padded as the features are.
                whole = padded // self._per_frame()
                length -= (whole - frames) * (self._per_frame() if name == "features" else 1)
            if length < 0:
                raise BadArray(f"{name} has {array.shape[1]} rows a clip, too few for {frames} frames")
            parts[name] = ZarrPart(array, row, length, self.empty_chunks)
        return parts

    def _per_frame(self) -> int:
        """Rows of the features' second axis that make a frame: more than one in `[clips, F * N, E]`."""
        arrays, _ = self._open()
        return (self.tokens or 1) if len(arrays["features"].shape) == 3 else 1

    def _frames(self, row: int) -> int:
        arrays, labels = self._open()
        whole = arrays["features"].shape[1] // self._per_frame()
        if "length" not in labels:
            return whole
        frames = int(labels["length"][row])
        if not 0 <= frames <= whole:
            raise BadArray(f"length is {frames}, and features have {whole} frames")
        return frames

    def _rows(self, row: int, stored: int, frames: int) -> int:
        arrays, labels = self._open()
        if "rows" in labels:
            rows = int(labels["rows"][row])
            if not 0 <= rows <= stored:
                raise BadArray(f"rows is {rows}, and actions have {stored} rows")
            return rows
        whole = arrays["features"].shape[1] // self._per_frame()
        if frames == whole:
            return stored
        kinds = {whole - 1: frames - 1, whole: frames, 2 * whole - 2: 2 * frames - 2, 2 * whole: 2 * frames}
        if self.provenance.action_alignment == "pair-mean":
            kinds = {2 * whole - 2: 2 * frames - 2, 2 * whole: 2 * frames}
        if stored not in kinds:
            rule = f"nobody says how many of {stored} rows of actions belong to {frames} frames of {whole}"
            raise BadArray(f"{rule}; the option rows names an array that does")
        return kinds[stored]

    def _unusable(self, name: str, rule: str) -> DataError:
        where = f"{self.path}/{getattr(self, name) or name}"
        return DataError(Problem(f"source.{name}", where, rule, "correct the array, or name another one"))


@dataclass(kw_only=True)
class ZarrClips(_ZarrSource):
    """A group with one sub-group a clip, named by its key, which holds the arrays of its fields.

    Arrays beside the sub-groups are passed over.
    """

    kind = "zarr-clips"

    def found(self) -> Iterable[FoundClip]:
        """See `ClipSource`."""
        with os.scandir(self.path) as entries:
            names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
        for name in sorted(names, key=natural):
            if is_array(self.path / name):
                continue
            try:
                if not is_group(self.path / name):
                    raise BadArray("it is no zarr group, or its metadata are damaged or lost")
                yield FoundClip(name, name, self._parts(name))
            except (OSError, ValueError) as error:
                yield FoundClip(name, name, problem=f"{name}: {reason(error)}")

    def again(self, clip: SourceClip) -> Mapping[str, StoredArray]:
        """See `ClipSource`."""
        try:
            return self._parts(clip.where)
        except (OSError, ValueError) as error:
            raise self._unreadable(clip, f"{clip.where}: {reason(error)}") from error

    def _parts(self, group: str) -> dict[str, StoredArray]:
        parts: dict[str, StoredArray] = {}
        for name in FIELDS:
            try:
                array = self._array(name, group)
            except (OSError, ValueError) as error:
                raise BadArray(f"{name}: {reason(error)}") from error
            if array is not None:
                parts[name] = ZarrPart(array, None, array.shape[0], self.empty_chunks)
        return parts
