from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from hopescale.model.build import build_predictor
from hopescale.model.flops import Flops, Recompute, ends, flops_executed, flops_reference
from hopescale.model.init import initialise
from hopescale.model.memory_flops import REFERENCE_BACKWARD, TOKEN_EXACT_BACKWARD, WRITE_BACKWARD
from hopescale.model.objective import clip_losses
from hopescale.model.objective_schema import ObjectiveConfig
from hopescale.model.passes import Pass, frame_by_frame, passes, rollout_passes
from hopescale.model.schema import CmsConfig, MemoryConfig, ModelConfig
from hopescale.parallel.activation_checkpointing import recompute_blocks

aten = torch.ops.aten

SMALL: dict[str, Any] = {
    "encoder_dim": 20,
    "grid": (2, 3),
    "frames": 7,
    "action_dim": 3,
    "state_dim": 2,
    "extrinsics_dim": 2,
    "width": 24,
    "block_pattern": ("S", "H", "T", "H"),
    "memory": {"heads": 2, "hidden_multiplier": 1.5},
    "cms": {"levels": [{"period": p, "hidden_multiplier": m} for p, m in ((1, 2.0), (2, 1.0), (3, 1.0))]},
    "attention": {"heads": 2, "mlp_multiplier": 2.0},
    "spatial_mixing": True,
    "drop_path": 0.0,
}
TEACHER = {"jump_weight": 0.0}
ALL = {"rollout": {"weight": 1.0, "context": 2, "steps": 4}}
RESETS = {**TEACHER, "rollout": {"weight": 1.0, "context": 1, "steps": 5, "memory": "reset_every", "reset_every": 2}}
LATE_JUMP = {"teacher_weight": 0.0, "jump_context": 3}
LASTING = {"hidden_multiplier": 1.0}


