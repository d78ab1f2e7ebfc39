"""The settings of an encoding, and what can be wrong with them before anything is read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from data_pipeline.alignment import ALIGNMENTS, ActionAlignment
from data_pipeline.encode.encoders import check_encoder
from data_pipeline.encode.modes import DTYPES
from data_pipeline.errors import DataError, Problem, nearest

ON_ERROR = ("fail", "skip")


@dataclass(frozen=True)
class EncodeSettings:
    """What `run.encode` was asked to do; see there for each field."""

    encoder: str
    weights: str | None
    mode: str
    batch_frames: int
    dtype: str
    device: str
    frames: int | None
    fps: float | None
    size: int | None
    alignment: ActionAlignment | None
    heldout: float | None
    on_error: str
    part: tuple[int, int]

    @property
    def on_cuda(self) -> bool:
        """Whether the encoder runs on a GPU."""
        return self.device.startswith("cuda")

    def check(self) -> None:
        """Check everything that needs neither files nor the encoder.

        Raises:
            DataError: All problems at once.
        """
        problems = [*check_encoder(self.encoder, self.mode), *self._names(), *self._numbers(), *self._device()]
        if problems:
            raise DataError(problems)

    def _names(self) -> Iterator[Problem]:
        for name, valid in (("dtype", DTYPES), ("on_error", ON_ERROR), ("alignment", ALIGNMENTS)):
            value = getattr(self, name)
            if value is not None and value not in valid:
                yield Problem(name, value, "unknown value", nearest(value, valid))

    def _numbers(self) -> Iterator[Problem]:
        for name, least, usual in (("batch_frames", 1, 16), ("frames", 2, 16), ("size", 1, 256)):
            value = getattr(self, name)
            if value is not None and value < least:
                yield Problem(name, value, f"must be at least {least}", f"use {usual}")
        if self.fps is not None and not (self.fps > 0 and math.isfinite(self.fps)):
            yield Problem("fps", self.fps, "must be a positive number of frames a second", "use 4")
        if self.heldout is not None and not 0 <= self.heldout < 1:
            yield Problem("heldout", self.heldout, "must be a share of at least 0 and below 1", "use 0.1")
        part = self.part
        if len(part) != 2 or not all(type(number) is int for number in part) or not 0 <= part[0] < part[1]:
            rule = "must be two integers, index and count, with the index from 0 to count - 1"
            yield Problem("part", part, rule, "use (0, 4) for the first of four")

    def _device(self) -> Iterator[Problem]:
        kind, _, index = self.device.partition(":")
        if kind not in ("cpu", "cuda") or (":" in self.device and (kind == "cpu" or not index.isdigit())):
            yield Problem("device", self.device, "unknown device", nearest(self.device, ("cpu", "cuda", "cuda:0")))
        elif kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
            rule = f"torch sees {torch.cuda.device_count()} CUDA devices here"
            yield Problem("device", self.device, rule, "set device=cpu, or another index")
