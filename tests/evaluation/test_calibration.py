import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif_jax.evaluation.calibration import cross_fitted, expected_calibration_error, fit_temperature, scale

probabilities = st.lists(st.floats(0.001, 0.999), min_size=1, max_size=50).map(np.array)


def outcomes(prob, seed=0):
    return (np.random.default_rng(seed).random(len(prob)) < prob).astype(float)


@given(probabilities)
def test_temperature_one_is_the_identity(prob):
    np.testing.assert_array_equal(scale(prob, 1.0), prob)


@given(probabilities, st.floats(0.1, 10))
def test_a_temperature_changes_no_side_and_treats_both_alike(prob, temperature):
    scaled = scale(prob, temperature)
    assert np.all(np.sign(np.round(scaled - 0.5, 9)) * np.sign(np.round(prob - 0.5, 9)) >= 0)
    np.testing.assert_allclose(scaled + scale(1 - prob, temperature), 1, atol=1e-9)


@given(probabilities, st.integers(0, 9))
def test_swapping_both_sides_keeps_the_error(prob, seed):
    human = outcomes(prob, seed)
    if len(np.unique(np.abs(prob - 0.5))) == len(prob):  # no two pairs are equally sure
        one, other = (expected_calibration_error(p, h) for p, h in ((prob, human), (1 - prob, 1 - human)))
        assert one == pytest.approx(other, abs=1e-9)


def test_the_temperature_of_an_overconfident_judge_is_found():
    honest = np.random.default_rng(1).uniform(0.05, 0.95, 20_000)
    human, said = outcomes(honest), scale(honest, 1 / 3.0)
    assert fit_temperature(said, human) == pytest.approx(3.0, rel=0.05)
    assert expected_calibration_error(said, human) > 0.15
    assert expected_calibration_error(honest, human) < 0.02
    assert expected_calibration_error(cross_fitted(said, human), human) < 0.02


def test_no_pair_is_scaled_by_a_temperature_that_was_fitted_to_it():
    prob, human = np.array([0.9, 0.9, 0.9, 0.9]), np.array([1.0, 0.0, 1.0, 0.0])
    scaled = cross_fitted(prob, human)
    np.testing.assert_allclose(scaled[::2], scale(prob[::2], fit_temperature(prob[1::2], human[1::2])))
    assert scaled[0] < 0.6 < 0.95 < scaled[1]  # the odd pairs went wrong, the even ones right