def attention_forward(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def attention_backward(
    gradient: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def triangular_solve(matrix: Any, columns: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return math.prod(columns) * matrix[-1]


# What PyTorch's counter does not know: attention on a CPU, and triangular systems.
UNKNOWN = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention_forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    aten.linalg_solve_triangular: triangular_solve,
}


def settings(**fields: Any) -> ModelConfig:
    """The small model; sections are merged."""
    merged = {name: {**SMALL[name], **value} if name in ("memory", "cms") else value for name, value in fields.items()}
    return ModelConfig.model_validate(SMALL | merged)


def counted(
    model: ModelConfig, objective: ObjectiveConfig, recompute: Recompute, batch: int = 2
) -> tuple[float, float]:
    """FLOPs of a clip that PyTorch's dispatcher sees, in forward and in backward."""
    predictor = build_predictor(model)
    initialise(predictor, 0)
    recompute_blocks(list(predictor.blocks), recompute)
    last = model.frames - 1

    def draw(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=torch.Generator().manual_seed(len(shape)))

    with FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter:
        losses = clip_losses(
            predictor,
            objective,
            draw(model.frames, model.num_patches, model.encoder_dim),
            draw(last, model.action_dim),
            draw(model.frames, model.state_dim) if model.state_dim else None,
            torch.full((batch,), model.frames),
            torch.ones(batch),
            torch.full((batch,), last),
            draw(len(model.block_pattern), 3) if model.drop_path else None,
            consolidate=model.longterm is not None,
        )
        forward = counter.get_total_flops()
        torch.stack([losses.teacher, losses.jump, losses.rollout, losses.auxiliary]).sum().backward()
    return forward / batch, (counter.get_total_flops() - forward) / batch


CASES: list[tuple[dict[str, Any], dict[str, Any], Recompute]] = [
    ({}, ALL, "none"),
    ({"drop_path": 0.2}, ALL, "block"),
    ({}, ALL, "chunk"),
    ({}, RESETS, "block"),
    ({}, LATE_JUMP, "block"),
    *[({"block_pattern": tuple(pattern)}, TEACHER, "block") for pattern in ("S", "TT", "HH", "UU", "THS")],
    ({"block_pattern": ("U", "H"), "longterm": LASTING}, ALL, "none"),
    ({"block_pattern": ("H", "U"), "longterm": {**LASTING, "gate": "retrieval"}}, LATE_JUMP, "chunk"),
    *[
        ({"block_pattern": ("H",), "memory": {"meta_grad": grad, "chunk_rule": rule}}, TEACHER, "none")
        for grad in get_args(MemoryConfig.model_fields["meta_grad"].annotation)
        for rule in get_args(MemoryConfig.model_fields["chunk_rule"].annotation)
    ],
    ({"memory": {"chunk_size": 4}}, ALL, "none"),
    *[({"block_pattern": ("U", "H")}, {**ALL, "auxiliary_weight": 0.1}, recompute) for recompute in ("none", "chunk")],
    *[
        ({"block_pattern": ("H", "U"), "memory": memory}, {**TEACHER, "auxiliary_weight": 0.1}, "block")
        for memory in ({"meta_grad": "straight_through"}, {"meta_grad": "fo", "chunk_rule": "scan"}, {"chunk_size": 2})
    ],
    ({"memory": {"self_modify": ["main"], "momentum": 0.5}}, ALL, "none"),
    ({"memory": {"self_modify": []}}, LATE_JUMP, "none"),
    *[({"memory": {"detach_interval": n, "detach_rule": "all", "meta_grad": "so"}}, ALL, "none") for n in (1, 2)],
    ({"memory": {"detach_interval": 1}}, TEACHER, "none"),
    ({"memory": {"scope": "batch"}, "block_pattern": ("H",)}, TEACHER, "none"),
    ({"cms": {"levels": []}, "spatial_mixing": False, "block_pattern": ("H", "H")}, ALL, "block"),
    ({"spatial_mixing": False, "block_pattern": ("H", "H")}, ALL, "block"),
    ({"cms": {"mode": "param_period"}}, TEACHER, "none"),
    ({"cms": {"mode": "online"}}, ALL, "block"),
    ({"state_dim": 0, "extrinsics_dim": 0, "temporal_embeddings": False}, TEACHER, "none"),
]


@pytest.mark.parametrize(("fields", "branches", "recompute"), CASES, ids=str)
def test_executed_flops_are_those_that_the_dispatcher_sees(
    fields: dict[str, Any], branches: dict[str, Any], recompute: Recompute
) -> None:
    model, objective = settings(**fields), ObjectiveConfig.model_validate(branches)
    forward, backward = counted(model, objective, recompute)
    found = flops_executed(model, objective, model.frames, recompute)
    assert found.forward == pytest.approx(forward, rel=0.01)
    assert found.backward + found.recomputed == pytest.approx(backward, rel=0.01)
    assert (found.recomputed > 0) == (recompute != "none")


def test_tables_have_every_way_of_differentiating_a_write() -> None:
    ways = set(get_args(MemoryConfig.model_fields["meta_grad"].annotation))
    assert set(WRITE_BACKWARD) == set(TOKEN_EXACT_BACKWARD) == set(REFERENCE_BACKWARD) == ways


def test_every_setting_of_memories_and_cms_is_accounted_for() -> None:
    """A new field: does it change how often a matrix is multiplied? Then count it, and name it here."""
    counted = {"heads", "hidden_multiplier", "chunk_size", "chunk_rule", "meta_grad", "preconditioner", "self_modify"}
    counted |= {"detach_interval", "detach_rule"}
    without_products = {"scope", "retention", "retention_bias", "momentum", "surprise_gate", "eta_max", "write_limit"}
    assert set(MemoryConfig.model_fields) == counted | without_products
    assert set(CmsConfig.model_fields) == {"mode", "levels", "online"}


def published(**memory: Any) -> ModelConfig:
    """Six H blocks of width 384, memories twice and CMS levels four times as wide, on 8 frames of 258 tokens."""
    return ModelConfig.model_validate(
        {
            "frames": 9,
            "state_dim": 2,
            "block_pattern": ["H"] * 6,
            "memory": {"hidden_multiplier": 2.0, **memory},
            "cms": {"levels": [{"hidden_multiplier": 4.0}] * 3},
        }
    )


def test_reference_flops_are_those_published_for_four_clips() -> None:
    teacher = ObjectiveConfig.model_validate(TEACHER)
    reading = flops_reference(published(), teacher, 9, writes=False)
    assert 4 * reading.forward == pytest.approx(684.9e9, rel=1e-3)
    # Trained with every write cut off from the outer gradient, and the main memory read once more for another loss.
    model = published(meta_grad="fo", detach_interval=1, detach_rule="all")
    read_again = 6 * 8 * 258 * 4 * 384 * 768
    assert 4 * (flops_reference(model, teacher, 9).total + read_again) == pytest.approx(2610.7e9, rel=1e-3)


@pytest.mark.parametrize(("meta_grad", "total"), [("fo", 0.775e12), ("fo_kv", 1.2544e12), ("so", 1.5207e12)])
def test_reference_flops_of_training_on_a_clip(meta_grad: str, total: float) -> None:
    model = ModelConfig.model_validate(
        {"state_dim": 2, "spatial_mixing": True, "block_pattern": ["H"] * 5, "memory": {"meta_grad": meta_grad}}
    )
    found = flops_reference(model, ObjectiveConfig.model_validate(TEACHER), 8)
    assert found.total - ends(model, Pass(7)).total == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("detach_interval", [0, 1, 2])
@pytest.mark.parametrize("branches", [TEACHER, {"jump_context": 3}], ids=str)
def test_the_earlier_predictor_differentiates_writes_to_first_order(
    branches: dict[str, Any], detach_interval: int
) -> None:
    # The same tokens in both: there is a state token in every earlier file, as long as the action's.
    same: dict[str, Any] = {"block_pattern": ("H",) * 5, "action_dim": 2, "state_dim": 2, "spatial_mixing": True}
    memory = {"detach_interval": detach_interval, "detach_rule": "all" if detach_interval else "keep_start"}
    earlier = {"compat": "ac_hope", "output": "absolute", "memory": {**memory, "scope": "batch"}}
    objective = ObjectiveConfig.model_validate(branches)
    found, first_order, full = (
        flops_reference(ModelConfig.model_validate({**same, **fields}), objective, 8)
        for fields in (earlier, {"memory": {**memory, "meta_grad": "fo"}}, {"memory": memory})
    )
    assert found == first_order
    # With a cut after every write none of them has a backward, to whatever order.
    assert (found.backward == full.backward) == (detach_interval == 1)


def test_what_is_executed_stays_below_the_reference_where_writes_are_dead() -> None:
    jump, model = ObjectiveConfig(teacher_weight=0.0), settings(block_pattern=("H",))
    assert flops_executed(model, jump, 7).total < 0.5 * flops_reference(model, jump, 7).total


def test_reference_flops_of_attention_are_those_of_the_frames_it_may_see() -> None:
    teacher = ObjectiveConfig.model_validate(TEACHER)
    first, both = (flops_reference(settings(block_pattern=(kind,)), teacher, 7).forward for kind in ("S", "T"))
    # Frames 0 .. 5 see 1 .. 6 frames, where within a frame each sees 1.
    assert both - first == (21 - 6) * 2 * 2 * 8 * 8 * 24


def test_heads_divide_the_products_of_memories() -> None:
    teacher = ObjectiveConfig.model_validate(TEACHER)

    def memory_part(heads: int) -> float:
        model = settings(block_pattern=("H",), memory={"heads": heads})
        bare = settings(block_pattern=("H",), memory={"heads": heads, "hidden_multiplier": 1.0})
        return flops_reference(model, teacher, 7).total - flops_reference(bare, teacher, 7).total

    assert memory_part(1) == pytest.approx(4 * memory_part(4))


def test_passes_follow_the_objective() -> None:
    objective = ObjectiveConfig.model_validate({"jump_context": 3, **ALL})
    assert passes(settings(), objective, 8) == [
        Pass(7),
        Pass(2, keep_state=True, scored=False),
        Pass(1, 2, (2,)),
        Pass(2, keep_state=True),
        Pass(1, 2, (2,), keep_state=True, fed_back=True),
        Pass(1, 3, (2, 1), keep_state=True, fed_back=True),
        Pass(1, 4, (2, 1, 1), fed_back=True),
    ]
    assert [call.carried for call in rollout_passes(1, 4, reset_every=2)] == [(), (1,), (), (1,)]
    assert frame_by_frame(Pass(2, 3, (3,))) == [Pass(1, 3, (3,), keep_state=True), Pass(1, 4, (3, 1))]


def test_flops_add_up() -> None:
    assert Flops(1, 2, 3) + Flops(10, 20, 30) == Flops(11, 22, 33)
    assert Flops(1, 2, 3).total == 6
