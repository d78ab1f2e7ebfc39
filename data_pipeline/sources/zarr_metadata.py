"""What a zarr array on disk says about itself: type, shape and chunk files, read without the zarr package.

Formats: zarr v2 (`.zarray`) and v3 (`zarr.json`) with regular chunk grids, sharded or not. Codecs that could run code
or change values are refused by name.
"""

from __future__ import annotations

import itertools
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.sources.npy_file import BadArray, number_type
from data_pipeline.sources.stored import parse_json, read_small

MAX_DOCUMENT = 1 << 20
MAX_BYTES = 4 << 30
"""Bytes that one chunk, or one clip's part of an array, may have once unpacked."""
MAX_CHUNKS = 1 << 16
"""Chunk files that one clip may be spread over."""
MAX_SIZE = 1 << 40
MAX_TEXT = 1 << 12
"""Bytes that one text of a fixed width may have."""
TEXT = "text"

_V2_COMPRESSORS = ("blosc", "zstd", "gzip", "zlib", "bz2", "lzma", "lz4")
_V3_CODECS = ("bytes", "transpose", "blosc", "zstd", "gzip", "crc32c", "sharding_indexed")
_V3_NUMBERS = ("float16", "float32", "float64", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
_PLACE_BYTES = 16
"""Of a chunk's place in the index of a shard."""
_REFERENCE = 8
_BYTES = {f"{name}{bits}": bits // 8 for name in ("float", "int", "uint") for bits in (8, 16, 32, 64)}


@dataclass(frozen=True)
class ZarrArray:
    """Metadata of one array.

    Attributes:
        folder: Of the array.
        shown: Name for a user.
        version: 2 or 3.
        dtype: numpy's name of the number type, or `TEXT`.
        shape: Of the whole array.
        files: Shape of what one chunk file holds: a chunk, or a shard of them.
        chunks: Shape of what is unpacked at once: a chunk, or the chunks inside a shard.
        itemsize: Bytes of one value once unpacked; of texts of any length, those of the reference to one.
        prefix: What the names of chunk files begin with.
        separator: Between the numbers in those names.
        stamp: Of the metadata's file.
    """

    folder: Path
    shown: str
    version: int
    dtype: str
    shape: tuple[int, ...]
    files: tuple[int, ...]
    chunks: tuple[int, ...]
    itemsize: int
    prefix: str
    separator: str
    stamp: str

    def chunk_files(self, row: int | None) -> Iterator[Path]:
        """Yield the files of the chunks that hold a row of the first axis, or the whole array if None.

        Raises:
            BadArray: There are more than `MAX_CHUNKS`.
        """
        counts = [-(-size // extent) for size, extent in zip(self.shape, self.files, strict=True)]
        spans = [range(count) for count in counts]
        if row is not None:
            spans[0] = range(row // self.files[0], row // self.files[0] + 1)
        if math.prod(len(span) for span in spans) > MAX_CHUNKS:
            what = "it lies" if row is None else "a clip lies"
            raise BadArray(f"{what} in more than {MAX_CHUNKS} chunks; store it in larger ones")
        for place in itertools.product(*spans):
            yield self.folder / (self.prefix + self.separator.join(map(str, place)))

    def row_stamp(self, row: int | None, *, empty_chunks: bool) -> str:
        """Return a stamp over the metadata and chunk files of a row, or of the whole array if None.

        Raises:
            BadArray: A chunk file is missing and `empty_chunks` is false, or one is not a regular file.
        """
        stamps = [self.stamp]
        for path in self.chunk_files(row):
            try:
                status = os.lstat(path)
            except FileNotFoundError:
                if not empty_chunks:
                    name = path.relative_to(self.folder).as_posix()
                    rule = "zarr would read zeros there; empty_chunks=true says that zeros were meant"
                    raise BadArray(f"its chunk {name} is missing: {rule}") from None
                stamps.append("-")
                continue
            if not stat.S_ISREG(status.st_mode):
                raise BadArray(f"its chunk {path.relative_to(self.folder).as_posix()} is not a regular file")
            stamps.append(f"{status.st_size}:{status.st_mtime_ns}")
        return " ".join(stamps)


def is_array(folder: Path) -> bool:
    """Return whether a folder is a zarr array."""
    try:
        return (folder / ".zarray").is_file() or _v3_document(folder).get("node_type") == "array"
    except (OSError, ValueError):
        return False


def is_group(folder: Path) -> bool:
    """Return whether a folder is a zarr group."""
    try:
        return (folder / ".zgroup").is_file() or _v3_document(folder).get("node_type") == "group"
    except (OSError, ValueError):
        return False


def attributes(folder: Path) -> dict[str, Any]:
    """Return the attributes of an array or group, empty if it has none.

    Raises:
        OSError: They cannot be opened.
        ValueError: They are not readable.
    """
    if os.path.lexists(folder / "zarr.json"):
        found = _v3_document(folder).get("attributes", {})
    elif os.path.lexists(folder / ".zattrs"):
        found = parse_json(read_small(folder / ".zattrs", MAX_DOCUMENT))
    else:
        found = {}
    return found if isinstance(found, dict) else {}


def zarr_array(folder: Path, shown: str) -> ZarrArray:
    """Read the metadata of an array.

    Args:
        folder: Of the array.
        shown: Name for a user.

    Raises:
        OSError: There is no such array, or it cannot be opened.
        ValueError: It is one that is not taken here.
    """
    old = folder / ".zarray"
    try:
        array = _v2(folder, shown, old) if os.path.lexists(old) else _v3(folder, shown)
    except (KeyError, TypeError, AttributeError) as error:
        raise BadArray(f"its metadata lack something or have another form ({type(error).__name__}: {error})") from error
    shown = f"its chunks {list(array.chunks)}"
    if not array.shape or {len(array.files), len(array.chunks)} != {len(array.shape)}:
        raise BadArray(f"{shown} do not fit its shape {list(array.shape)}")
    if array.itemsize > MAX_TEXT:
        raise BadArray(f"each of its texts takes {array.itemsize} bytes, more than {MAX_TEXT}")
    # Whoever reads one value of a chunk unpacks all of it.
    if math.prod(array.chunks) * array.itemsize > MAX_BYTES:
        raise BadArray(f"{shown} of {array.itemsize} bytes a value are too large: more than {MAX_BYTES} bytes")
    inside = math.prod(-(-file // chunk) for file, chunk in zip(array.files, array.chunks, strict=True))
    if inside * _PLACE_BYTES > MAX_BYTES:
        raise BadArray(f"one of its shards holds {inside} chunks, too many")
    return array


def _v2(folder: Path, shown: str, path: Path) -> ZarrArray:
    document = parse_json(read_small(path, MAX_DOCUMENT))
    if document["zarr_format"] != 2:
        raise BadArray(f"its zarr_format is {document['zarr_format']!r}, not 2")
    filters = [entry["id"] for entry in document.get("filters") or ()]
    compressor = (document["compressor"] or {"id": None})["id"]
    if compressor not in (None, *_V2_COMPRESSORS):
        raise BadArray(f"its compressor {compressor!r} is none of {', '.join(_V2_COMPRESSORS)}")
    dtype = document["dtype"]
    is_text = isinstance(dtype, str) and (dtype[1:2] in ("U", "S") or (dtype == "|O" and filters == ["vlen-utf8"]))
    if filters and not is_text:
        raise BadArray(f"its filters {', '.join(map(str, filters))} are not taken here; store it without")
    if not isinstance(dtype, str):
        raise BadArray("it has a structured type; store each field as an array of its own")
    separator = document.get("dimension_separator", ".")
    name, chunks = TEXT if is_text else number_type(dtype), _sizes(document["chunks"], 1)
    return ZarrArray(
        folder,
        shown,
        2,
        name,
        _sizes(document["shape"], 0),
        chunks,
        chunks,
        _v2_text_bytes(dtype) if is_text else _BYTES.get(name, 1),
        "",
        _separator(separator),
        _stamp(path),
    )


def _v2_text_bytes(dtype: str) -> int:
    if dtype == "|O":
        return _REFERENCE
    if not dtype[2:].isdecimal() or len(dtype) > 12:
        raise BadArray(f"its type {dtype[:40]!r} is refused: it is no text of a fixed width")
    return int(dtype[2:]) * (4 if dtype[1] == "U" else 1)


def _v3(folder: Path, shown: str) -> ZarrArray:
    document = _v3_document(folder)
    if document["zarr_format"] != 3 or document["node_type"] != "array":
        raise BadArray("it is not a zarr array of format 2 or 3")
    dtype = _v3_type(document["data_type"])
    codecs = document["codecs"]
    _check_codecs(codecs, (*_V3_CODECS, "vlen-utf8") if dtype == TEXT else _V3_CODECS)
    grid, keys = document["chunk_grid"], document["chunk_key_encoding"]
    if grid["name"] != "regular" or keys["name"] not in ("default", "v2"):
        raise BadArray(f"its chunk grid {grid['name']!r} with names {keys['name']!r} is not taken here")
    default = "/" if keys["name"] == "default" else "."
    separator = _separator((keys.get("configuration") or {}).get("separator", default))
    files = _sizes(grid["configuration"]["chunk_shape"], 1)
    return ZarrArray(
        folder,
        shown,
        3,
        dtype,
        _sizes(document["shape"], 0),
        files,
        _inner_chunks(codecs) or files,
        _v3_text_bytes(document["data_type"]) if dtype == TEXT else _BYTES[dtype],
        f"c{separator}" if keys["name"] == "default" else "",
        separator,
        _stamp(folder / "zarr.json"),
    )


def _v3_type(stored: Any) -> str:
    name = stored["name"] if isinstance(stored, dict) else stored
    if name in ("string", "fixed_length_utf32", "null_terminated_bytes"):
        return TEXT
    if name not in _V3_NUMBERS:
        raise BadArray(f"its type {name!r} is refused: it is none of {', '.join(_V3_NUMBERS)}")
    return name


def _v3_text_bytes(stored: Any) -> int:
    if stored == "string" or stored["name"] == "string":
        return _REFERENCE
    size = stored["configuration"]["length_bytes"]
    return _sizes([size], 0)[0]


def _inner_chunks(codecs: list[Any]) -> tuple[int, ...] | None:
    """Return the shape of the chunks inside shards, None where whole files are unpacked."""
    # Any other codec around the shards wants all of a file at once.
    if len(codecs) != 1 or codecs[0]["name"] != "sharding_indexed":
        return None
    return _sizes(codecs[0]["configuration"]["chunk_shape"], 1)


def _v3_document(folder: Path) -> dict[str, Any]:
    return parse_json(read_small(folder / "zarr.json", MAX_DOCUMENT))


def _check_codecs(codecs: list[Any], allowed: tuple[str, ...]) -> None:
    for codec in codecs:
        name = codec["name"]
        if name not in allowed:
            raise BadArray(f"its codec {name!r} is none of {', '.join(allowed)}")
        configuration = codec.get("configuration") or {}
        if configuration.get("endian") == "big":
            raise BadArray("it is big-endian; store it little-endian")
        if name == "sharding_indexed":
            _check_codecs(configuration["codecs"], allowed)
            _check_codecs(configuration["index_codecs"], _V3_CODECS)


def _sizes(sizes: Any, least: int) -> tuple[int, ...]:
    if not isinstance(sizes, list) or not all(type(size) is int and least <= size < MAX_SIZE for size in sizes):
        raise BadArray(f"{str(sizes)[:80]} are no sizes")
    return tuple(sizes)


def _separator(text: Any) -> str:
    if text not in (".", "/"):
        raise BadArray(f"the separator {text!r} in the names of its chunks is neither . nor /")
    return text


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size}:{status.st_mtime_ns}"
