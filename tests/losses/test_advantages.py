import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import numpy as np

from rlaif_jax.losses.advantages import gae, masked_mean, whiten

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
