from __future__ import annotations

import numpy as np

from hopescale.report import features


def test_colours_of_the_truth_do_not_depend_on_the_prediction(arrays: dict[str, np.ndarray]) -> None:
    truth, prediction = arrays["sample_truth"], arrays["sample_prediction"]
    projection = features.fit_projection(truth)
    seen = features.colours(truth, projection, (8, 8))
    assert seen.shape == (4, 8, 8, 8, 3)
    assert seen.min() >= 0
    assert seen.max() <= 1
    features.colours(prediction * 100, projection, (8, 8))
    np.testing.assert_array_equal(features.colours(truth, features.fit_projection(truth), (8, 8)), seen)


def test_projection_finds_the_directions_of_largest_variance() -> None:
    random = np.random.default_rng(0)
    truth = random.normal(size=(2, 3, 16, 5)) * np.array([0.1, 5.0, 0.1, 2.0, 9.0])
    directions = features.fit_projection(truth).directions
    assert np.abs(directions).argmax(axis=0).tolist() == [4, 1, 3]
    np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-9)


def test_features_with_fewer_than_three_channels_still_have_colours() -> None:
    truth = np.random.default_rng(0).normal(size=(1, 2, 4, 2))
    assert np.isfinite(features.colours(truth, features.fit_projection(truth), (2, 2))).all()


def test_error_maps_are_the_mean_absolute_difference_over_channels(arrays: dict[str, np.ndarray]) -> None:
    truth, prediction = arrays["sample_truth"], arrays["sample_prediction"]
    maps = features.error_maps(truth, prediction, (8, 8))
    assert maps.shape == (4, 8, 8, 8)
    assert (maps[:, 0] == 0).all()
    np.testing.assert_allclose(maps[1, 3, 2, 5], np.abs(truth - prediction)[1, 3, 2 * 8 + 5].mean(), rtol=1e-6)


def test_error_ceiling_of_a_perfect_prediction_is_positive() -> None:
    assert features.error_ceiling(np.zeros((2, 3, 4, 4))) > 0
