import functools

import jax
import numpy as np
import pytest

from rlaif_jax.models.transformer import ScalarModel
from rlaif_jax.stages.reward_model import Comparisons, calibrated_scale, reward_loss
from tests.helpers import TINY, random_params, random_sequences

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


def test_a_pair_without_weight_is_as_one_that_is_not_there():
    a, b, other = (random_sequences(seed, 8) for seed in range(3))
    weight, prob = np.repeat(np.float32([1, 0]), 4), RNG.uniform(0.6, 1, 8).astype(np.float32)
    model = ScalarModel(TINY)
    loss = functools.partial(jax.jit(reward_loss, static_argnames="model"), random_params(model), model=model)
    half_other = jax.tree.map(lambda x, y: np.concatenate([x[:4], y[4:]]), a, other)
    expected = loss(Comparisons(a, b, prob, weight))
    jax.tree.map(np.testing.assert_array_equal, loss(Comparisons(half_other, b, prob, weight)), expected)
    assert expected[1] == expected[2]["accuracy"][1] == 4
    assert loss(Comparisons(a, b, prob, np.ones_like(weight)))[0] != expected[0]
