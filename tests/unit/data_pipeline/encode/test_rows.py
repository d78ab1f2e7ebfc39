from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.alignment import aligned, rows_needed
from data_pipeline.encode.rows import Timeline, common_alignment, stored_rows


def _rows(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.float32)[:, None].repeat(2, 1)


def _whole(frames: int, tubelet: int = 1) -> Timeline:
    return Timeline(np.arange(frames), frames, tubelet)


@given(st.integers(2, 20), st.integers(0, 1), st.booleans())
def test_one_action_a_pixel_frame_is_stored_raw_and_aligned_by_name(frames: int, extra: int, cut: bool) -> None:
    given = _rows(frames - 1 + extra + 3 * cut)
    timeline = Timeline(np.arange(frames), None if cut else frames, 1)
    stored, rule = stored_rows({"actions": given}, timeline, None)
    np.testing.assert_array_equal(stored["actions"], given[:frames])
    assert rule == ("as-is" if len(given) == frames - 1 else "first")
    np.testing.assert_array_equal(aligned(stored["actions"], rule, frames), given[: frames - 1])


@given(st.integers(4, 21), st.integers(0, 1))
def test_a_tubelet_of_two_takes_the_mean_of_its_two_actions(pixel_frames: int, extra: int) -> None:
    given, frames = _rows(pixel_frames - 1 + extra), pixel_frames // 2
    stored, rule = stored_rows({"actions": given}, _whole(pixel_frames, 2), None)
    assert rule == "pair-mean"
    np.testing.assert_array_equal(stored["actions"], given)
    # Rows 2t and 2t + 1 act from the first pixel frame of stored frame t to that of the next.
    expected = np.arange(frames - 1)[:, None].repeat(2, 1) * 2 + 0.5
    np.testing.assert_array_equal(aligned(stored["actions"], rule, frames), expected)


def test_actions_of_stored_frames_are_taken_as_such() -> None:
    for count, expected in ((3, "as-is"), (4, "first")):
        stored, rule = stored_rows({"actions": _rows(count)}, _whole(16, 4), None)
        assert rule == expected
        assert len(stored["actions"]) == count
    with pytest.raises(ValueError, match="no rule for 4 actions a stored frame: store 3 actions"):
        stored_rows({"actions": _rows(15)}, _whole(16, 4), None)


@given(st.integers(2, 12), st.integers(1, 3), st.integers(1, 4), st.data())
def test_states_and_extrinsics_are_those_of_the_first_pixel_frames(
    frames: int, tubelet: int, thinning: int, data: st.DataObject
) -> None:
    taken = np.arange(frames * tubelet) * thinning
    timeline = Timeline(taken, int(taken[-1]) + 1, tubelet)
    moments = taken[::tubelet]
    given = {"actions": _rows(frames - 1)}
    recorded = _rows(int(taken[-1]) + 1)
    # The same rows may come a stored frame, a pixel frame or a frame of the recording.
    given["states"] = data.draw(st.sampled_from([recorded[moments], recorded[taken], recorded]))
    given["extrinsics"] = data.draw(st.sampled_from([recorded[moments[:-1]], recorded[taken[:-1]], recorded[:-1]]))
    stored, _ = stored_rows(given, timeline, None)
    assert stored["states"].shape == (frames, 2)
    assert stored["extrinsics"].shape == (frames - 1, 2)
    np.testing.assert_array_equal(stored["states"][:, 0], moments)
    np.testing.assert_array_equal(stored["extrinsics"][:, 0], moments[:-1])


def test_actions_of_thinned_frames_are_not_guessed() -> None:
    timeline = Timeline(np.arange(8) * 4, 32, 1)
    with pytest.raises(ValueError, match="32 actions for 8 stored frames, not 7 or 8; fps leaves frames out"):
        stored_rows({"actions": _rows(32)}, timeline, None)
    poses, rule = stored_rows({"actions": _rows(32)}, timeline, "difference")
    assert rule == "difference"
    assert aligned(poses["actions"], rule, 8)[:, 0].tolist() == [4.0] * 7


@given(st.integers(2, 9), st.integers(0, 30), st.sampled_from(["as-is", "first", "row1-to-row0", "pair-mean"]))
def test_a_named_rule_is_held_to(frames: int, count: int, alignment: str) -> None:
    least, greatest = rows_needed(alignment, frames)  # pyright: ignore[reportArgumentType]
    if least <= count <= (count if greatest is None else greatest):
        stored, rule = stored_rows({"actions": _rows(count)}, _whole(frames), alignment)  # pyright: ignore[reportArgumentType]
        assert (len(stored["actions"]), rule) == (count, alignment)
    else:
        with pytest.raises(ValueError, match=f"alignment={alignment} needs"):
            stored_rows({"actions": _rows(count)}, _whole(frames), alignment)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("rows", "timeline", "expected"),
    [
        ({"actions": _rows(9)}, _whole(5), "9 actions for 5 stored frames, not 4 or 5"),
        ({"actions": _rows(2)}, _whole(8, 2), "2 actions for 4 stored frames, not 3 or 4, or 7 or 8"),
        ({"actions": _rows(2)}, _whole(3, 2), "3 pixel frames are 1 stored ones of 2, and a clip needs two"),
        ({"actions": _rows(4), "states": _rows(3)}, _whole(5), "3 rows of states, not 5"),
    ],
)
def test_numbers_that_fit_no_rule_are_explained(rows: dict, timeline: Timeline, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        stored_rows(rows, timeline, None)


def test_clips_of_one_folder_share_one_rule() -> None:
    assert common_alignment(["as-is", "as-is"]) == "as-is"
    assert common_alignment(["first", "as-is"]) == "first"
    with pytest.raises(ValueError, match="different rules: as-is, pair-mean"):
        common_alignment(["pair-mean", "as-is"])
