from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.batch import ClipBatch
from hopescale.diagnostics import (
    labels,
    record_evaluation,
    record_flops,
    record_moves,
    record_pace,
    record_parameters,
    record_traces,
)
from hopescale.metrics.recorder import Recorder
from hopescale.model.flops import flops_executed
from hopescale.model.init import initialise
from hopescale.model.objective_schema import ObjectiveConfig
from hopescale.model.predictor import HopePredictor
from hopescale.model.schema import MEMORIES, ModelConfig
from hopescale.model.titan import MemoryTrace
from hopescale.optim.m3 import M3
from hopescale.optim.routing import parameter_groups
from hopescale.optim.schema import OptimizerConfig
from hopescale.parallel.gradients import dead_numbers

FRAMES, LENGTHS, WEIGHTS = 7, (7, 4, 7, 5), (1.0, 1.0, 0.0, 1.0)
SMALL: dict[str, Any] = {
    "encoder_dim": 6,
    "grid": (1, 3),
    "frames": FRAMES,
    "width": 24,
    "block_pattern": ("H", "S", "H"),
    "memory": {"heads": 2, "hidden_multiplier": 1.0, "surprise_gate": 0.11},
    "cms": {"levels": [{"period": 1, "hidden_multiplier": 1.0}, {"period": 3, "hidden_multiplier": 1.0}]},
    "attention": {"heads": 2, "mlp_multiplier": 1.0},
}


def model_config(**fields: Any) -> ModelConfig:
    return ModelConfig.model_validate(SMALL | fields)


