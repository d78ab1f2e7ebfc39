from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.pixels.simulate import PARTITIONS, SimulationSpec, simulate, simulate_clip

pytest.importorskip("pymunk")
pytest.importorskip("PIL")
SMALL = SimulationSpec(num_train=2, num_heldout=1, size=32, seed=4)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    first = simulate(SMALL, tmp_path / "a")
    second = simulate(SMALL, tmp_path / "b")
    assert first == second
    assert _files(tmp_path / "a") == _files(tmp_path / "b")
    other = simulate(SimulationSpec(num_train=2, num_heldout=1, size=32, seed=5), tmp_path / "c")
    assert other["digest"] != first["digest"]


def test_every_clip_differs_across_splits_and_indices(tmp_path: Path) -> None:
    document = simulate(SMALL, tmp_path / "a")
    assert len({clip["sha256"] for clip in document["clips"]}) == len(document["clips"]) == 6 * 3
    assert len({clip["key"] for clip in document["clips"]}) == 6 * 3


def test_a_clip_does_not_depend_on_how_many_others_are_made() -> None:
    one = simulate_clip(SimulationSpec(num_train=1, size=32), "base", "train", 0)
    two = simulate_clip(SimulationSpec(num_train=9, num_heldout=3, size=32), "base", "train", 0)
    np.testing.assert_array_equal(one["frames"], two["frames"])


@pytest.mark.parametrize("partition", PARTITIONS)
def test_shapes_and_one_push(partition: str) -> None:
    clip = simulate_clip(SimulationSpec(), partition, "heldout", 3)
    assert clip["frames"].shape == (8, 128, 128, 3)
    assert clip["frames"].dtype == np.uint8
    assert clip["actions"].shape == (7, 2)
    assert clip["truth"].shape == (8, 9)
    assert 0.05 < np.linalg.norm(clip["actions"][0]) < 1.5
    assert not clip["actions"][1:].any()
    assert (clip["frames"][1] != clip["frames"][0]).any()


def test_friction_slows_the_block_evenly_and_ice_hardly() -> None:
    def speeds(partition: str) -> np.ndarray:
        truth = simulate_clip(SimulationSpec(size=32), partition, "train", 1)["truth"]
        return np.linalg.norm(truth[1:4, 3:5], axis=1)

    table, ice = speeds("base"), speeds("dissipation")
    np.testing.assert_allclose(table[0] - table[1], table[1] - table[2], rtol=0.05)
    assert (table[0] - table[1]) > 3 * (ice[0] - ice[1]) > 0


def test_an_off_centre_push_turns_the_block() -> None:
    angles = simulate_clip(SimulationSpec(size=32), "kinematics", "train", 0)["truth"][:, 2]
    assert abs(angles[-1] - angles[0]) > 0.2


def test_bad_settings_are_all_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        simulate(SimulationSpec(partitions=("bse",), frames=1, size=100), tmp_path / "x")
    text = str(caught.value)
    assert "did you mean base?" in text
    assert "frames=1" in text
    assert "size=100" in text
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(DataError, match="new or empty"):
        simulate(SMALL, tmp_path / "full")
