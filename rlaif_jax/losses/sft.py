"""Supervised fine-tuning: cross-entropy of the completion."""

import jax
import jax.numpy as jnp


def completion_loss(logprobs: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of the completion tokens.

    Args:
      logprobs: [batch, length] float32; logprobs[:, t] is of completion token t.
      mask: [batch, length]; 1 on completion tokens, end-of-sequence included; 0 on padding.

    Returns (sum over tokens in nats, number of tokens).
    """
    mask = mask.astype(jnp.float32)
    return -jnp.sum(logprobs * mask), jnp.sum(mask)
