import jax
import numpy as np
import pytest

from rlaif_jax.losses.policy import aggregate, clipped_loss, clipped_value_loss, reinforce_loss, truncated_weights
from tests.helpers import central_differences

RNG = np.random.default_rng(0)
SHAPE = (4, 9)
OLD, ADVANTAGES, VALUES, RETURNS = RNG.normal(0, 1, (4, *SHAPE)).astype(np.float32)
NEW = OLD + RNG.normal(0, 0.5, SHAPE).astype(np.float32)
OLD_VALUES = VALUES + RNG.normal(0, 0.3, SHAPE).astype(np.float32)
MASK = np.arange(SHAPE[1]) < np.array([[9], [1], [4], [0]])
LENGTHS = MASK.sum(1)
CLIP = 0.2
# clip_low, clip_high, dual_clip
CLIPS = [(0.2, 0.2, 0.0), (0.1, 0.4, 0.0), (0.2, 0.2, 1.05), (0.3, 0.1, 1.1)]
HOW = ["token_mean", "sequence_mean", "sequence_sum"]


def per_token(function):
    return np.array([[function(i, t) if MASK[i, t] else 0.0 for t in range(SHAPE[1])] for i in range(SHAPE[0])])


def clipped_by_loop(new, low, high, dual):
    def token(i, t):
        advantage, ratio = np.float64(ADVANTAGES[i, t]), np.exp(np.float64(new[i, t]) - OLD[i, t])
        loss = -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
        return min(loss, -dual * advantage) if dual and advantage < 0 else loss

    return per_token(token)


def is_clipped(low, high, dual):
    """Where the loss does not depend on the ratio."""

    def token(i, t):
        ratio = np.exp(np.float64(NEW[i, t]) - OLD[i, t])
        if ADVANTAGES[i, t] > 0:
            return ratio > 1 + high
        return ratio < 1 - low or (dual > 0 and ratio > dual)

    return per_token(token).astype(bool)


@pytest.mark.parametrize("clips", CLIPS)
def test_the_clipped_loss_and_its_gradient_equal_a_loop(clips):
    losses, metrics = clipped_loss(NEW, OLD, ADVANTAGES, MASK, *clips)
    assert losses.dtype == np.float32
    np.testing.assert_allclose(losses, clipped_by_loop(NEW, *clips), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda new: clipped_loss(new, OLD, ADVANTAGES, MASK, *clips)[0].sum())(NEW)
    expected = central_differences(lambda new: clipped_by_loop(new, *clips).sum(), NEW)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    ratio = np.exp(NEW - OLD)
    sums = {
        "clip_fraction": is_clipped(*clips).sum(),
        "ratio": ratio[MASK].sum(),
        "approx_kl": (ratio - 1 - np.log(ratio))[MASK].sum(),
    }
    assert metrics.keys() == sums.keys()
    for name, (total, weight) in metrics.items():
        assert weight == MASK.sum()
        np.testing.assert_allclose(total, sums[name], rtol=1e-4)


def test_each_clip_acts_on_tokens_of_its_own():
    low, high, dual = (is_clipped(*clips)[MASK] for clips in ((0.2, 9.0, 0.0), (1.0, 0.2, 0.0), (1.0, 9.0, 1.05)))
    for one, other in ((low, high), (low, dual), (high, dual)):
        assert one.any() and other.any() and not (one & other).any()


def test_at_the_old_policy_nothing_is_clipped_and_the_loss_is_minus_the_advantages():
    losses, metrics = clipped_loss(OLD, OLD, ADVANTAGES, MASK, CLIP, CLIP, 3.0)
    assert np.array_equal(losses, -ADVANTAGES * MASK)
    assert metrics["ratio"][0] == metrics["ratio"][1] == MASK.sum()
    assert metrics["clip_fraction"][0] == metrics["approx_kl"][0] == 0


