"""Which class of predictor a configuration names."""

from __future__ import annotations

from .block import HopeBlock, UnifiedBlock
from .compat import AcHopeBlock, AcHopePredictor
from .predictor import HopePredictor
from .schema import ModelConfig

Predictor = HopePredictor | AcHopePredictor

HOPE_BLOCKS = (HopeBlock, UnifiedBlock, AcHopeBlock)
"""Blocks with memories and a CMS."""


def build_predictor(config: ModelConfig) -> Predictor:
    """The predictor of `model`, without weights: see `init.initialise`."""
    return AcHopePredictor(config) if config.compat == "ac_hope" else HopePredictor(config)
