"""KL(policy || reference): estimators from sampled tokens, where each may stand, and an adaptive coefficient.

With r = reference / policy: k1 = -log r, k2 = (log r)^2 / 2, k3 = (r - 1) - log r (Schulman, "Approximating KL
divergence", 2020). All estimate the same number; as a penalty they differ in their gradients, so each has its place.
"""

import jax
import jax.numpy as jnp


def k1(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """log(policy / reference) per token: unbiased, may be negative. Any shape, float32, nats."""
    return logprobs - ref_logprobs


def k2(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """Half the squared log-ratio: never negative, biased in value; its gradient is KL(policy || reference)'s."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """(r - 1) - log r: unbiased, never negative; its gradient is that of KL(reference || policy)."""
    log_ratio = ref_logprobs - logprobs
    return jnp.expm1(log_ratio) - log_ratio


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}  # and "full", the sum over the vocabulary (`losses.logprobs`)
_WRONG = {
    ("loss", "k1"): "the expected gradient of k1 is zero, so nothing would hold the policy: use k2, k3 or full there",
    ("reward", "k2"): "a reward must be the log-ratio itself; k2 also punishes tokens that have become less likely "
    "than in the reference, and so drives them to zero: use k1 in the reward, or k2 in the loss",
    ("reward", "k3"): "a reward must be the log-ratio itself; k3 also punishes tokens that have become less likely "
    "than in the reference, and so drives them to zero: use k1 in the reward, or k3 in the loss",
    ("reward", "full"): "the sum over the vocabulary is the same for every token that may be drawn, so a reward of it "
    "can't favour any: use k1 in the reward, or full in the loss",
}


def why_wrong(placement: str, estimator: str) -> str:
    """Why a penalty there has not the gradient of a KL divergence; "" where it has."""
    return _WRONG.get((placement, estimator), "")


def adapt(coef: jax.Array, observed: jax.Array, target: float, horizon: float, episodes: int) -> jax.Array:
    """The coefficient that drives the KL towards `target` (Ziegler et al., arXiv 1909.08593, section 2.2).

    observed: [] float32, mean KL of a response in nats; it may be negative. A change takes about `horizon` episodes.
    """
    error = jnp.clip(observed / target - 1, -0.2, 0.2)
    return coef * (1 + error * episodes / horizon)
