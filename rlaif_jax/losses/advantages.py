"""Advantages: generalised advantage estimation and masked whitening."""

import jax
import jax.numpy as jnp


def gae(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, gamma: float, gae_lambda: float
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation (Schulman et al., arXiv 1506.02438, equation 16).

    Args:
      rewards: [batch, length] float32; rewards[:, t] follows response token t.
      values: [batch, length] float32; values[:, t] is of the state before response token t.
      mask: [batch, length]; 1 on the response tokens, end-of-sequence included, a prefix of each row.

    Returns (advantages, returns), each [batch, length] float32, zero outside the mask; returns = advantages +
    values. The value after a row's last token is 0.
    """
    mask = mask.astype(jnp.float32)
    next_values = jnp.concatenate([values[:, 1:] * mask[:, 1:], jnp.zeros_like(values[:, :1])], axis=1)
    deltas = (rewards + gamma * next_values - values) * mask

    def backwards(advantage, column):
        delta, valid = column
        advantage = (delta + gamma * gae_lambda * advantage) * valid
        return advantage, advantage

    _, advantages = jax.lax.scan(backwards, jnp.zeros_like(values[:, 0]), (deltas.T, mask.T), reverse=True)
    advantages = advantages.T
    return advantages, (advantages + values) * mask


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of x where mask is 1; 0 where nothing is."""
    mask = mask.astype(jnp.float32)
    return jnp.sum(x * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def whiten(x: jax.Array, mask: jax.Array, epsilon: float = 1e-8) -> jax.Array:
    """x with mean 0 and variance 1 over the mask, zero outside it (Huang et al., arXiv 2403.17031: biased variance)."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * jax.lax.rsqrt(variance + epsilon) * mask
