import jax
import numpy as np
import pytest

from rlaif_jax.losses.reward import bradley_terry_loss, combine
from tests.reference.make_trl_reference import FOLDER

RNG = np.random.default_rng(0)
A, B = RNG.normal(0, 2, (2, 16)).astype(np.float32)
PROB = RNG.uniform(0, 1, 16).astype(np.float32)
WEIGHT = RNG.uniform(0, 1, 16).astype(np.float32)


def loss(a, b, prob):
    return bradley_terry_loss(a, b, prob, np.ones_like(prob))[0]


def test_it_is_the_cross_entropy_of_the_label():
    sigmoid = 1 / (1 + np.exp(np.float64(B) - A))
    total, weight = bradley_terry_loss(A, B, PROB, np.ones(16, np.float32))
    np.testing.assert_allclose(total, -(PROB * np.log(sigmoid) + (1 - PROB) * np.log(1 - sigmoid)).sum(), rtol=1e-5)
    assert weight == 16


def test_a_pair_counts_by_its_weight():
    each = np.array([loss(A[i : i + 1], B[i : i + 1], PROB[i : i + 1]) for i in range(16)])
    total, weight = bradley_terry_loss(A, B, PROB, WEIGHT)
    np.testing.assert_allclose(total, WEIGHT @ each, rtol=1e-5)
    np.testing.assert_allclose(weight, WEIGHT.sum(), rtol=1e-6)


@pytest.mark.parametrize(("label", "chosen", "rejected"), [(1, A, B), (0, B, A)])
def test_a_hard_label_gives_minus_log_sigmoid_of_chosen_minus_rejected(label, chosen, rejected):
    expected = np.log1p(np.exp(np.float64(rejected) - chosen)).sum()
    np.testing.assert_allclose(loss(A, B, np.full(16, label, np.float32)), expected, rtol=1e-5)


def test_the_gradient_is_zero_where_the_reward_says_what_the_label_says():
    gradient = jax.grad(loss)(B + np.log(PROB / (1 - PROB)), B, PROB)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


def test_the_gradient_moves_the_difference_towards_the_label():
    sigmoid = 1 / (1 + np.exp(B - A))
    gradient_a, gradient_b = jax.grad(loss, (0, 1))(A, B, PROB)
    np.testing.assert_allclose(gradient_a, sigmoid - PROB, atol=1e-5)
    np.testing.assert_allclose(gradient_b, PROB - sigmoid, atol=1e-5)


def test_swapping_the_responses_and_the_label_changes_nothing():
    np.testing.assert_allclose(loss(A, B, PROB), loss(B, A, 1 - PROB), rtol=1e-5)


def test_a_constant_added_to_both_rewards_changes_nothing():
    np.testing.assert_allclose(loss(A + 3, B + 3, PROB), loss(A, B, PROB), rtol=1e-5)


@pytest.mark.parametrize("difference", [1e3, -1e3])
def test_large_differences_are_finite(difference):
    a, b, prob = np.float32([difference] * 2), np.zeros(2, np.float32), np.float32([0, 1])
    value, gradient = jax.value_and_grad(loss)(a, b, prob)
    np.testing.assert_allclose(value, 1e3)
    assert np.isfinite(gradient).all()


def test_the_margin_counts_by_how_sure_a_label_is():
    lead = 0.7 * np.abs(2 * np.float64(PROB) - 1)
    delta = np.float64(A) - B
    expected = PROB * np.log1p(np.exp(lead - delta)) + (1 - PROB) * np.log1p(np.exp(lead + delta))
    np.testing.assert_allclose(bradley_terry_loss(A, B, PROB, WEIGHT, 0.7)[0], WEIGHT @ expected, rtol=1e-5)


@pytest.mark.parametrize(("case", "centring"), [("reward", 0.0), ("reward_centered", 0.01)])
def test_losses_and_gradients_are_those_of_trl(case, centring):
    arrays = np.load(FOLDER / "trl_losses.npz")
    rewards, ones = (arrays["chosen_reward"], arrays["rejected_reward"]), np.ones(16, np.float32)
    function = lambda a, b: bradley_terry_loss(a, b, ones, ones, 0.0, centring)[0] / 16  # noqa: E731
    value, gradients = jax.value_and_grad(function, argnums=(0, 1))(*rewards)
    np.testing.assert_allclose(value, arrays[f"{case}_loss"], rtol=1e-5)
    for side, gradient in zip(("chosen", "rejected"), gradients, strict=True):
        np.testing.assert_allclose(gradient, arrays[f"{case}_gradient_{side}_reward"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("margin", [0.5, 2.0])
def test_a_margin_is_that_of_trl_for_sure_labels(margin):
    ones = np.ones(16, np.float32)
    shifted = bradley_terry_loss(A - margin, B, ones, ones)[0]
    np.testing.assert_allclose(bradley_terry_loss(A, B, ones, ones, margin)[0], shifted, rtol=1e-5)


def test_the_worst_case_is_never_above_the_mean_and_members_that_agree_lose_nothing():
    rewards = RNG.normal(0, 1, (4, 16)).astype(np.float32)
    mean, worst, cautious = (np.asarray(combine(rewards, how, 0.5)) for how in ("mean", "min", "uncertainty"))
    assert np.all(worst <= mean) and np.all(cautious < mean)
    same = np.tile(rewards[:1], (4, 1))
    for how in ("mean", "min", "uncertainty"):
        np.testing.assert_allclose(combine(same, how, 0.5), rewards[0], rtol=1e-6)
