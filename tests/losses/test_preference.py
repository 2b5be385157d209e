import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.losses.preference import LOSSES, preference_loss
from tests.reference.make_trl_reference import FOLDER

PAIRS = 64
BETA = {"dpo": 0.1, "ipo": 0.4, "slic": 0.2}


def oracle(loss, h, beta):
    if loss == "dpo":
        return np.log1p(np.exp(-beta * h)), -beta / (1 + np.exp(beta * h))
    if loss == "ipo":
        return (h - 0.5 / beta) ** 2, 2 * (h - 0.5 / beta)
    return np.where(beta * h < 1, 1 - beta * h, 0), np.where(beta * h < 1, -beta, 0)


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 4, PAIRS), rng.uniform(0, 1, PAIRS), rng.uniform(0, 2, PAIRS)


def value_and_gradient(h, prob_a, weight, loss, beta):
    function = lambda h: preference_loss(h, jnp.float32(prob_a), jnp.float32(weight), loss, beta)[0]  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(function))(jnp.float32(h))
    return float(value), np.asarray(gradient, float)


@pytest.mark.parametrize("loss", LOSSES)
def test_value_and_gradient_are_those_of_the_formula(loss):
    h, prob_a, weight = drawn()
    (won, slope), (lost, back) = oracle(loss, h, BETA[loss]), oracle(loss, -h, BETA[loss])
    value, gradient = value_and_gradient(h, prob_a, weight, loss, BETA[loss])
    assert value == pytest.approx(np.sum(weight * (prob_a * won + (1 - prob_a) * lost)), rel=1e-5)
    np.testing.assert_allclose(gradient, weight * (prob_a * slope - (1 - prob_a) * back), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_soft_labels_of_0_and_1_are_hard_ones(loss, label):
    h, *_ = drawn(1)
    value, _ = value_and_gradient(h, np.full(PAIRS, label), np.ones(PAIRS), loss, BETA[loss])
    assert value == pytest.approx(np.sum(oracle(loss, h if label else -h, BETA[loss])[0]), rel=1e-5)


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_the_gradient_is_zero_where_the_policy_says_what_the_label_says(loss):
    _, prob_a, weight = drawn(2)
    beta = BETA[loss]
    there = np.log(prob_a / (1 - prob_a)) / beta if loss == "dpo" else (2 * prob_a - 1) / (2 * beta)
    assert np.abs(value_and_gradient(there, prob_a, weight, loss, beta)[1]).max() < 1e-4
    assert np.abs(value_and_gradient(there + 20, prob_a, weight, loss, beta)[1]).max() > 1e-2


@pytest.mark.parametrize("loss", LOSSES)
def test_swapping_a_pair_changes_nothing(loss):
    h, prob_a, weight = drawn(3)
    value, gradient = value_and_gradient(h, prob_a, weight, loss, BETA[loss])
    swapped, back = value_and_gradient(-h, 1 - prob_a, weight, loss, BETA[loss])
    assert swapped == pytest.approx(value, rel=1e-6)
    np.testing.assert_allclose(back, -gradient, rtol=1e-4, atol=1e-6)


TRL = {
    "sigmoid": ("dpo", 0.1, 1.0),
    "sigmoid_smoothed": ("dpo", 0.1, 0.8),  # conservative DPO is a label of 1 - label_smoothing
    "ipo": ("ipo", 0.1, 1.0),
    "ipo_beta_1": ("ipo", 1.0, 1.0),
    "hinge": ("slic", 0.1, 1.0),
    "hinge_beta_0.002": ("slic", 0.002, 1.0),
}


@pytest.mark.parametrize("case", TRL)
def test_losses_and_gradients_are_those_of_trl(case):
    arrays, (loss, beta, label) = np.load(FOLDER / "trl_losses.npz"), TRL[case]
    chosen, rejected = (arrays[f"policy_{side}_logps"] - arrays[f"ref_{side}_logps"] for side in ("chosen", "rejected"))
    h, count = chosen - rejected, len(chosen)
    value, gradient = value_and_gradient(h, np.full(count, label), np.ones(count), loss, beta)
    np.testing.assert_allclose(value, arrays[f"{case}_losses"].sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient / count, arrays[f"{case}_gradient_policy_chosen_logps"], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(beta * chosen, arrays[f"{case}_chosen_rewards"], rtol=1e-4, atol=1e-5)
