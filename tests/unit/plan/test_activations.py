from __future__ import annotations

from typing import Any

import pytest
import torch

from hopescale.model.build import build_predictor
from hopescale.model.flops import Recompute
from hopescale.model.init import initialise
from hopescale.model.objective import clip_losses
from hopescale.model.objective_schema import ObjectiveConfig
from hopescale.model.schema import ModelConfig
from hopescale.parallel.activation_checkpointing import recompute_blocks
from hopescale.plan.activations import clip_bytes, fast_state
from tests.ledger import Ledger

SMALL: dict[str, Any] = {
    "encoder_dim": 64,
    "grid": (4, 8),
    "frames": 7,
    "action_dim": 2,
    "width": 48,
    "block_pattern": ("H", "H"),
    "memory": {"heads": 1, "hidden_multiplier": 2.0},
    "cms": {"levels": [{"period": p, "hidden_multiplier": 2.0} for p in (1, 3)]},
    "attention": {"heads": 2, "mlp_multiplier": 4.0},
    "drop_path": 0.0,
}
TEACHER = {"jump_weight": 0.0}


def settings(**fields: Any) -> ModelConfig:
    """The small model; the section `memory` is merged."""
    merged = {name: {**SMALL[name], **value} if name == "memory" else value for name, value in fields.items()}
    return ModelConfig.model_validate(SMALL | merged)


def most_alive(
    model: ModelConfig, objective: ObjectiveConfig, recompute: Recompute, precision: str
) -> dict[str, float]:
    """Most bytes of a clip that are alive in forward and backward, by category; parameters apart."""
    predictor, batch, last = build_predictor(model), 4, model.frames - 1
    initialise(predictor, 0)
    recompute_blocks(list(predictor.blocks), recompute)
    ledger = Ledger((p.shape for p in predictor.parameters()), parameters=predictor.parameters())
    features = torch.randn(batch, model.frames, model.num_patches, model.encoder_dim)
    actions = torch.randn(batch, last, model.action_dim)
    with ledger.watching():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            losses = clip_losses(
                predictor,
                objective,
                features,
                actions,
                None,
                torch.full((batch,), model.frames),
                torch.ones(batch),
                torch.full((batch,), last),
                None,
                consolidate=model.longterm is not None,
            )
        (losses.teacher.sum() + losses.jump.sum() + losses.rollout.sum() + losses.auxiliary.sum()).backward()
    # Autocast's copies of parameters are of a model, not of a clip.
    copies = 2 * sum(p.numel() for p in predictor.parameters() if p.ndim > 1) if precision == "bf16" else 0
    activations = ledger.peaks("activations")["total"] - copies
    return {
        "fast_weights": ledger.peaks()["fast_state"] / batch if ledger.peaks().get("fast_state") else 0.0,
        "activations": activations / batch,
        "together": (ledger.peaks("activations", "fast_state")["total"] - copies) / batch,
    }


@pytest.mark.parametrize(
    ("fields", "branches", "precision"),
    [
        ({}, {}, "fp32"),
        ({}, {}, "bf16"),
        ({"spatial_mixing": True, "memory": {"heads": 4}}, TEACHER, "fp32"),
        ({"memory": {"chunk_size": 2}}, TEACHER, "fp32"),
        ({"memory": {"self_modify": ["main"]}}, TEACHER, "fp32"),
        ({"memory": {"self_modify": []}}, TEACHER, "fp32"),
        ({"memory": {"self_modify": ["main"]}}, {**TEACHER, "auxiliary_weight": 0.1}, "fp32"),
        ({"block_pattern": ("U", "U")}, {**TEACHER, "auxiliary_weight": 0.1}, "bf16"),
        ({"memory": {"momentum": 0.5}}, TEACHER, "fp32"),
        ({"memory": {"chunk_rule": "token_exact"}}, TEACHER, "fp32"),
        ({"memory": {"chunk_rule": "scan"}}, TEACHER, "fp32"),
        ({}, {"teacher_weight": 0.0, "rollout": {"weight": 1.0, "context": 2, "steps": 4}}, "fp32"),
        ({"block_pattern": ("S", "H", "T", "S")}, TEACHER, "fp32"),
        ({"block_pattern": ("S", "T")}, TEACHER, "bf16"),
        ({"block_pattern": ("U", "U")}, TEACHER, "fp32"),
        ({"block_pattern": ("U", "H"), "longterm": {"hidden_multiplier": 1.0}}, TEACHER, "fp32"),
    ],
    ids=str,
)
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_the_most_that_is_alive_is_foreseen(
    fields: dict[str, Any], branches: dict[str, Any], precision: str, recompute: Recompute
) -> None:
    model, objective = settings(**fields), ObjectiveConfig.model_validate(branches)
    found = clip_bytes(model, objective, model.frames, recompute, precision)
    seen = most_alive(model, objective, recompute, precision)
    memory = model.memory
    rough = memory.momentum or memory.chunk_rule == "scan" or objective.rollout.weight or precision == "bf16"
    for what, size in seen.items():
        assert getattr(found, what) == pytest.approx(size, rel=0.25 if rough else 0.1), what


@pytest.mark.parametrize("pattern", [("H", "H", "H"), ("S", "T", "S")])
def test_recomputed_blocks_keep_their_inputs_and_one_block_at_a_time(pattern: tuple[str, ...]) -> None:
    objective = ObjectiveConfig.model_validate(TEACHER)
    few, many = (settings(block_pattern=pattern * times) for times in (1, 3))
    sizes = [clip_bytes(model, objective, 7, "block", "fp32") for model in (few, many)]
    assert sizes[0].block_input == 6 * 33 * 48 * 4
    assert sizes[1].together - sizes[0].together == 2 * len(pattern) * sizes[0].block_input


def test_recomputed_chunks_keep_the_memories_they_leave() -> None:
    model, objective = settings(block_pattern=("H", "H")), ObjectiveConfig.model_validate(TEACHER)
    found = {r: clip_bytes(model, objective, 7, r, "fp32").together for r in ("none", "chunk")}
    assert found["chunk"] < found["none"]
    # Four whole writes and one into the main memory alone, in both blocks; then one chunk's activations at a time.
    states = 2 * (4 + 1 / 5) * fast_state(model, "H")
    ends_and_streams = clip_bytes(settings(memory={"self_modify": []}), objective, 7, "none", "fp32").together
    assert states < found["chunk"] < states + ends_and_streams + 0.2 * found["none"]


def test_a_set_of_fast_weights_has_its_published_size() -> None:
    five = ModelConfig.model_validate({"block_pattern": ["H"] * 5})
    wide = ModelConfig.model_validate({"width": 1536, "block_pattern": ["H"], "memory": {"hidden_multiplier": 2.0}})
    heads = five.model_copy(update={"memory": five.memory.model_copy(update={"heads": 4})})
    assert (fast_state(five, "H"), fast_state(wide, "H"), fast_state(heads, "H")) == (
        22.5 * 2**20,
        180 * 2**20,
        22.5 * 2**20 / 4,
    )
    assert fast_state(five, "S") == 0
    assert clip_bytes(five, ObjectiveConfig(), 8, "none", "fp32").fast_state == 5 * 22.5 * 2**20
