"""Supervised fine-tuning: cross-entropy of the completion."""

import jax
import jax.numpy as jnp


def completion_loss(logprobs: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of the completion tokens.

    Args:
      logprobs: [batch, length] float32; logprobs[:, t] is of token t + 1 given tokens up to t.
      mask: [batch, length]; 1 where token t + 1 belongs to the completion (end-of-sequence token included).

    Returns (sum over tokens in nats, number of tokens).
    """
    mask = mask.astype(jnp.float32)
    return -jnp.sum(logprobs * mask), jnp.sum(mask)
