"""Tars without an index, read by the webdataset library: for a first look at foreign tars, not for training runs.

A stream knows neither how many clips there are nor where each lies, so it cannot be resumed exactly, its order depends
on files and processes, and a damaged tar may end early without an error. `hopescale data index` mends all three.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from data_pipeline.batch import Clip
from data_pipeline.errors import DataError, Problem, missing_extra
from data_pipeline.shard.npy import parse_npy_header

logger = logging.getLogger(__name__)

MEMBERS: Mapping[str, str] = {"features": "features.npy", "actions": "actions.npy", "states": "states.npy"}
_FIX = "index the tars with `hopescale data index FOLDER` and set data.path to that folder"


class StreamedClips(IterableDataset[Clip]):
    """Clips of un-indexed local tars, in the order of the files."""

    def __init__(self, tars: Sequence[Path | str], *, members: Mapping[str, str] = MEMBERS) -> None:
        """Take tars.

        Args:
            tars: Local files.
            members: Name of the member after the clip's key and a dot, by field.

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
        values = {name: self._values(sample, name, key) for name in self._members}
        for name in ("features", "actions"):
            if values.get(name) is None:
                found = ", ".join(sorted(part for part in sample if not part.startswith("__")))
                rule = f"has no member {self._members.get(name)}, only {found or 'none'}; a key must not hold dots"
                raise DataError(Problem("tars: clip", key, rule, "name the members that there are"))
        features, actions = values["features"], values["actions"]
        assert features is not None
        assert actions is not None
        states = values.get("states")
        return Clip(key, "all", features, actions.float(), None if states is None else states.float())

    def _values(self, sample: dict[str, Any], name: str, key: str) -> Tensor | None:
        content = sample.get(self._members[name])
        if content is None:
            return None
        try:
            header = parse_npy_header(content)
            values = np.frombuffer(content, header.descr, offset=header.nbytes).reshape(header.shape)
        except ValueError as error:
            problem = Problem(f"tars: clip {key}", self._members[name], str(error), "store plain arrays")
            raise DataError(problem) from error
        return torch.from_numpy(values.copy())
