from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_pipeline.batch import Clip, ClipBatch, collate
from data_pipeline.reader.clips import ClipReader
from hopescale.evaluate import Errors, held_out_errors, rollout, summarise, surprise_by_frame
from hopescale.model.init import initialise
from hopescale.model.objective import distance
from hopescale.model.predictor import HopePredictor, Prediction, normalise
from hopescale.model.schema import ModelConfig

CPU = torch.device("cpu")
FRAMES, PATCHES, CHANNELS = 4, 2, 6
PARTITIONS = ["a", "b", "a", "b", "a", "c"]


class InMemory:
    """Held-out clips without a data set on disk; action 0 of a clip tells its row."""

    def __init__(self, partitions: Sequence[str] = PARTITIONS, lengths: Sequence[int] | None = None) -> None:
        self.partitions, self.num_clips = list(partitions), len(partitions)
        generator = torch.Generator().manual_seed(0)
        self.clips = [
            Clip(
                key=str(row),
                partition=partition,
                features=torch.randn(length, PATCHES, CHANNELS, generator=generator),
                actions=torch.cat(
                    [torch.full((length - 1, 1), float(row)), torch.randn(length - 1, 1, generator=generator)], dim=1
                ),
            )
            for row, (partition, length) in enumerate(
                zip(partitions, lengths or [FRAMES] * len(partitions), strict=True)
            )
        ]

    def read(self, rows: np.ndarray, positions: np.ndarray | None = None) -> ClipBatch:
        del positions
        return collate([self.clips[row] for row in rows], FRAMES, rows)

    def read_actions(self, rows: np.ndarray) -> Tensor:
        return self.read(rows).actions

    def mean_frame(self) -> Tensor:
        return torch.linspace(-1, 1, PATCHES * CHANNELS).view(PATCHES, CHANNELS)


