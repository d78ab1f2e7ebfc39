"""The probe for memories, judged by its own ground truth: what does one frame tell, and what do the first frames?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from data_pipeline.cache import content_key
from data_pipeline.pixels.simulate import (
    FULL_IMPULSE,
    HIDDEN_FRICTION,
    HIDDEN_MASS,
    PARTITIONS,
    SIMULATOR_VERSION,
    VIEW,
    SimulationSpec,
    simulate,
    simulate_clip,
)

pytest.importorskip("pymunk")
pytest.importorskip("PIL")

SPEC = SimulationSpec(partitions=("hidden",), size=32)
CONTEXT = 4
HIDDEN_PAUSE = 2
"""Transition without a push."""


class Clips(NamedTuple):
    """Positions [n, F, 2] in world units, pushes [n, F - 1, 2], mass and friction [n]."""

    positions: np.ndarray
    pushes: np.ndarray
    mass: np.ndarray
    friction: np.ndarray
    truth: np.ndarray

    @property
    def squares(self) -> np.ndarray:
        """Pushes of squared length: displacements are in proportion to them, [n, F - 1, 2]."""
        return self.pushes * np.linalg.norm(self.pushes, axis=-1, keepdims=True)


def made(split: str, count: int) -> Clips:
    clips = [simulate_clip(SPEC, "hidden", split, index) for index in range(count)]
    truth = np.stack([clip["truth"] for clip in clips]).astype(np.float64)
    pushes = np.stack([clip["actions"] for clip in clips]).astype(np.float64) * FULL_IMPULSE
    return Clips(truth[..., :2], pushes, truth[:, 0, 6], truth[:, 0, 7], truth)


@pytest.fixture(scope="module")
def train() -> Clips:
    return made("train", 300)


@pytest.fixture(scope="module")
def held_out() -> Clips:
    return made("heldout", 100)


def future(clips: Clips) -> np.ndarray:
    """Displacement of frames 4, 5, ... from frame 3, [n, F - 4, 2]."""
    return clips.positions[:, CONTEXT:] - clips.positions[:, CONTEXT - 1 : CONTEXT]


def miss(predicted: np.ndarray, clips: Clips) -> float:
    """Mean distance to the true position of frames 4, 5, ... in world units."""
    return float(np.linalg.norm(predicted - future(clips), axis=-1).mean())


def visible(clips: Clips) -> np.ndarray:
    """What frame 3, the velocity it was reached with, and the actions from there on tell, as regressors [n, k]."""
    newest, before = clips.positions[:, CONTEXT - 1], clips.positions[:, CONTEXT - 2]
    parts = [newest, newest - before, clips.pushes[:, CONTEXT - 1 :], clips.squares[:, CONTEXT - 1 :]]
    return np.concatenate([np.ones((len(newest), 1)), *(part.reshape(len(newest), -1) for part in parts)], axis=1)


def oracle(clips: Clips) -> np.ndarray:
    """Displacements after frame 3, by the mobility (displacement for a squared push) that frame 1 alone shows.

    It is one place, and one push: the one back, which comes with frame 1 and is as strong as the one out.
    """
    shown = np.linalg.norm(clips.positions[:, 1] - VIEW / 2, axis=-1)
    mobility = shown / np.square(clips.pushes[:, 1]).sum(-1)
    return mobility[:, None, None] * np.cumsum(clips.squares[:, CONTEXT - 1 :], axis=1)


def test_frame_3_and_its_velocity_leave_the_future_open_and_frame_1_alone_settles_it(
    train: Clips, held_out: Clips
) -> None:
    goal = future(train).reshape(len(train.mass), -1)
    weights = np.linalg.lstsq(visible(train), goal, rcond=None)[0]
    memoryless = miss((visible(held_out) @ weights).reshape(future(held_out).shape), held_out)
    nearest = np.linalg.norm(visible(held_out)[:, None] - visible(train)[None], axis=-1).argmin(1)
    neighbour = miss(future(train)[nearest], held_out)
    remembering = miss(oracle(held_out), held_out)
    copying = miss(np.zeros_like(future(held_out)), held_out)
    # World units; the block is 25 wide.
    assert copying == pytest.approx(8.4, abs=0.4)
    assert memoryless == pytest.approx(4.8, abs=0.4)
    assert neighbour > memoryless
    assert remembering < 0.05


def test_the_same_pushes_carry_blocks_of_the_range_very_differently(train: Clips) -> None:
    legs = np.linalg.norm(np.diff(train.positions, axis=1), axis=-1)
    pushed = np.delete(legs / np.linalg.norm(train.squares, axis=-1).clip(1e-9), HIDDEN_PAUSE, axis=1)
    low, high = np.quantile(pushed[:, 0], (0.05, 0.95))
    assert high / low > 8
    # A clip's own mobility is one number, whatever the push.
    np.testing.assert_allclose(pushed, pushed.mean(1, keepdims=True) * np.ones_like(pushed), rtol=0.03)


def test_the_block_rests_in_every_frame_and_stays_clear_of_the_rim(train: Clips) -> None:
    assert not train.truth[..., 3:6].any()
    assert not np.diff(train.truth[:, :, 2], axis=1).any()
    np.testing.assert_array_equal(
        train.positions[:, HIDDEN_PAUSE], train.positions[:, HIDDEN_PAUSE + 1], "no push between frames 2 and 3"
    )
    assert (np.delete(np.linalg.norm(train.pushes, axis=-1), HIDDEN_PAUSE, axis=1) > 0).all()
    # The block's half diagonal is 17.7, the rim 7 wide.
    assert ((train.positions > 25) & (train.positions < VIEW - 25)).all()


def test_every_block_starts_in_the_middle_and_is_back_there_before_what_is_to_be_foretold(train: Clips) -> None:
    assert (train.positions[:, 0] == VIEW / 2).all()
    np.testing.assert_allclose(train.positions[:, 2:CONTEXT], VIEW / 2, atol=0.05)
    np.testing.assert_array_equal(train.pushes[:, 1], -train.pushes[:, 0])


def test_pushes_do_not_tell_mass_or_friction(train: Clips) -> None:
    hidden = np.stack([1 / train.mass, 1 / train.friction], axis=1)
    for low, high, values in ((*HIDDEN_MASS, train.mass), (*HIDDEN_FRICTION, train.friction)):
        assert low <= values.min() < low + 0.1 * (high - low)
        assert high >= values.max() > high - 0.1 * (high - low)
    lengths = np.linalg.norm(np.delete(train.pushes, HIDDEN_PAUSE, axis=1), axis=-1)
    correlation = np.asarray(np.corrcoef(np.concatenate([hidden, lengths[:, 1:]], axis=1).T))[:2]
    assert abs(correlation[0, 1]) < 0.15
    # Of 10 correlations of 300 independent pairs the largest is below 0.17 with 97 %.
    assert np.abs(correlation[:, 2:]).max() < 0.17


def test_training_and_held_out_clips_are_different_blocks(train: Clips, held_out: Clips) -> None:
    assert len({*train.mass.tolist(), *held_out.mass.tolist()}) == len(train.mass) + len(held_out.mass)


def test_equal_seeds_give_equal_clips_and_the_colours_do_not_depend_on_the_hidden() -> None:
    first, second = (simulate_clip(SPEC, "hidden", "train", 5) for _ in range(2))
    other = simulate_clip(SPEC, "hidden", "train", 6)
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])
    # The block's own colour is the bluest there is; edges mix it with what lies beneath.
    bluest = [
        max(map(tuple, clip["frames"][0].reshape(-1, 3).tolist()), key=lambda c: c[2] - c[0]) for clip in (first, other)
    ]
    assert bluest[0] == bluest[1]


@pytest.mark.parametrize("frames", [2, 3, 4, 16, 32])
def test_clips_may_have_any_length(frames: int) -> None:
    clip = simulate_clip(SimulationSpec(partitions=("hidden",), size=32, frames=frames), "hidden", "train", 0)
    assert clip["frames"].shape[0] == frames
    moving = np.linalg.norm(np.diff(clip["truth"][:, :2], axis=0), axis=1) > 0
    assert moving.tolist() == [transition != HIDDEN_PAUSE for transition in range(frames - 1)]


def test_the_probe_comes_only_when_asked_for_and_changes_nothing_else(tmp_path: Path) -> None:
    assert "hidden" not in SimulationSpec().partitions == PARTITIONS
    # The key under which the demo's pixels lie in its cache, and the digest of a few of them.
    assert content_key("pixels", SIMULATOR_VERSION, SimulationSpec()) == "44a740e6497c"
    few = SimulationSpec(num_train=1, num_heldout=1, frames=16, size=64, seed=7)
    assert asdict(few)["partitions"] == PARTITIONS
    alone = simulate(few, tmp_path / "alone")
    beside = simulate(
        SimulationSpec((*PARTITIONS, "hidden"), num_train=1, num_heldout=1, frames=16, size=64, seed=7),
        tmp_path / "beside",
    )
    assert beside["clips"][: len(alone["clips"])] == alone["clips"]
    assert [clip["partition"] for clip in beside["clips"][len(alone["clips"]) :]] == ["hidden", "hidden"]
