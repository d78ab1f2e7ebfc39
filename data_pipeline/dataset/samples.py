"""Samples of a tar, grouped as WebDataset readers group them: members of one folder whose names agree up to a dot."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from data_pipeline.shard.npy import MAX_HEADER, NpyHeader, parse_npy_header
from data_pipeline.shard.walk import BadTar, Member, walk
from data_pipeline.sources.stored import parse_json

META = ("meta.json", "json")
"""Members that describe a sample, the first that is there."""

MAX_META = 1 << 16


@dataclass
class Sample:
    """Members next to each other in a tar that share a key.

    Attributes:
        key: Folder, and file name up to its first dot.
        members: By the rest of the name, in lower case as WebDataset has it.
    """

    key: str
    members: dict[str, Member] = field(default_factory=dict)

    @property
    def meta(self) -> Member | None:
        """The member that describes it."""
        return next((self.members[name] for name in META if name in self.members), None)


def split_name(name: str) -> tuple[str, str] | None:
    """Return a member's key and the rest of its name, or None for a name that belongs to no sample.

    A leading `./`, which `tar cf x.tar .` writes, is not part of the key.
    """
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, dot, rest = last.partition(".")
    if not stem or not dot:
        return None
    return f"{folder}{slash}{stem}", rest.lower()


def samples(descriptor: int) -> Iterator[Sample]:
    """Yield the samples of an open tar, in order.

    Raises:
        BadTar: See `shard.walk.walk`; or a sample has two members of one name. What was found of the last sample is
            yielded before.
    """
    sample: Sample | None = None
    try:
        for member in walk(descriptor):
            parts = split_name(member.name)
            if parts is None:
                continue
            key, rest = parts
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample = Sample(key)
            if rest in sample.members:
                places = f"at bytes {sample.members[rest].header} and {member.header}"
                raise BadTar(f"there are two members {member.name[:200]}, {places}")
            sample.members[rest] = member
    except BadTar:
        if sample is not None:
            yield sample
        raise
    if sample is not None:
        yield sample


def read_header(descriptor: int, member: Member) -> NpyHeader:
    """Return the header of a member that is a .npy of one of the stored types.

    Raises:
        OSError: It cannot be read.
        ValueError: It is something else, or does not hold exactly the bytes its header speaks of.
    """
    header = parse_npy_header(os.pread(descriptor, min(member.size, MAX_HEADER + 12), member.offset))
    there, said = member.size - header.nbytes, prod(header.shape) * np.dtype(header.descr).itemsize
    if there != said:
        raise ValueError(f"it holds {there} bytes of values, its header says {said}")
    return header


def read_meta(descriptor: int, member: Member) -> dict[str, Any]:
    """Return the object in a sample's meta.json.

    Raises:
        OSError: It cannot be read.
        ValueError: It is longer than `MAX_META` or not a JSON object.
    """
    if member.size > MAX_META:
        raise ValueError(f"it has {member.size} bytes, more than {MAX_META}")
    return parse_json(os.pread(descriptor, member.size, member.offset))