class Scripted(nn.Module):
    """Predicts its newest frame plus `shift` x its action, and remembers what it was asked."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = shift
        self.asked: list[dict[str, Any]] = []

    def forward(self, features: Tensor, actions: Tensor, states: Tensor | None = None, **options: Any) -> Prediction:
        del states
        self.asked.append({"features": features, "actions": actions, **options})
        pattern = torch.arange(CHANNELS) % 2
        moved = normalise(features) + self.shift * actions[..., 1, None, None] * pattern
        calls = options.get("state") or (0,)
        state = (calls[0] + 1,) if options.get("keep_state") else None
        return Prediction(normalise(moved), cast(Any, state), ())


def predictor(**memory: Any) -> HopePredictor:
    config = {
        "encoder_dim": CHANNELS,
        "grid": (1, PATCHES),
        "frames": FRAMES,
        "width": 12,
        "block_pattern": ("S", "H"),
        "memory": {"hidden_multiplier": 1.0, **memory},
        "cms": {"levels": [{"period": 2, "hidden_multiplier": 1.0}]},
        "attention": {"heads": 2, "mlp_multiplier": 1.0},
    }
    model = HopePredictor(ModelConfig.model_validate(config))
    initialise(model, 0)
    with torch.no_grad():
        model.project.weight.mul_(20)
    return model


def measure(model: nn.Module, reader: InMemory, **options: Any) -> Errors:
    return held_out_errors(model, cast(ClipReader, reader), jump_horizons=2, device=CPU, **options)


def errors_by_hand() -> Errors:
    errors = Errors(2)
    every = torch.ones(3, 2, dtype=torch.bool)
    valid = torch.tensor([[True, True], [True, True], [True, False]])
    partitions = torch.tensor([0, 1, 0])
    errors.add("model", torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, float("nan")]]), valid, partitions)
    errors.add("baseline", torch.tensor([[2.0, 4.0], [3.0, 8.0], [10.0, 99.0]]), valid, partitions)
    errors.add("other", torch.full((3, 2), 2.0), every, partitions)
    return errors


def test_errors_add_up_by_partition_and_horizon() -> None:
    errors = errors_by_hand()
    assert errors.sums["model"].tolist() == [[6.0, 2.0], [3.0, 4.0]]
    assert errors.counts["model"].tolist() == [[2.0, 1.0], [1.0, 1.0]]
    assert errors.mean("model").tolist() == [[3.0, 2.0], [3.0, 4.0]]
    assert errors.sums["model"].dtype == torch.float64


def test_skill_divides_sums_and_not_errors() -> None:
    errors = errors_by_hand()
    assert errors.skill("model", "baseline", slice(None)).tolist() == pytest.approx([1 - 8 / 16, 1 - 7 / 11])
    assert errors.skill("model", "baseline", slice(-1, None)).tolist() == pytest.approx([1 - 2 / 4, 1 - 4 / 8])
    assert errors.ratio("baseline", "model", slice(None)).tolist() == pytest.approx([2.0, 11 / 7])


def test_ranks_add_up_in_one_reduction() -> None:
    calls: list[int] = []

    def like_three_equal_ranks(packed: Tensor) -> None:
        calls.append(packed.numel())
        packed.mul_(3)

    errors = errors_by_hand()
    total = errors.over_ranks(like_three_equal_ranks)
    assert calls == [3 * 2 * 4]
    for name in errors.sums:
        assert torch.equal(total.sums[name], 3 * errors.sums[name])
        assert torch.equal(total.counts[name], 3 * errors.counts[name])
    assert errors.sums["model"].tolist() == [[6.0, 2.0], [3.0, 4.0]]


def test_repeating_the_last_frame_has_no_skill() -> None:
    summary = summarise(measure(Scripted(), InMemory(), context=2), ["a", "b", "c"])
    for name in ("skill_one_step", "skill_far", "skill_jump", "skill_context"):
        assert summary[name] == pytest.approx(0, abs=1e-5)
        assert summary["partitions"]["b"][name] == pytest.approx(0, abs=1e-5)
    assert "shuffled_ratio_far" not in summary


def test_errors_equal_those_of_each_clip_alone() -> None:
    model, reader = predictor(), InMemory(lengths=[4, 3, 4, 4, 2, 3])
    errors = measure(model, reader, batch_size=4)
    expected = {name: torch.zeros(3, 3, dtype=torch.float64) for name in ("one_step", "copy_last", "mean_frame")}
    counts = torch.zeros(3, 3, dtype=torch.float64)
    for clip in reader.clips:
        truth, part = normalise(clip.features), "abc".index(clip.partition)
        with torch.no_grad():
            predicted = model(clip.features[None, :-1], clip.actions[None]).frames[0]
        for t in range(len(truth) - 1):
            counts[part, t] += 1
            pairs = {"one_step": predicted[t], "copy_last": truth[0], "mean_frame": reader.mean_frame()}
            for name, guess in pairs.items():
                expected[name][part, t] += distance(guess, truth[t + 1], "l1")
    for name, total in expected.items():
        torch.testing.assert_close(errors.sums[name], total, rtol=1e-5, atol=1e-6)
        assert torch.equal(errors.counts[name], counts)
    # Of four stored frames the last two are jumped to.
    assert torch.equal(errors.counts["jump"], counts[:, 1:])


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_shares_of_ranks_add_up_to_the_whole(world_size: int) -> None:
    model, reader = predictor(), InMemory()
    whole = measure(model, reader, ablations=True)
    shares = [
        measure(model, reader, batch_size=2, rank=rank, world_size=world_size, ablations=True)
        for rank in range(world_size)
    ]
    for name, expected in whole.sums.items():
        torch.testing.assert_close(sum(share.sums[name] for share in shares), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(cast(Tensor, sum(share.counts[name] for share in shares)), whole.counts[name])


@pytest.mark.parametrize("world_size", [1, 4, 5, 8])
def test_all_ranks_call_the_model_equally_often(world_size: int) -> None:
    calls = []
    for rank in range(world_size):
        model = Scripted()
        measure(model, InMemory(), batch_size=1, rank=rank, world_size=world_size, ablations=True)
        calls.append(len(model.asked))
    assert len(set(calls)) == 1


def test_actions_are_swapped_within_partitions_each_used_once() -> None:
    model, reader = Scripted(), InMemory()
    measure(model, reader, ablations=True)
    # Of the full passes the last is the one with swapped actions; clips come in rows, all in one batch.
    full = [asked["actions"] for asked in model.asked if asked["features"].shape[1] == FRAMES - 1]
    rows, partners = full[0][:, 0, 0].int().tolist(), full[-1][:, 0, 0].int().tolist()
    assert rows == list(range(6))
    assert [PARTITIONS[partner] for partner in partners] == PARTITIONS
    assert sorted(partners) == rows
    alone = PARTITIONS.index("c")
    assert [row for row in rows if partners[row] == row] == [alone]
    assert torch.equal(full[-1], torch.stack([reader.clips[partner].actions for partner in partners]))


def test_ablations_change_what_they_name_and_nothing_else() -> None:
    model = Scripted(shift=0.5)
    errors = measure(model, InMemory(), ablations=True)
    assert torch.equal(errors.sums["one_step_writes_off"], errors.sums["one_step"])
    assert torch.equal(errors.sums["rollout_writes_off"], errors.sums["rollout"])
    assert not torch.equal(errors.sums["one_step_shuffled"][:2], errors.sums["one_step"][:2])
    assert not torch.equal(errors.sums["rollout_shuffled"][:2], errors.sums["rollout"][:2])
    torch.testing.assert_close(errors.sums["one_step_shuffled"][2], errors.sums["one_step"][2])
    assert [asked.get("writes", True) for asked in model.asked].count(False) == FRAMES
    summary = summarise(errors, ["a", "b", "c"])
    assert summary["writes_off_ratio_one_step"] == pytest.approx(1)
    assert summary["partitions"]["c"]["shuffled_ratio_far"] == pytest.approx(1)
    assert summary["partitions"]["a"]["shuffled_ratio_far"] != pytest.approx(1, abs=1e-3)


def test_disabling_writes_changes_a_predictor_with_memory() -> None:
    errors = measure(predictor(), InMemory(), ablations=True)
    assert torch.equal(errors.sums["one_step_writes_off"][:, 0], errors.sums["one_step"][:, 0])
    assert not torch.equal(errors.sums["one_step_writes_off"][:, 1:], errors.sums["one_step"][:, 1:])


def test_rollout_sees_the_first_frame_then_its_own_predictions() -> None:
    model, clips = Scripted(shift=0.5), InMemory().read(np.arange(2))
    predicted = rollout(model, clips)
    assert predicted.shape == (2, FRAMES - 1, PATCHES, CHANNELS)
    assert torch.equal(model.asked[0]["features"], clips.features[:, :1])
    for t, asked in enumerate(model.asked):
        assert asked["frame_offset"] == t
        assert torch.equal(asked["actions"], clips.actions[:, t : t + 1])
        assert (asked["state"] is None) == (t == 0)
        if t:
            assert torch.equal(asked["features"], predicted[:, t - 1 : t])
            assert asked["state"] == (t,)
    assert [asked["keep_state"] for asked in model.asked] == [True, True, False], "nothing reads the last write"


def test_rollout_with_context_sees_all_true_frames_in_one_pass_and_nothing_true_after_them() -> None:
    model, clips = Scripted(shift=0.5), InMemory().read(np.arange(2))
    predicted = rollout(model, clips, context=2)
    assert predicted.shape == (2, FRAMES - 2, PATCHES, CHANNELS)
    first, then = model.asked
    assert torch.equal(first["features"], clips.features[:, :2])
    assert torch.equal(first["actions"], clips.actions[:, :2])
    assert torch.equal(then["features"], predicted[:, :1])
    assert torch.equal(then["actions"], clips.actions[:, 2:])
    assert (first["frame_offset"], then["frame_offset"], then["state"]) == (0, 2, (1,))
    assert [first["keep_state"], then["keep_state"]] == [True, False]


def test_a_rollout_from_a_later_frame_knows_nothing_of_the_frames_before() -> None:
    model, clips = predictor(), InMemory().read(np.arange(2))
    later = rollout(model, clips, first=1)
    assert later.shape == (2, FRAMES - 2, PATCHES, CHANNELS)
    clips.features[:, 0] += 1
    clips.actions[:, 0] += 1
    assert torch.equal(rollout(model, clips, first=1), later)
    assert not torch.equal(rollout(model, clips, context=2), later)


def test_context_errors_equal_those_of_each_clip_alone_where_it_is_long_enough() -> None:
    model, reader = predictor(), InMemory(lengths=[4, 3, 4, 4, 2, 3])
    errors = measure(model, reader, context=2, batch_size=4, ablations=True)
    names = ("context", "context_copy_last", "context_writes_off", "context_no_past")
    expected = {name: torch.zeros(3, 2, dtype=torch.float64) for name in names}
    counts = torch.zeros(3, 2, dtype=torch.float64)
    for row, clip in enumerate(reader.clips):
        truth, part = normalise(clip.features), "abc".index(clip.partition)
        whole = reader.read(np.array([row]))
        rollouts = {
            "context": rollout(model, whole, context=2)[0],
            "context_copy_last": truth[1:2].expand(2, -1, -1),
            "context_writes_off": rollout(model, whole, context=2, writes=False)[0],
            "context_no_past": rollout(model, whole, first=1)[0],
        }
        for frame in range(2, len(truth)):
            counts[part, frame - 2] += 1
            for name, predicted in rollouts.items():
                expected[name][part, frame - 2] += float(distance(predicted[frame - 2], truth[frame], "l1").detach())
    for name, total in expected.items():
        torch.testing.assert_close(errors.sums[name], total, rtol=1e-5, atol=1e-6)
        assert torch.equal(errors.counts[name], counts)
    summary = summarise(errors, ["a", "b", "c"])
    assert summary["partitions"]["c"]["skill_context"] == pytest.approx(
        1 - float(expected["context"][2].sum() / expected["context_copy_last"][2].sum()), rel=1e-5
    )
    assert summary["partitions"]["b"]["no_past_ratio_context"] == pytest.approx(
        float(expected["context_no_past"][1].sum() / expected["context"][1].sum()), rel=1e-5
    )


def test_clips_no_longer_than_the_context_leave_its_skill_undefined() -> None:
    summary = summarise(measure(predictor(), InMemory(), context=FRAMES, ablations=True), ["a", "b", "c"])
    assert summary["skill_context"] is None
    assert summary["skill_one_step"] is not None
    some = summarise(measure(predictor(), InMemory(lengths=[4, 2, 4, 2, 4, 4]), context=2), ["a", "b", "c"])
    assert some["partitions"]["b"]["skill_context"] is None
    assert some["partitions"]["a"]["skill_context"] is not None


def test_jumps_aim_at_each_of_the_last_frames() -> None:
    model = Scripted()
    measure(model, InMemory())
    targets = [asked["target"].tolist() for asked in model.asked if "target" in asked]
    assert targets == [[2] * 6, [3] * 6]


def test_a_model_that_cannot_jump_is_asked_for_none_and_has_no_skill_in_it() -> None:
    model, reader = Scripted(), InMemory()
    errors = held_out_errors(model, cast(ClipReader, reader), jump_horizons=0, device=CPU)
    assert not [asked for asked in model.asked if asked.get("target") is not None]
    result = summarise(errors, sorted(set(reader.partitions)))
    assert result["skill_jump"] is None
    assert result["skill_one_step"] is not None


def test_jumps_from_a_longer_context_are_measured_against_its_last_frame() -> None:
    model, reader = Scripted(), InMemory()
    errors = measure(model, reader, jump_context=2)
    jumps = [asked for asked in model.asked if "target" in asked]
    assert [asked["frame_offset"] for asked in jumps] == [1, 1]
    assert all(torch.equal(asked["features"], torch.stack([c.features[1:2] for c in reader.clips])) for asked in jumps)
    # One pass over the frames before it serves both targets.
    assert [asked["state"] for asked in jumps] == [(1,), (1,)]
    # What repeats the newest frame of the context is as good as the baseline.
    torch.testing.assert_close(errors.sums["jump"], errors.sums["jump_copy_last"], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(errors.sums["jump"], measure(model, reader).sums["jump"])


def test_the_top_level_is_the_mean_over_partitions() -> None:
    summary = summarise(measure(predictor(), InMemory(), context=2, ablations=True), ["a", "b", "c"])
    rows = summary["partitions"].values()
    names = summary.keys() - {"partitions", "baselines"}
    assert names == {
        f"{kind}_{span}"
        for kind, spans in {
            "skill": ("one_step", "far", "jump", "context"),
            "shuffled_ratio": ("one_step", "far"),
            "writes_off_ratio": ("one_step", "far", "context"),
            "no_past_ratio": ("context",),
        }.items()
        for span in spans
    } | {"action_sensitivity"}
    for name in names:
        assert summary[name] == pytest.approx(np.mean([row[name] for row in rows]))
    for name, value in summary["baselines"].items():
        assert value == pytest.approx(np.mean([row["baselines"][name] for row in rows]))


def test_evaluation_changes_nothing_and_repeats_itself() -> None:
    model, reader = predictor(), InMemory()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first, second = measure(model, reader, ablations=True), measure(model, reader, ablations=True)
    assert all(torch.equal(first.sums[name], second.sums[name]) for name in first.sums)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_surprise_has_a_row_for_each_block_with_memory() -> None:
    reader = cast(ClipReader, InMemory())
    surprise = surprise_by_frame(predictor(), reader, 1, CPU)
    assert surprise.shape == (1, FRAMES - 1)
    assert ((surprise > 0) & (surprise <= 2)).all()
    assert surprise_by_frame(Scripted(), reader, 1, CPU).shape == (0, FRAMES - 1)
    assert surprise_by_frame(predictor(self_modify=()), reader, 1, CPU).shape == (0, FRAMES - 1), "nothing is written"
