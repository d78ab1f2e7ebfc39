"""Clips from a Python function of the user's own."""

from __future__ import annotations

import hashlib
import importlib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.cache import write_bytes
from data_pipeline.errors import DataError, Problem, nearest
from data_pipeline.schema import FIELDS
from data_pipeline.sources.agreement import key_problem
from data_pipeline.sources.base import SourceClip
from data_pipeline.sources.clip_source import ClipSource, FoundClip
from data_pipeline.sources.npy_file import BadArray, number_type
from data_pipeline.sources.stored import NpyArray, Seen, StoredArray

ENTRY_POINT = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*")
META = ("partition", "split")


@dataclass(frozen=True)
class InMemory:
    """An array that is there already; its stamp is a hash of its bytes."""

    array: object
    shown: str

    def __str__(self) -> str:
        return self.shown

    def look(self) -> Seen:
        """See `StoredArray`."""
        array, stamp = self.read()
        return Seen(array.dtype.name, array.shape, stamp)

    def read(self) -> tuple[np.ndarray, str]:
        """See `StoredArray`."""
        if not isinstance(self.array, np.ndarray):
            raise BadArray(f"it is of type {type(self.array).__name__}, not a numpy array")
        number_type(self.array.dtype.str)
        array = np.ascontiguousarray(self.array)
        return array, hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


@dataclass(frozen=True)
class Spooled:
    """An array that was written to a file; its stamp is that of its values."""

    file: NpyArray
    shown: str

    def __str__(self) -> str:
        return self.shown

    def look(self) -> Seen:
        """See `StoredArray`."""
        return self._loaded().look()

    def read(self) -> tuple[np.ndarray, str]:
        """See `StoredArray`."""
        return self._loaded().read()

    def _loaded(self) -> InMemory:
        return InMemory(self.file.read()[0], self.shown)