def batch(rows: Sequence[int] = range(4)) -> ClipBatch:
    """Clips of several lengths, one of them without weight."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4, FRAMES, 3, 6, generator=generator)
    for clip, length in enumerate(LENGTHS):
        features[clip, length:] = 0
    return ClipBatch(
        features=features[list(rows)],
        actions=torch.randn(4, FRAMES - 1, 2, generator=generator)[list(rows)],
        states=None,
        lengths=torch.tensor(LENGTHS)[list(rows)],
        weights=torch.tensor(WEIGHTS)[list(rows)],
        positions=torch.arange(len(rows)),
        keys=[str(row) for row in rows],
        partitions=["base"] * len(rows),
    )


def traces_of(config: ModelConfig, clips: ClipBatch, **options: Any) -> tuple[MemoryTrace, ...]:
    model = HopePredictor(config)
    initialise(model, 0)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        return model(clips.features[:, :-1], clips.actions, **options).traces


def recorder_for(config: ModelConfig, groups: Sequence[str] = (), **options: Any) -> Recorder:
    arguments = {"rank": 0, "world_size": 1, "all_reduce": None, "rank_file": None} | options
    return Recorder([], labels={"group": groups, **labels(config)}, **arguments)


def figures(recorder: Recorder) -> dict[str, float]:
    published = recorder.flush(1)
    return {key: value for key, value in published.items() if key != "last_step_timestamp_seconds"}


def recorded(config: ModelConfig, clips: ClipBatch, traces: Sequence[MemoryTrace]) -> dict[str, float]:
    recorder = recorder_for(config)
    record_traces(recorder, traces, clips, config)
    return figures(recorder)


def counted(clips: ClipBatch, writes: int, chunk_size: int) -> list[tuple[int, int]]:
    """Clip and number of every write whose first frame a true frame follows."""
    return [
        (clip, write)
        for clip in range(len(clips.lengths))
        for write in range(writes)
        if clips.weights[clip] and write * chunk_size + 1 < clips.lengths[clip]
    ]


def expected_figures(config: ModelConfig, clips: ClipBatch, traces: Sequence[MemoryTrace]) -> dict[str, float]:
    """What `record_traces` must publish, number by number."""
    size, writes = config.memory.chunk_size, traces[0].surprise.shape[1]
    places = counted(clips, writes, size)
    named = {
        "memory_surprise": "surprise",
        "memory_retention": "retention",
        "memory_step_size": "step_size",
        "memory_step_size_p99": "step_size_p99",
        "memory_gate_rate": "gate",
    }
    found = {
        key: fmean([float(getattr(t, name)[place]) for t in traces for place in places]) for key, name in named.items()
    }
    for write in sorted({write for _, write in places}):
        of_write = [float(t.surprise[clip, w]) for t in traces for clip, w in places if w == write]
        found[f"memory_surprise_{write * size}"] = fmean(of_write)
    clips_seen = sorted({clip for clip, _ in places})
    found["memory_retention_min"] = fmean(
        [min(float(t.retention_min[c, w]) for t in traces for c, w in places if c == clip) for clip in clips_seen]
    )
    whole = [clip for clip, write in places if write == writes - 1]
    for number, memory in enumerate(MEMORIES):
        for key, name in {"memory_fast_norm_ratio": "norm_ratio", "memory_drift": "drift"}.items():
            found[f"{key}_{memory}"] = fmean([float(getattr(t, name)[clip, number]) for t in traces for clip in whole])
        happened = [(t, place) for t in traces for place in places if t.write_ratio[place][number] > 0]
        for key, name in {"memory_write_ratio": "write_ratio", "memory_limited_ratio": "limited"}.items():
            if memory in config.memory.self_modify:
                found[f"{key}_{memory}"] = fmean([float(getattr(t, name)[place][number]) for t, place in happened])
    for level, period in enumerate(config.cms.frame_periods):
        touched = [place for place in counted(clips, FRAMES - 1, 1) if place[1] % period == 0]
        found[f"cms_output_ratio_{level}"] = fmean(
            [float(t.level_ratio[place][level]) for t in traces for place in touched]
        )
    return found


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("names", [list(MEMORIES), ["key", "main"]])
def test_figures_are_means_over_true_frames_of_clips_that_count(chunk_size: int, names: list[str]) -> None:
    config = model_config(memory=SMALL["memory"] | {"chunk_size": chunk_size, "self_modify": names})
    clips = batch()
    traces = traces_of(config, clips)
    found, expected = recorded(config, clips, traces), expected_figures(config, clips, traces)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-5)
    assert 0 < found["memory_gate_rate"] < 1


def test_what_a_padded_clip_or_one_without_weight_writes_changes_nothing() -> None:
    config, clips = model_config(), batch()
    traces = traces_of(config, clips)
    spoilt = [
        trace._replace(
            surprise=trace.surprise.index_put((torch.tensor([2]),), torch.tensor(torch.nan)),
            retention_min=trace.retention_min.index_put((torch.tensor([1]), torch.tensor([4])), torch.tensor(-1.0)),
            drift=trace.drift.index_put((torch.tensor([1]),), torch.tensor(torch.inf)),
            level_ratio=trace.level_ratio.index_put((torch.tensor([3]), torch.tensor([5])), torch.tensor(1e9)),
        )
        for trace in traces
    ]
    assert recorded(config, clips, spoilt) == recorded(config, clips, traces)


@pytest.mark.parametrize("shares", [([0, 1], [2, 3]), ([0, 1, 3], [2]), ([0], [1, 2, 3])])
def test_ranks_with_shares_of_the_clips_publish_what_one_rank_does(shares: tuple[list[int], list[int]]) -> None:
    config, parts = model_config(), []
    whole = batch()
    traces = traces_of(config, whole)
    other = recorder_for(config, rank=1, world_size=2, all_reduce=lambda packed: parts.append(packed.clone()))
    first = recorder_for(config, world_size=2, all_reduce=lambda packed: packed.add_(parts[0]))
    for recorder, rows in ((first, shares[0]), (other, shares[1])):
        mine = [trace._make(None if f is None else f[rows] for f in cast(tuple[Any, ...], trace)) for trace in traces]
        record_traces(recorder, mine, batch(rows), config)
    other.flush(1)
    assert figures(first) == pytest.approx(recorded(config, whole, traces), rel=1e-6)


def test_a_model_without_memories_publishes_nothing() -> None:
    config = model_config(block_pattern=("S", "T"))
    traces = traces_of(config, batch())
    assert traces == ()
    assert recorded(config, batch(), traces) == {}


def test_a_pass_that_writes_nothing_publishes_no_figures_of_writes() -> None:
    config, clips = model_config(), batch()
    found = recorded(config, clips, traces_of(config, clips, writes=False))
    assert found.keys() == {"cms_output_ratio_0", "cms_output_ratio_1"}
    bare = model_config(cms={"levels": []})
    assert recorded(bare, clips, traces_of(bare, clips, writes=False)) == {}


@pytest.mark.parametrize("fields", [{}, {"cms": {"mode": "online"}, "memory": {"hidden_multiplier": 1.0}}])
def test_the_gate_of_long_term_memories_is_a_mean_over_true_frames(fields: dict[str, Any]) -> None:
    config = model_config(block_pattern=("H", "U"), longterm={"hidden_multiplier": 1.0}, **fields)
    clips = batch()
    traces = traces_of(config, clips)
    gates = [
        float(trace.longterm_gate[clip, frame, 0])
        for trace in traces
        for clip, frame in counted(clips, traces[0].longterm_gate.shape[1], 1)
    ]
    assert 0 < min(gates) < max(gates) < 1
    assert recorded(config, clips, traces)["memory_longterm_gate"] == pytest.approx(fmean(gates))


def test_blocks_with_one_memory_count_as_main() -> None:
    config, clips = model_config(block_pattern=("H", "U")), batch()
    five, one = traces_of(config, clips)
    assert (five.drift.shape[1], one.drift.shape[1]) == (5, 1)
    found = recorded(config, clips, [five, one])
    assert found["memory_drift_key"] == pytest.approx(recorded(config, clips, [five])["memory_drift_key"])
    alone = [recorded(config, clips, [trace])["memory_drift_main"] for trace in (five, one)]
    assert found["memory_drift_main"] == pytest.approx(fmean(alone))


def test_a_long_clip_names_its_first_writes_only() -> None:
    config = model_config(frames=100, memory={"hidden_multiplier": 1.0, "chunk_size": 1})
    assert labels(config)["frame"] == [str(frame) for frame in range(64)]
    trace = traces_of(model_config(), batch())[0]
    long = trace._replace(
        **{name: getattr(trace, name)[:, :1].repeat_interleave(98, dim=1) for name in ("surprise", "write_ratio")},
        **{name: trace.retention[:, :1].repeat_interleave(98, dim=1) for name in ("retention", "retention_min")},
        **{name: trace.gate[:, :1].repeat_interleave(98, dim=1) for name in ("step_size", "step_size_p99", "gate")},
        limited=trace.limited[:, :1].repeat_interleave(98, dim=1),
        level_ratio=trace.level_ratio[:, :1].repeat_interleave(99, dim=1),
    )
    clips = batch()
    clips.lengths.fill_(100)
    found = recorded(config, clips, [long])
    frames = [key for key in found if key.startswith("memory_surprise_")]
    assert frames == [f"memory_surprise_{frame}" for frame in range(64)]
    assert found["memory_surprise"] == pytest.approx(found["memory_surprise_0"])


def optimizer(groups: dict[str, list[Tensor]], **settings: Any) -> M3:
    config = OptimizerConfig()
    made = [
        {
            "name": name,
            "params": [nn.Parameter(p) for p in params],
            "lr": 0.1,
            "weight_decay": 0.5,
            "algorithm": "adamw",
        }
        for name, params in groups.items()
    ]
    return M3([group | settings for group in made], config)


def test_parameters_are_measured_by_group_and_together() -> None:
    held = optimizer({"a": [torch.tensor([3.0, 0.0]), torch.tensor([4.0])], "b": [torch.tensor([[12.0]])]})
    first, second = held.param_groups
    first["params"][0].grad = torch.tensor([0.0, 1e-30])
    second["params"][0].grad = torch.tensor([[-0.0]])
    recorder = recorder_for(model_config(), ("a", "b"))
    record_parameters(recorder, held.param_groups, dead_numbers(held.param_groups), 1)
    assert figures(recorder) == pytest.approx(
        {
            "param_norm_a": 5.0,
            "param_norm_b": 12.0,
            "param_norm": 13.0,
            "dead_fraction_a": 2 / 3,
            "dead_fraction_b": 1.0,
            "dead_fraction": 3 / 4,
        }
    )


def test_shards_of_parameters_publish_what_the_whole_does() -> None:
    whole = {"a": torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), "b": torch.arange(4.0)}
    gradients = {name: torch.where(p > 0.3, p, 0.0) for name, p in whole.items()}

    def stepped(part: slice) -> M3:
        held = optimizer({name: [p[part].clone()] for name, p in whole.items()})
        for group in held.param_groups:
            group["params"][0].grad = gradients[group["name"]][part].clone()
        held.step(report_in=0)
        return held

    def record(recorder: Recorder, held: M3, world_size: int) -> None:
        record_parameters(recorder, held.param_groups, dead_numbers(held.param_groups), world_size)
        record_moves(recorder, held.param_groups, held.moved)

    alone, parts = recorder_for(model_config(), ("a", "b")), []
    record(alone, stepped(slice(None)), 1)
    other = recorder_for(
        model_config(), ("a", "b"), rank=1, world_size=2, all_reduce=lambda packed: parts.append(packed.clone())
    )
    first = recorder_for(model_config(), ("a", "b"), world_size=2, all_reduce=lambda packed: packed.add_(parts[0]))
    record(other, stepped(slice(3, None)), 2)
    record(first, stepped(slice(0, 3)), 2)
    other.flush(1)
    published = figures(first)
    assert published == pytest.approx(figures(alone), rel=1e-6)
    assert published["update_ratio_a"] > 0


def test_groups_that_were_not_measured_publish_no_move() -> None:
    held = optimizer({"a": [torch.ones(3)], "b": [torch.ones(2)]})
    held.param_groups[0]["params"][0].grad = torch.ones(3)
    recorder = recorder_for(model_config(), ("a", "b"))
    held.step()
    record_moves(recorder, held.param_groups, held.moved)
    assert figures(recorder) == {}
    held.step(report_in=0)
    record_moves(recorder, held.param_groups, held.moved)
    assert figures(recorder).keys() == {"update_ratio_a"}


@pytest.mark.parametrize(
    ("mode", "frames", "steps"),
    [("frame_mask", [6, 2], [7, 7]), ("param_period", [6, 6], [7, 2]), ("online", [6, 6], [7, 7])],
)
def test_pace_of_levels_by_mode(mode: str, frames: list[int], steps: list[int]) -> None:
    config = model_config(cms=SMALL["cms"] | {"mode": mode})
    model = HopePredictor(config)
    groups = parameter_groups(model.named_parameters(), OptimizerConfig(), config.cms.parameter_periods)
    for group in groups:
        group["num_steps"] = 7
    recorder = recorder_for(config)
    record_pace(recorder, groups, config, FRAMES)
    assert figures(recorder) == {
        "cms_active_frames_0": frames[0],
        "cms_active_frames_1": frames[1],
        "cms_parameter_steps_total_0": steps[0],
        "cms_parameter_steps_total_1": steps[1],
    }


def test_a_model_without_levels_has_no_pace() -> None:
    config = model_config(block_pattern=("S",))
    groups = parameter_groups(HopePredictor(config).named_parameters(), OptimizerConfig())
    recorder = recorder_for(config)
    record_pace(recorder, [group | {"num_steps": 1} for group in groups], config, FRAMES)
    assert figures(recorder) == {}


def test_flops_are_those_of_a_clip_times_clips() -> None:
    config, objective = model_config(), ObjectiveConfig()
    recorder = recorder_for(config)
    record_flops(recorder, 2.5, config, objective, FRAMES, "block")
    each = flops_executed(config, objective, FRAMES, "block").total
    assert figures(recorder) == {"flops_per_second": 2.5 * each}
    assert each > flops_executed(config, objective, FRAMES, "none").total > 0


def test_evaluation_scores_reach_the_record_and_missing_ones_do_not() -> None:
    recorder = recorder_for(model_config())
    record_evaluation(
        recorder,
        {"skill_one_step": 0.25, "skill_far": -0.5, "skill_jump": None, "action_sensitivity": 0.125, "other": 1.0},
    )
    assert recorder.flush(1, "eval") == {
        "skill_one_step": 0.25,
        "identity_ratio_one_step": 0.75,
        "skill_far": -0.5,
        "identity_ratio_far": 1.5,
        "action_sensitivity": 0.125,
    }
    record_evaluation(recorder, {"skill_one_step": 0.5})
    assert recorder.flush(2, "eval") == {"skill_one_step": 0.5, "identity_ratio_one_step": 0.5}
