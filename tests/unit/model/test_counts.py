from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hopescale.model.build import build_predictor
from hopescale.model.counts import (
    attention_block,
    hope_block,
    longterm_parameters,
    memory_parameters,
    mixing_parameters,
    parameter_count,
    unified_block,
)
from hopescale.model.schema import ModelConfig

PHASE_5: dict[str, Any] = {
    "state_dim": 2,
    "extrinsics_dim": 1,
    "spatial_mixing": True,
    "block_pattern": ["H"] * 5,
}


def built(model: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_predictor(model).parameters())


@settings(deadline=None, max_examples=60)
@given(
    pattern=st.text("STHU", min_size=1, max_size=4),
    width=st.sampled_from([24, 36, 48]),
    heads=st.sampled_from([1, 2, 3]),
    sizes=st.tuples(*[st.integers(0, 7)] * 2),
    multiplier=st.sampled_from([0.5, 1.0, 2.5]),
    levels=st.lists(st.sampled_from([0.5, 1.0, 2.0]), max_size=3),
    lasting=st.sampled_from([None, "input", "retrieval"]),
    mixing=st.booleans(),
    tables=st.booleans(),
)
def test_the_closed_form_is_the_number_of_built_parameters(
    pattern: str,
    width: int,
    heads: int,
    sizes: tuple[int, int],
    multiplier: float,
    levels: list[float],
    lasting: str | None,
    mixing: bool,
    tables: bool,
) -> None:
    if lasting is not None and not set(pattern) & {"H", "U"}:
        lasting = None
    model = ModelConfig.model_validate(
        {
            "encoder_dim": 9,
            "grid": (2, 3),
            "width": width,
            "block_pattern": list(pattern),
            "state_dim": sizes[0],
            "extrinsics_dim": sizes[1],
            "attention": {"heads": 2, "mlp_multiplier": multiplier},
            "memory": {"heads": heads, "hidden_multiplier": multiplier},
            "longterm": None if lasting is None else {"gate": lasting, "hidden_multiplier": 1.0},
            "cms": {"levels": [{"hidden_multiplier": m} for m in levels]},
            "spatial_mixing": mixing,
            "temporal_embeddings": tables,
        }
    )
    assert parameter_count(model) == built(model)


@pytest.mark.parametrize(
    ("block", "parameters"),
    [
        (lambda memory: hope_block(384, memory(3), (2, 2.5, 3)) + mixing_parameters(384, 258), 7_076_424),
        (lambda memory: hope_block(384, memory(4), (2, 2.5, 3)) + mixing_parameters(384, 258), 8_550_984),
        (lambda memory: attention_block(384, 4.0), 1_774_464),
        (lambda memory: unified_block(384, memory(2), (2, 2.5, 3)), 3_993_408),
        (lambda memory: longterm_parameters(384, 2, "input"), 590_977),
        (lambda memory: longterm_parameters(384, 2, "retrieval"), 591_361),
    ],
)
def test_blocks_of_published_size_have_their_number_of_parameters(
    block: Callable[[Callable[[float], int]], int], parameters: int
) -> None:
    assert block(lambda multiplier: memory_parameters(384, multiplier)) == parameters


def test_each_number_of_an_action_adds_its_column_to_three_encoders() -> None:
    two, seven = ({"action_dim": a, "state_dim": a, "extrinsics_dim": a - 1} for a in (2, 7))
    counts = [parameter_count(ModelConfig.model_validate(PHASE_5 | sizes)) for sizes in (two, seven)]
    assert counts[1] - counts[0] == 1152 * 5


def test_groups_of_parameters_have_their_published_sizes() -> None:
    with torch.device("meta"):
        named = dict(build_predictor(ModelConfig.model_validate(PHASE_5)).named_parameters())

    def numbers(*parts: str) -> int:
        return sum(p.numel() for name, p in named.items() if any(part in name for part in parts))

    titan, cms = numbers(".memory.w", ".memory.norm_"), numbers(".cms.")
    assert (titan, cms, numbers("") - titan - cms) == (29_510_400, 11_090_880, 2_953_000)
