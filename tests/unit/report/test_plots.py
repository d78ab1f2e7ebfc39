from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from hopescale.report import pictures, plots
from hopescale.report.evaluation import Evaluation, load_run


@pytest.fixture
def evaluation(make_run: Callable[..., Path]) -> Evaluation:
    return load_run(make_run()).evaluation


def texts(figure: Figure) -> list[str]:
    from matplotlib.text import Text

    return [found.get_text() for found in figure.findobj(Text) if isinstance(found, Text)]


def test_the_hero_picture_is_1600_by_700_pixels(evaluation: Evaluation) -> None:
    assert pictures.overview(evaluation).canvas.get_width_height() == (1600, 700)


def test_the_hero_picture_states_the_error_it_draws(evaluation: Evaluation) -> None:
    ratio = evaluation.rollout_error[:, -1].sum() / evaluation.copy_last_error[:, -1].sum()
    assert f"{1 - ratio:.0%} less error" in texts(pictures.overview(evaluation))


def test_every_partition_has_a_panel_and_every_line_a_direct_label(evaluation: Evaluation) -> None:
    found = texts(plots.horizon_errors(evaluation))
    assert {*evaluation.partitions, "model", "copy last", "mean frame", "shuffled actions", "writes off"} <= set(found)


def test_partition_names_are_not_parsed_as_formulas(make_run: Callable[..., Path]) -> None:
    evaluation = load_run(make_run(partitions=("$\\frac{$", "b"))).evaluation
    for figure in (plots.horizon_errors(evaluation), pictures.filmstrip(evaluation), pictures.pca_rgb(evaluation, 0)):
        figure.canvas.draw()


def test_curves_survive_an_empty_log_and_losses_that_are_not_finite() -> None:
    assert "no evaluation ran during training" in texts(plots.loss_curves([]))
    records = [{"kind": "train", "step": step, "loss": loss} for step, loss in [(1, 2.0), (2, float("nan")), (3, 0.0)]]
    plots.loss_curves(records).canvas.draw()


def test_smoothing_keeps_length_ends_and_a_straight_line() -> None:
    line = np.linspace(5, 1, 500)
    np.testing.assert_allclose(plots.smoothed(line), line)


def test_single_partition_single_horizon_and_short_clips_draw(make_run: Callable[..., Path]) -> None:
    run = make_run(partitions=("only",))
    with np.load(run / "report" / "evaluation.npz") as archive:
        arrays = dict(archive)
    for name, array in arrays.items():
        if name.endswith("_error") or name in ("one_step_copy_last", "surprise"):
            arrays[name] = array[:, :1]
        if name in ("sample_truth", "sample_prediction", "sample_frames"):
            arrays[name] = array[:, :2]
    arrays |= {"horizons": np.array([1]), "cms_active": arrays["cms_active"][:, :, :1]}
    np.savez(run / "report" / "evaluation.npz", **arrays)  # pyright: ignore
    evaluation = load_run(run).evaluation
    for figure in (
        plots.horizon_errors(evaluation),
        plots.one_step_errors(evaluation),
        plots.surprise_over_frames(evaluation),
        plots.cms_activity(evaluation),
        pictures.overview(evaluation),
        pictures.filmstrip(evaluation),
    ):
        figure.canvas.draw()


def test_blocks_with_the_same_activity_share_a_raster(make_run: Callable[..., Path]) -> None:
    active = np.ones((3, 3, 7), dtype=bool)
    active[2, 1] = False
    found = texts(plots.cms_activity(load_run(make_run(cms_active=active)).evaluation))
    assert {"CMS blocks 1, 3", "CMS block 5"} <= set(found)


def test_a_filmstrip_shows_different_partitions_first(evaluation: Evaluation) -> None:
    names = [evaluation.sample_partitions[clip] for clip in pictures.varied_clips(evaluation, 3)]
    assert len(set(names)) == 3


def test_a_model_without_memories_has_no_memory_figures(make_run: Callable[..., Path]) -> None:
    evaluation = load_run(make_run(surprise=np.zeros((0, 7)), surprise_blocks=np.zeros(0, int))).evaluation
    with pytest.raises(ValueError, match="no memory blocks"):
        plots.surprise_over_frames(evaluation)