@dataclass(kw_only=True)
class PythonClips(ClipSource):
    """What `module:function` returns: (key, arrays by field, meta) for each clip; meta may hold partition and split.

    The function is called in every worker process and must give the same clips each time. It returns either something
    with a length that can be indexed, or an iterable; the arrays of an iterable are kept as files.

    Attributes:
        argument: Passed to the function; None calls it without.
        spool: Folder that the clips of an iterable are written to.
    """

    argument: str | None = None
    spool: str | None = None

    kind = "callable"
    _returned: Any = field(default=None, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what the function returned: a worker calls it itself."""
        return {**self.__dict__, "_returned": None}

    def found(self) -> Iterable[FoundClip]:
        """See `ClipSource`."""
        self._returned = None
        clips = self._call()
        is_indexed = _is_indexed(clips)
        for number, clip in enumerate(self._guarded(clips)):
            yield self._found_clip(number, clip, is_indexed)

    def again(self, clip: SourceClip) -> Mapping[str, StoredArray]:
        """See `ClipSource`."""
        if self.spool is not None:
            return {name: self._spooled(clip.key, clip.where, name) for name in clip.arrays}
        clips = self._call()
        number = int(clip.where.rpartition("[")[2].rstrip("]"))
        if number >= len(clips):
            raise self._unreadable(clip, f"{self.path} returned {len(clips)} clips this time")
        try:
            entry = clips[number]
        except Exception as error:  # the function is the user's own
            raise self._failed(f"clip {number} raised {type(error).__name__}: {error}") from error
        found = self._found_clip(number, entry, True)
        if found.key != clip.key:
            raise self._unreadable(clip, f"{self.path} returned {found.key!r} at {number} this time")
        return found.arrays

    def _call(self) -> Any:
        if self._returned is not None:
            return self._returned
        function = entry_point(str(self.path))
        try:
            clips = function() if self.argument is None else function(self.argument)
        except Exception as error:  # the function is the user's own
            raise self._failed(f"it raised {type(error).__name__}: {error}") from error
        if _is_indexed(clips):
            if self.spool is not None:
                rule = "clips that can be indexed are not written anywhere"
                raise DataError(Problem("source.spool", self.spool, rule, "leave it out"))
            self._returned = clips
        elif not isinstance(clips, Iterable) or isinstance(clips, str | bytes | Mapping):
            raise self._failed(f"it returned a {type(clips).__name__}, not clips")
        elif self.spool is None:
            rule = f"{self.path} returns a {type(clips).__name__}, which can only be read in order"
            fix = "name a folder for its clips, or return what has __len__ and __getitem__"
            raise DataError(Problem("source.spool", None, rule, fix))
        return clips

    def _guarded(self, clips: Any) -> Iterator[Any]:
        try:
            if _is_indexed(clips):
                yield from (clips[number] for number in range(len(clips)))
            else:
                yield from clips
        except Exception as error:  # the function is the user's own
            raise self._failed(f"it raised {type(error).__name__}: {error}") from error

    def _found_clip(self, number: int, clip: Any, indexed: bool) -> FoundClip:
        where = f"{self.path}[{number}]"
        if not isinstance(clip, tuple | list) or len(clip) != 3 or not isinstance(clip[0], str):
            raise self._failed(f"clip {number} is not (key, arrays, meta)")
        key, arrays, meta = clip
        problem = key_problem(key) or _entry_problem(arrays, FIELDS) or _entry_problem(meta, META)
        if problem:
            return FoundClip(key, where, problem=f"{where}: {problem}")
        if any(value is not None and not isinstance(value, str) for value in meta.values()):
            return FoundClip(key, where, problem=f"{where}: meta {dict(meta)} must hold texts")
        stored: dict[str, StoredArray] = {}
        for name, array in arrays.items():
            stored[name] = InMemory(array, f"{where}, array {name}")
            if not indexed and isinstance(array, np.ndarray):
                stored[name] = self._write(key, where, name, array)
        return FoundClip(key, where, stored, meta.get("partition"), meta.get("split"))

    def _write(self, key: str, where: str, name: str, array: np.ndarray) -> StoredArray:
        try:
            number_type(array.dtype.str)
        except BadArray:
            # Looking at it says what is wrong.
            return InMemory(array, f"{where}, array {name}")
        spooled = self._spooled(key, where, name)
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
        spooled.file.path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(spooled.file.path, buffer.getvalue())
        return spooled

    def _spooled(self, key: str, where: str, name: str) -> Spooled:
        path = Path(self.spool or "") / f"{key}.{name}.npy"
        return Spooled(NpyArray(path, str(path)), f"{where}, array {name}")

    def _failed(self, rule: str) -> DataError:
        return DataError(Problem("source", self.path, rule, "correct the function"))


def entry_point(text: str) -> Callable[..., Any]:
    """Return the function that `module:function` names.

    Raises:
        DataError: There is no such module or function.
    """
    if not ENTRY_POINT.fullmatch(text):
        raise DataError(Problem("source", text, "must be module:function", "name an importable function"))
    module_name, _, name = text.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's own code
        rule = f"{module_name} cannot be imported ({type(error).__name__}: {error})"
        raise DataError(Problem("source", text, rule, "correct the name, or install the package")) from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [other for other in vars(module) if callable(getattr(module, other)) and not other.startswith("_")]
        raise DataError(Problem("source", text, f"{module_name} has no function {name}", nearest(name, names)))
    return function


def _is_indexed(clips: object) -> bool:
    has_both = hasattr(clips, "__len__") and hasattr(clips, "__getitem__")
    return has_both and not isinstance(clips, str | bytes | Mapping | np.ndarray)


def _entry_problem(entries: object, valid: tuple[str, ...]) -> str:
    if not isinstance(entries, Mapping):
        return f"{type(entries).__name__} in place of a mapping of {', '.join(valid)}"
    unknown = [str(name) for name in entries if name not in valid]
    return f"unknown entry {unknown[0]!r}: {nearest(unknown[0], valid)}" if unknown else ""
