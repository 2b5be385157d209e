"""Advantages: generalised advantage estimation, baselines from other replies to the same prompt, whitening."""

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


def leave_one_out(rewards: jax.Array, valid: jax.Array) -> jax.Array:
    """Each reward less the mean of the others' in its group (RLOO: Ahmadian et al., arXiv 2402.14740, equation 9).

    rewards: [groups, size] float32, one a reply; valid: [groups, size] bool, those that count. Returns the same shape;
    0 where a reply does not count, or no other does.
    """
    valid = valid.astype(jnp.float32)
    others = jnp.sum(valid, axis=1, keepdims=True) - 1
    baseline = (jnp.sum(rewards * valid, axis=1, keepdims=True) - rewards) / jnp.maximum(others, 1)
    return (rewards - baseline) * valid * (others > 0)


def group_relative(rewards: jax.Array, valid: jax.Array, divide_by_std: bool, epsilon: float = 1e-4) -> jax.Array:
    """Each reward less the mean of its group, and over its standard deviation (GRPO: Shao et al., arXiv 2402.03300).

    Without the division: Dr. GRPO (Liu et al., arXiv 2503.20783). The mean holds the reply itself, so in expectation
    the gradient is (size - 1) / size times that of the expected reward. Arguments as for `leave_one_out`; the deviation
    is the population's.
    """
    valid = valid.astype(jnp.float32)
    count = jnp.maximum(jnp.sum(valid, axis=1, keepdims=True), 1)
    centred = (rewards - jnp.sum(rewards * valid, axis=1, keepdims=True) / count) * valid
    if not divide_by_std:
        return centred
    return centred / (jnp.sqrt(jnp.sum(centred**2, axis=1, keepdims=True) / count) + epsilon)


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of x where mask is 1; 0 where nothing is."""
    mask = mask.astype(jnp.float32)
    return jnp.sum(x * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def whiten(x: jax.Array, mask: jax.Array, epsilon: float = 1e-8, shift_mean: bool = True) -> jax.Array:
    """x with variance 1 over the mask, zero outside it (Huang et al., arXiv 2403.17031: biased variance).

    shift_mean: False leaves the mean where it was, for rewards.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return ((x - mean) * jax.lax.rsqrt(variance + epsilon) + (0.0 if shift_mean else mean)) * mask
