import jax
import numpy as np
import pytest

from rlaif_jax.losses.policy import clipped_value_loss, ppo_policy_loss

RNG = np.random.default_rng(0)
SHAPE = (4, 9)
OLD, ADVANTAGES, VALUES, RETURNS = RNG.normal(0, 1, (4, *SHAPE)).astype(np.float32)
NEW = OLD + RNG.normal(0, 0.3, SHAPE).astype(np.float32)
MASK = np.arange(SHAPE[1]) < np.array([[9], [1], [4], [0]])
CLIP = 0.2


def per_token(function):
    return np.array([[function(i, t) if MASK[i, t] else 0.0 for t in range(SHAPE[1])] for i in range(SHAPE[0])])


def test_policy_loss_equals_a_loop():
    def token(i, t):
        ratio = np.exp(np.float64(NEW[i, t]) - OLD[i, t])
        return -min(ratio * ADVANTAGES[i, t], min(max(ratio, 1 - CLIP), 1 + CLIP) * ADVANTAGES[i, t])

    def clipped(i, t):
        ratio = np.exp(NEW[i, t] - OLD[i, t])
        return ratio > 1 + CLIP if ADVANTAGES[i, t] > 0 else ratio < 1 - CLIP

    total, weight, sums = ppo_policy_loss(NEW, OLD, ADVANTAGES, MASK, CLIP)
    ratio = np.exp(NEW - OLD)
    np.testing.assert_allclose(total, per_token(token).sum(), rtol=1e-5)
    assert weight == MASK.sum()
    assert 0 < sums["clip_fraction"] == per_token(clipped).sum()
    np.testing.assert_allclose(sums["ratio"], ratio[MASK].sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["approx_kl"], (ratio - 1 - np.log(ratio))[MASK].sum(), rtol=1e-4)


def test_at_the_old_policy_nothing_is_clipped_and_the_loss_is_minus_the_advantages():
    total, weight, sums = ppo_policy_loss(OLD, OLD, ADVANTAGES, MASK, CLIP)
    np.testing.assert_allclose(total, -ADVANTAGES[MASK].sum(), rtol=1e-6)
    assert sums["ratio"] == weight
    assert sums["clip_fraction"] == sums["approx_kl"] == 0


def test_the_policy_gradient_is_zero_exactly_where_clipped_or_masked():
    gradient = jax.grad(lambda new: ppo_policy_loss(new, OLD, ADVANTAGES, MASK, CLIP)[0])(NEW)
    ratio = np.exp(NEW - OLD)
    clipped = np.where(ADVANTAGES > 0, ratio > 1 + CLIP, ratio < 1 - CLIP)
    expected = np.where(MASK & ~clipped, -ratio * ADVANTAGES, 0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    assert np.array_equal(np.asarray(gradient) == 0, ~MASK | clipped)


@pytest.mark.parametrize("log_ratio", [200.0, -200.0])
def test_what_padding_holds_can_not_reach_the_loss_or_its_gradient(log_ratio):
    loss = lambda new: ppo_policy_loss(new, OLD, ADVANTAGES, MASK, CLIP)[0]  # noqa: E731
    other = np.where(MASK, NEW, log_ratio).astype(np.float32)
    assert loss(other) == loss(NEW)
    assert np.isfinite(jax.grad(loss)(other)).all()


def test_value_loss_equals_a_loop():
    old = VALUES + RNG.normal(0, 0.3, SHAPE).astype(np.float32)

    def errors(i, t):
        held = min(max(VALUES[i, t], old[i, t] - CLIP), old[i, t] + CLIP)
        return (VALUES[i, t] - RETURNS[i, t]) ** 2, (held - RETURNS[i, t]) ** 2

    total, weight, sums = clipped_value_loss(VALUES, old, RETURNS, MASK, CLIP)
    np.testing.assert_allclose(total, per_token(lambda i, t: 0.5 * max(errors(i, t))).sum(), rtol=1e-5)
    assert weight == MASK.sum()
    assert 0 < sums["value/clip_fraction"] == per_token(lambda i, t: errors(i, t)[1] > errors(i, t)[0]).sum()


def test_the_value_gradient_is_zero_where_clipping_makes_the_loss_larger():
    old = VALUES + RNG.normal(0, 0.3, SHAPE).astype(np.float32)
    gradient = jax.grad(lambda values: clipped_value_loss(values, old, RETURNS, MASK, CLIP)[0])(VALUES)
    held = np.clip(VALUES, old - CLIP, old + CLIP)
    clipped = np.abs(held - RETURNS) > np.abs(VALUES - RETURNS)
    np.testing.assert_allclose(gradient, np.where(MASK & ~clipped, VALUES - RETURNS, 0), atol=1e-5)
