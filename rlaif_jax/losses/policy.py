"""PPO: the clipped policy loss and the clipped value loss (Schulman et al., arXiv 1707.06347)."""

import jax
import jax.numpy as jnp


def ppo_policy_loss(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array, clip_ratio: float
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """-min(ratio * A, clip(ratio) * A) per token (equation 7).

    Args, each [batch, length] and aligned with the response tokens:
      logprobs: of the response tokens under the parameters being trained.
      old_logprobs: the same under the parameters that the rollout began with, frozen.
      advantages: whitened.
      mask: 1 on response tokens, end-of-sequence included.

    Returns (sum over tokens, number of tokens, sums of metrics over tokens).
    """
    mask = mask.astype(jnp.float32)
    log_ratio = (logprobs - old_logprobs) * mask
    ratio = jnp.exp(log_ratio)
    unclipped = ratio * advantages
    clipped = jnp.clip(ratio, 1 - clip_ratio, 1 + clip_ratio) * advantages
    sums = {
        "clip_fraction": jnp.sum((clipped < unclipped) * mask),
        "approx_kl": jnp.sum((ratio - 1 - log_ratio) * mask),  # k3 of old against new
        "ratio": jnp.sum(ratio * mask),
    }
    return -jnp.sum(jnp.minimum(unclipped, clipped) * mask), jnp.sum(mask), sums


def clipped_value_loss(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, mask: jax.Array, clip_value: float
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """0.5 * max((V - R)^2, (clip(V) - R)^2), V held within clip_value of the rollout's (arXiv 2403.17031).

    Args: each [batch, length], aligned with the response tokens as in `advantages.gae`.
    Returns (sum over tokens, number of tokens, sums of metrics over tokens).
    """
    mask = mask.astype(jnp.float32)
    clipped = jnp.clip(values, old_values - clip_value, old_values + clip_value)
    error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2
    sums = {"value/clip_fraction": jnp.sum((clipped_error > error) * mask)}
    return 0.5 * jnp.sum(jnp.maximum(error, clipped_error) * mask), jnp.sum(mask), sums
