import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from rlaif_jax.losses.advantages import gae, group_relative, leave_one_out, masked_mean, whiten

SHAPE = (3, 6)
FLOATS = arrays.arrays(np.float32, SHAPE, elements=st.floats(-4, 4, width=32))
LENGTHS = st.lists(st.integers(0, SHAPE[1]), min_size=SHAPE[0], max_size=SHAPE[0])
UNIT = st.floats(0, 1, width=32)
gae_jit, whiten_jit = jax.jit(gae), jax.jit(whiten)


def prefix_mask(lengths):
    return np.arange(SHAPE[1]) < np.asarray(lengths)[:, None]


def gae_by_definition(rewards, values, length, gamma, gae_lambda):
    """A_t = sum_k (gamma lambda)^k delta_{t+k}, over one row's real tokens, in float64."""
    values = np.append(values[:length].astype(np.float64), 0.0)
    deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(length)]
    return [sum((gamma * gae_lambda) ** (s - t) * deltas[s] for s in range(t, length)) for t in range(length)]


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(FLOATS, FLOATS, LENGTHS, UNIT, UNIT)
def test_gae_equals_its_definition(rewards, values, lengths, gamma, gae_lambda):
    mask = prefix_mask(lengths)
    advantages, returns = map(np.asarray, gae_jit(rewards, values, mask, gamma, gae_lambda))
    assert advantages.dtype == returns.dtype == np.float32
    for row, length in enumerate(lengths):
        expected = gae_by_definition(rewards[row], values[row], length, gamma, gae_lambda)
        np.testing.assert_allclose(advantages[row, :length], expected, atol=1e-4)
        np.testing.assert_allclose(returns[row, :length], expected + values[row, :length], atol=1e-4)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


def test_with_lambda_one_the_return_is_the_discounted_sum_of_rewards():
    rewards, values = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
    _, returns = gae_jit(rewards, values, prefix_mask([6, 6, 6]), 0.9, 1.0)
    np.testing.assert_allclose(returns[:, 0], rewards @ 0.9 ** np.arange(6), rtol=1e-5)


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(FLOATS, LENGTHS)
def test_whitened_values_have_mean_0_and_variance_1_over_the_mask(x, lengths):
    mask = prefix_mask(lengths)
    hypothesis.assume(mask.any() and x[mask].std() > 0.1)
    y = np.asarray(whiten_jit(x, mask))
    assert abs(y[mask].mean()) < 1e-4
    assert abs(y[mask].std() - 1) < 1e-3
    assert not y[~mask].any()


def test_whitening_nothing_or_a_constant_is_finite():
    ones = np.ones(SHAPE, np.float32)
    assert np.isfinite(whiten_jit(ones, np.zeros(SHAPE, bool))).all()
    assert not np.asarray(whiten_jit(ones, np.ones(SHAPE, bool))).any()


def test_masked_mean_reads_the_mask_alone():
    assert masked_mean(np.array([1.0, 3.0, np.float32(1e9)]), np.array([1, 1, 0])) == 2
    assert masked_mean(np.ones(3), np.zeros(3)) == 0


def test_whitened_rewards_keep_their_mean():
    x = np.random.default_rng(0).normal(2, 3, SHAPE).astype(np.float32)
    mask = prefix_mask([6, 0, 2])
    y = np.asarray(whiten(x, mask, shift_mean=False))
    kept = x[mask].astype(np.float64)
    np.testing.assert_allclose(y[mask], (kept - kept.mean()) / kept.std() + kept.mean(), rtol=1e-5)
    assert not y[~mask].any()


# Groups of four: all count, one does not, one alone does, none does.
REWARDS = np.random.default_rng(1).normal(0, 2, (4, 4)).astype(np.float32)
VALID = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]], bool)


def test_leave_one_out_takes_the_mean_of_the_others_that_count():
    def advantage(group, i):
        others = [np.float64(REWARDS[group, j]) for j in range(4) if j != i and VALID[group, j]]
        return REWARDS[group, i] - np.mean(others) if VALID[group, i] and others else 0.0

    expected = [[advantage(group, i) for i in range(4)] for group in range(4)]
    np.testing.assert_allclose(leave_one_out(REWARDS, VALID), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divide_by_std", [True, False])
def test_group_relative_takes_the_mean_of_all_that_count(divide_by_std):
    def advantage(group, i):
        members = np.float64(REWARDS[group][VALID[group]])
        if not VALID[group, i]:
            return 0.0
        return (REWARDS[group, i] - members.mean()) / (members.std() + 1e-4 if divide_by_std else 1)

    expected = [[advantage(group, i) for i in range(4)] for group in range(4)]
    np.testing.assert_allclose(group_relative(REWARDS, VALID, divide_by_std), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("advantage", [leave_one_out, lambda *x: group_relative(*x, True)])
def test_what_does_not_count_can_not_move_the_others(advantage):
    other = np.where(VALID, REWARDS, np.float32(1e6))
    np.testing.assert_allclose(advantage(other, VALID), advantage(REWARDS, VALID), rtol=1e-5, atol=1e-6)


def test_leave_one_out_is_the_group_mean_baseline_scaled_by_the_size_over_one_less():
    every = np.ones_like(VALID)
    np.testing.assert_allclose(leave_one_out(REWARDS, every), group_relative(REWARDS, every, False) * 4 / 3, rtol=1e-5)


@pytest.mark.parametrize("advantage", [leave_one_out, lambda *x: group_relative(*x, True)])
def test_replies_of_equal_reward_have_no_advantage(advantage):
    assert not np.asarray(advantage(np.full((2, 4), 0.5, np.float32), VALID[:2])).any()
