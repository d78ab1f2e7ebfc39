"""Tars without an index, read by the webdataset library: for a first look at foreign tars, not for training runs.

A stream knows neither how many clips there are nor where each lies, so it cannot be resumed exactly, its order depends
on files and processes, and a damaged tar may end early without an error. `hopescale data index` mends all three.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from data_pipeline.alignment import ALIGNMENTS, ActionAlignment, aligned
from data_pipeline.batch import Clip
from data_pipeline.dtypes import STORED_TYPES
from data_pipeline.errors import DataError, Problem, missing_extra
from data_pipeline.shard.npy import parse_npy_header

logger = logging.getLogger(__name__)

_PLAIN = {"<f4": "float32", "<f2": "float16"}
"""Types that numpy's own names tell; others are integers to it."""

MEMBERS: Mapping[str, str] = MappingProxyType(
    {name: f"{name}.npy" for name in ("features", "features_scale", "actions", "states", "extrinsics")}
)
MAX_META = 1 << 20
_FIX = "index the tars with `hopescale data index FOLDER` and set data.path to that folder"


class StreamedClips(IterableDataset[Clip]):
    """Clips of un-indexed local tars, in the order of the files.

    A sample's meta.json says what numpy's types do not: `dtypes` and `action_alignment`, as our own tars hold them.
    """

    def __init__(
        self,
        tars: Sequence[Path | str],
        *,
        members: Mapping[str, str] = MEMBERS,
        action_alignment: ActionAlignment = "as-is",
    ) -> None:
        """Take tars.

        Args:
            tars: Local files.
            members: Name of the member after the clip's key and a dot, by field.
            action_alignment: How recorded actions become one per transition, where a sample's meta.json does not say.

        Raises:
            DataError: A name is a URL or a command, or is not a file.
            MissingExtra: webdataset is not installed.
        """
        for tar in tars:
            if not Path(tar).is_file():
                rule = "is not a local file; no URL is opened and no command is run"
                raise DataError(Problem("tars", tar, rule, "name local tars"))
        try:
            from webdataset.compat import WebDataset
            from webdataset.handlers import reraise_exception
        except ImportError as error:
            raise missing_extra("webdataset", "webdataset", "reading tars without an index") from error
        self._members = dict(members)
        self._alignment: ActionAlignment = action_alignment
        names = [str(Path(tar).absolute()) for tar in tars]
        self._stream = WebDataset(names, shardshuffle=False, handler=reraise_exception)
        logger.warning("tars without an index cannot be resumed exactly; %s", _FIX)

    def __iter__(self) -> Iterator[Clip]:
        """Yield clips.

        Raises:
            DataError: A clip lacks a field or holds something else than numbers in C order.
        """
        for sample in self._stream:
            yield self._clip(sample)

    def state_dict(self) -> NoReturn:
        """Refuse.

        Raises:
            DataError: Always.
        """
        raise DataError(Problem("data.path", "tars without an index", "a stream has no place to resume from", _FIX))

    load_state_dict = state_dict

    def _clip(self, sample: dict[str, Any]) -> Clip:
        key = sample["__key__"]
        try:
            return self._made(key, sample)
        except ValueError as error:
            raise DataError(Problem("tars: clip", key, str(error), _FIX)) from error

    def _made(self, key: str, sample: dict[str, Any]) -> Clip:
        meta = _meta(sample)
        dtypes = meta.get("dtypes", {})
        found = {name: self._values(sample, name, dtypes.get(name)) for name in self._members}
        values = {name: tensor for name, tensor in found.items() if tensor is not None}
        for name in ("features", "actions"):
            if name not in values:
                there = ", ".join(sorted(part for part in sample if not part.startswith("__")))
                rule = f"it has no member {self._members.get(name)}, only {there or 'none'}; a key must not hold dots"
                raise ValueError(rule)
        features = values["features"]
        if features.ndim != 3 or (features.dtype == torch.int8) != ("features_scale" in values):
            shape = list(features.shape)
            raise ValueError(f"features {shape} must be [F, N, E], with features_scale if and only if they are int8")
        alignment = meta.get("action_alignment", self._alignment)
        if alignment not in ALIGNMENTS:
            raise ValueError(f"action alignment {alignment} is none of {', '.join(ALIGNMENTS)}")
        return Clip(
            key,
            str(meta.get("partition", "all")),
            features,
            torch.from_numpy(aligned(values["actions"].numpy(), alignment, len(features))),
            values["states"].float() if "states" in values else None,
            values["extrinsics"].float() if "extrinsics" in values else None,
            values.get("features_scale"),
        )

    def _values(self, sample: dict[str, Any], name: str, dtype: str | None) -> Tensor | None:
        content = sample.get(self._members[name])
        if content is None:
            return None
        header = parse_npy_header(content)
        values = np.frombuffer(content, header.descr, offset=header.nbytes).reshape(header.shape).copy()
        kind = STORED_TYPES.get(dtype or _PLAIN.get(header.descr, ""))
        if kind is None or kind.descr != header.descr:
            said = f"meta.json says {dtype}" if dtype else "no meta.json says what they are"
            raise ValueError(f"{name} are stored as {header.descr}, and {said}")
        return torch.from_numpy(values.view(f"i{kind.itemsize}")).view(kind.torch)


def _meta(sample: dict[str, Any]) -> dict[str, Any]:
    content = sample.get("meta.json", b"{}")
    if len(content) > MAX_META:
        raise ValueError(f"its meta.json has {len(content)} bytes, more than {MAX_META}")
    meta = json.loads(content)
    if not isinstance(meta, dict) or not isinstance(meta.get("dtypes", {}), dict):
        raise ValueError("its meta.json is not a description of a clip")
    return meta
