"""Estimators of KL(policy || reference) from sampled tokens (Schulman, "Approximating KL divergence", 2020)."""

import jax
import jax.numpy as jnp


def k1(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """log(policy / reference) per token: unbiased, may be negative. Any shape, float32, nats."""
    return logprobs - ref_logprobs


def k3(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """(r - 1) - log r with r = reference / policy: unbiased, never negative. Any shape, float32, nats."""
    log_ratio = ref_logprobs - logprobs
    return jnp.expm1(log_ratio) - log_ratio