@pytest.mark.parametrize("clips", CLIPS)
def test_the_policy_gradient_is_zero_exactly_where_clipped_or_masked(clips):
    gradient = jax.grad(lambda new: clipped_loss(new, OLD, ADVANTAGES, MASK, *clips)[0].sum())(NEW)
    clipped = is_clipped(*clips)
    expected = np.where(MASK & ~clipped, -np.exp(NEW - OLD) * ADVANTAGES, 0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    assert np.array_equal(np.asarray(gradient) == 0, ~MASK | clipped)


def test_the_dual_clip_bounds_the_loss_of_a_token_that_has_become_much_likelier():
    far = OLD + np.float32(5)
    losses = np.asarray(clipped_loss(far, OLD, ADVANTAGES, MASK, CLIP, CLIP, 3.0)[0])
    np.testing.assert_allclose(losses, np.where(ADVANTAGES < 0, -3, -1 - CLIP) * ADVANTAGES * MASK, rtol=1e-5)


def test_the_reinforce_loss_is_minus_log_prob_times_advantage_and_so_is_its_gradient():
    losses, metrics = reinforce_loss(NEW, OLD, ADVANTAGES, MASK)
    np.testing.assert_allclose(losses, per_token(lambda i, t: -np.float64(NEW[i, t]) * ADVANTAGES[i, t]), rtol=1e-6)
    gradient = jax.grad(lambda new: reinforce_loss(new, OLD, ADVANTAGES, MASK)[0].sum())(NEW)
    assert np.array_equal(gradient, -ADVANTAGES * MASK)
    ratio = np.exp(np.float64(NEW) - OLD)
    ((total, weight),) = metrics.values()
    np.testing.assert_allclose(total, (ratio - 1 - np.log(ratio))[MASK].sum(), rtol=1e-4)
    assert weight == MASK.sum()


def test_reinforce_and_the_clipped_loss_have_one_gradient_before_the_first_update():
    plain = jax.grad(lambda new: reinforce_loss(new, OLD, ADVANTAGES, MASK)[0].sum())(OLD)
    clipped = jax.grad(lambda new: clipped_loss(new, OLD, ADVANTAGES, MASK, CLIP, CLIP, 3.0)[0].sum())(OLD)
    np.testing.assert_allclose(plain, clipped, rtol=1e-6)


def policy_losses(new):
    return clipped_loss(new, OLD, ADVANTAGES, MASK, CLIP, CLIP, 3.0)[0], reinforce_loss(new, OLD, ADVANTAGES, MASK)[0]


@pytest.mark.parametrize("log_ratio", [200.0, -200.0])
def test_what_padding_holds_can_not_reach_the_loss_or_its_gradient(log_ratio):
    other = np.where(MASK, NEW, log_ratio).astype(np.float32)
    for one, two in zip(policy_losses(other), policy_losses(NEW), strict=True):
        assert np.array_equal(one, two)
    assert np.isfinite(jax.grad(lambda new: sum(x.sum() for x in policy_losses(new)))(other)).all()


@pytest.mark.parametrize("how", HOW)
def test_losses_are_summed_as_a_loop_sums_them(how):
    def quotient(losses):
        rows = [[losses[i, t] for t in range(LENGTHS[i])] for i in range(SHAPE[0]) if LENGTHS[i]]
        if how == "token_mean":
            return sum(map(sum, rows)) / sum(map(len, rows))
        return sum(sum(row) / (len(row) if how == "sequence_mean" else 1) for row in rows) / len(rows)

    total, weight = aggregate(VALUES, MASK, how)
    assert weight == (MASK.sum() if how == "token_mean" else 3)  # an empty response is none
    np.testing.assert_allclose(total / weight, quotient(VALUES.astype(np.float64)), rtol=1e-5)
    gradient = jax.grad(lambda losses: aggregate(losses, MASK, how)[0] / weight)(VALUES)
    np.testing.assert_allclose(gradient, central_differences(quotient, VALUES), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("how", HOW)
def test_sums_and_weights_of_parts_add_up_to_those_of_the_whole(how):
    parts = [aggregate(VALUES[rows], MASK[rows], how) for rows in (slice(0, 1), slice(1, 4))]
    np.testing.assert_allclose(np.sum(parts, axis=0), aggregate(VALUES, MASK, how), rtol=1e-5)


def test_without_a_single_token_sum_and_weight_are_zero():
    for how in HOW:
        assert aggregate(VALUES, np.zeros_like(MASK), how) == (0, 0)


def test_importance_weights_are_the_ratio_to_the_sampler_held_below_the_cap():
    weights = truncated_weights(NEW, OLD, 1.3)
    expected = [[min(np.exp(np.float64(a) - b), 1.3) for a, b in zip(*rows, strict=True)] for rows in zip(
        NEW, OLD, strict=True)]  # fmt: skip
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    assert weights.max() == np.float32(1.3) > weights.min() > 0
    assert np.array_equal(truncated_weights(OLD, OLD, 1.3), np.ones(SHAPE))


def value_loss_by_loop(values, clip):
    def token(i, t):
        value, old, target = np.float64(values[i, t]), np.float64(OLD_VALUES[i, t]), np.float64(RETURNS[i, t])
        held = min(max(value, old - clip), old + clip) if clip else value
        return 0.5 * max((value - target) ** 2, (held - target) ** 2)

    return per_token(token).sum()


@pytest.mark.parametrize("clip", [CLIP, 0.0])
def test_the_value_loss_and_its_gradient_equal_a_loop(clip):
    total, weight, metrics = clipped_value_loss(VALUES, OLD_VALUES, RETURNS, MASK, clip)
    np.testing.assert_allclose(total, value_loss_by_loop(VALUES, clip), rtol=1e-5)
    assert weight == MASK.sum()
    gradient = jax.grad(lambda values: clipped_value_loss(values, OLD_VALUES, RETURNS, MASK, clip)[0])(VALUES)
    expected = central_differences(lambda values: value_loss_by_loop(values, clip), VALUES)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
    held = np.clip(VALUES, OLD_VALUES - clip, OLD_VALUES + clip) if clip else VALUES
    clipped = (np.abs(held - RETURNS) > np.abs(VALUES - RETURNS)) & MASK
    assert metrics["value/clip_fraction"] == (clipped.sum(), MASK.sum())
    assert clipped.any() == (clip > 0)


def test_the_value_gradient_is_zero_where_clipping_makes_the_loss_larger():
    gradient = jax.grad(lambda values: clipped_value_loss(values, OLD_VALUES, RETURNS, MASK, CLIP)[0])(VALUES)
    held = np.clip(VALUES, OLD_VALUES - CLIP, OLD_VALUES + CLIP)
    clipped = np.abs(held - RETURNS) > np.abs(VALUES - RETURNS)
    np.testing.assert_allclose(gradient, np.where(MASK & ~clipped, VALUES - RETURNS, 0), atol=1e-5)
