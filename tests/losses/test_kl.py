import itertools

import jax
import numpy as np
import pytest

from rlaif_jax.losses.kl import ESTIMATORS, adapt, k1, k2, k3, why_wrong
from tests.helpers import central_differences

RNG = np.random.default_rng(0)
POLICY, REFERENCE = (np.log(RNG.dirichlet(np.ones(12))).astype(np.float32) for _ in range(2))
LOGITS = POLICY.astype(np.float64)
BY_HAND = {
    k1: lambda p, q: p - q,
    k2: lambda p, q: (p - q) ** 2 / 2,
    k3: lambda p, q: np.exp(q - p) - 1 - (q - p),
}


def log_softmax(x):
    return x - np.log(np.exp(x).sum())


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_zero_where_equal(estimator):
    assert not np.asarray(estimator(POLICY, POLICY)).any()


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_value_and_gradient_equal_the_formula(estimator):
    logprobs, reference = RNG.normal(-2, 1, (2, 3, 5)).astype(np.float32)
    by_hand = BY_HAND[estimator]
    expected = by_hand(np.float64(logprobs), np.float64(reference))
    np.testing.assert_allclose(estimator(logprobs, reference), expected, rtol=1e-4, atol=1e-6)
    gradient = jax.grad(lambda x: estimator(x, reference).sum())(logprobs)
    expected = central_differences(lambda x: by_hand(x, reference).sum(), logprobs)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", [k1, k3])
def test_the_expectation_under_the_policy_is_the_kl(estimator):
    probs = np.exp(np.float64(POLICY))
    kl = (probs * (np.float64(POLICY) - REFERENCE)).sum()
    np.testing.assert_allclose((probs * np.asarray(estimator(POLICY, REFERENCE))).sum(), kl, rtol=1e-4)


@pytest.mark.parametrize(
    ("estimator", "divergence"),
    [
        (k1, lambda p, q: 0.0),
        (k2, lambda p, q: np.exp(p) @ (p - q)),
        (k3, lambda p, q: np.exp(q) @ (q - p)),
    ],
)
def test_the_expected_gradient_of_a_penalty_on_samples_is_that_of_its_divergence(estimator, divergence):
    probs = np.exp(LOGITS).astype(np.float32)  # of the samples: frozen
    gradient = jax.grad(lambda x: probs @ estimator(jax.nn.log_softmax(x), REFERENCE))(POLICY)
    expected = central_differences(lambda x: divergence(log_softmax(x), np.float64(REFERENCE)), LOGITS)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)


def test_k1_is_the_log_ratio_and_is_not_clamped_at_zero():
    values = k1(POLICY, REFERENCE)
    assert np.array_equal(values, POLICY - REFERENCE)
    assert values.min() < 0


def test_k3_is_never_negative_and_not_lost_to_rounding():
    log_ratio = np.float32([-5, -1, -1e-3, 1e-3, 1, 5])
    values = k3(log_ratio, np.zeros(6, np.float32))
    np.testing.assert_allclose(values, np.expm1(-np.float64(log_ratio)) + log_ratio, rtol=1e-2)
    assert np.all(values > 0)


def test_a_penalty_that_has_not_the_gradient_of_a_divergence_is_refused_with_what_to_use():
    refused = {}
    for placement, estimator in itertools.product(("reward", "loss"), (*ESTIMATORS, "full")):
        if reason := why_wrong(placement, estimator):
            refused[placement, estimator] = reason
    assert refused.keys() == {("loss", "k1"), ("reward", "k2"), ("reward", "k3"), ("reward", "full")}
    assert all(": use k" in reason for reason in refused.values())


@pytest.mark.parametrize(
    ("observed", "change"),
    [
        (6.0, 0.0),  # the target
        (6.6, 0.1),
        (5.4, -0.1),
        (7.2, 0.2),
        (600.0, 0.2),
        (0.0, -0.2),
        (-3.0, -0.2),
    ],
)
def test_the_coefficient_goes_after_the_target_by_a_fifth_of_a_horizon_at_most(observed, change):
    np.testing.assert_allclose(adapt(np.float32(0.5), np.float32(observed), 6.0, 100.0, 10), (
        0.5 * (1 + change * 10 / 100)), rtol=1e-6)  # fmt: skip


def test_the_target_is_where_the_coefficient_stays():
    # A policy whose KL falls as the coefficient rises ends on target.
    coef, step = np.float32(0.01), jax.jit(lambda coef: adapt(coef, 2.0 / (coef + 0.1), 6.0, 100.0, 50))
    for _ in range(100):
        coef = step(coef)
    np.testing.assert_allclose(2.0 / (coef + 0.1), 6.0, rtol=1e-3)
