import numpy as np
import pytest

from rlaif_jax.stages.reward_model import calibrated_scale

RNG = np.random.default_rng(0)
TRUE = RNG.normal(0, 1, 2000)  # differences of the rewards behind the labels


@pytest.mark.parametrize("factor", [0.25, 1.0, 4.0])
def test_rewards_that_are_off_by_a_factor_are_brought_back(factor):
    labels = 1 / (1 + np.exp(-TRUE))
    assert calibrated_scale(TRUE * factor, labels, 2.0) == pytest.approx(1 / factor, rel=1e-3)


def test_noise_in_the_rewards_shrinks_them_by_the_share_of_signal():
    small = 0.2 * TRUE  # where the sigmoid is straight, the best factor is the slope of a regression
    noisy = small + 0.2 * RNG.normal(0, 1, len(TRUE))
    slope = (small @ noisy) / (noisy @ noisy)
    assert calibrated_scale(noisy, 1 / (1 + np.exp(-small)), 2.0) == pytest.approx(slope, rel=0.03)


@pytest.mark.parametrize("sign", [-1, 0])
def test_rewards_that_say_nothing_or_the_opposite_are_scaled_to_nothing(sign):
    labels = 1 / (1 + np.exp(-sign * TRUE))
    assert calibrated_scale(TRUE, labels, 2.0) == 0


def test_a_gain_that_chance_could_give_counts_for_nothing():
    margins, labels = np.ones(20), np.repeat([1.0, 0.0], [12, 8])
    assert calibrated_scale(margins, labels, 0.0) == pytest.approx(np.log(12 / 8), rel=1e-3)
    assert calibrated_scale(margins, labels, 2.0) == 0
    assert calibrated_scale(np.ones(2000), labels.repeat(100), 2.0) > 0  # the same share of more labels is no chance
