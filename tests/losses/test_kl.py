import numpy as np
import pytest

from rlaif_jax.losses.kl import k1, k3

RNG = np.random.default_rng(0)
POLICY, REFERENCE = (np.log(RNG.dirichlet(np.ones(12))).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize("estimator", [k1, k3])
def test_zero_where_equal(estimator):
    assert not np.asarray(estimator(POLICY, POLICY)).any()


@pytest.mark.parametrize("estimator", [k1, k3])
def test_the_expectation_under_the_policy_is_the_kl(estimator):
    probs = np.exp(np.float64(POLICY))
    kl = (probs * (np.float64(POLICY) - REFERENCE)).sum()
    np.testing.assert_allclose((probs * np.asarray(estimator(POLICY, REFERENCE))).sum(), kl, rtol=1e-4)


def test_k1_is_the_log_ratio_and_is_not_clamped_at_zero():
    values = k1(POLICY, REFERENCE)
    assert np.array_equal(values, POLICY - REFERENCE)
    assert values.min() < 0


def test_k3_is_never_negative_and_not_lost_to_rounding():
    log_ratio = np.float32([-5, -1, -1e-3, 1e-3, 1, 5])
    values = k3(log_ratio, np.zeros(6, np.float32))
    np.testing.assert_allclose(values, np.expm1(-np.float64(log_ratio)) + log_ratio, rtol=1e-2)
    assert np.all(values > 0)
