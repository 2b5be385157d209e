"""Policy-gradient losses per token, how they are summed, and the clipped value loss.

Every argument is [batch, length] and aligned with the response tokens:
  logprobs: of the response tokens under the parameters being trained.
  old_logprobs: the same under the parameters before the first update on this rollout, frozen.
  advantages: of each token, frozen.
  mask: 1 on the tokens that count, end-of-sequence included.
"""

import jax
import jax.numpy as jnp

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum")
Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, weight)


def clipped_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> tuple[jax.Array, Metrics]:
    """PPO: -min(ratio * A, clip(ratio) * A) (Schulman et al., arXiv 1707.06347, equation 7).

    The ratio is held between 1 - clip_low and 1 + clip_high; a larger clip_high is DAPO's "clip-higher" (Yu et al.,
    arXiv 2503.14476). dual_clip: where A < 0 the loss is at most dual_clip * -A (Ye et al., arXiv 1912.09729); 0: off.

    Returns ([batch, length] float32, 0 off the mask; metrics).
    """
    mask = mask.astype(jnp.float32)
    log_ratio = (logprobs - old_logprobs) * mask
    ratio = jnp.exp(log_ratio)
    unclipped = ratio * advantages
    gain = jnp.minimum(unclipped, jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages)
    clipped = gain < unclipped
    if dual_clip:
        least = dual_clip * advantages
        clipped |= (advantages < 0) & (gain < least)
        gain = jnp.where(advantages < 0, jnp.maximum(gain, least), gain)
    tokens = jnp.sum(mask)
    metrics = {
        "clip_fraction": (jnp.sum(clipped * mask), tokens),
        "approx_kl": (jnp.sum((ratio - 1 - log_ratio) * mask), tokens),  # k3 of old against new
        "ratio": (jnp.sum(ratio * mask), tokens),
    }
    return -gain * mask, metrics


def reinforce_loss(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array
) -> tuple[jax.Array, Metrics]:
    """-log-prob * A: no ratio, no clip (Williams, 1992), right for one update on each rollout.

    Returns as `clipped_loss`.
    """
    mask = mask.astype(jnp.float32)
    log_ratio = (logprobs - old_logprobs) * mask
    metrics = {"approx_kl": (jnp.sum((jnp.expm1(log_ratio) - log_ratio) * mask), jnp.sum(mask))}
    return -logprobs * advantages * mask, metrics


def aggregate(losses: jax.Array, mask: jax.Array, how: str) -> tuple[jax.Array, jax.Array]:
    """(sum, weight) of losses per token, [batch, length] each, whose quotient is

    token_mean: the mean over all tokens of a batch (PPO, DAPO);
    sequence_sum: the mean over responses of their sums, the gradient of an expected reward (REINFORCE, RLOO, Dr. GRPO);
    sequence_mean: the mean over responses of their means (GRPO), in which a token of a long response counts less.
    """
    mask = mask.astype(jnp.float32)
    lengths = jnp.sum(mask, axis=1)
    if how == "token_mean":
        return jnp.sum(losses * mask), jnp.sum(lengths)
    sums = jnp.sum(losses * mask, axis=1)
    if how == "sequence_mean":
        sums /= jnp.maximum(lengths, 1.0)
    return jnp.sum(sums), jnp.sum(lengths > 0).astype(jnp.float32)


def truncated_weights(old_logprobs: jax.Array, sampler_logprobs: jax.Array, cap: float) -> jax.Array:
    """min(old / sampler, cap): how much likelier the trained policy was to draw a token than what drew it.

    Truncated importance sampling (Ionides, 2008): for samples of another kernel, dtype or older parameters.
    """
    return jnp.minimum(jnp.exp(old_logprobs - sampler_logprobs), cap)


def clipped_value_loss(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, mask: jax.Array, clip_value: float
) -> tuple[jax.Array, jax.Array, Metrics]:
    """0.5 * max((V - R)^2, (clip(V) - R)^2), V held within clip_value of the rollout's (arXiv 2403.17031).

    With clip_value 0 it is 0.5 * (V - R)^2.
    Returns (sum over tokens, number of tokens, metrics).
    """
    mask = mask.astype(jnp.float32)
    tokens, error = jnp.sum(mask), (values - returns) ** 2
    clipped = jnp.clip(values, old_values - clip_value, old_values + clip_value) if clip_value else values
    clipped_error = (clipped - returns) ** 2
    metrics = {"value/clip_fraction": (jnp.sum((clipped_error > error) * mask), tokens)}
    return 0.5 * jnp.sum(jnp.maximum(error, clipped_error) * mask), tokens, metrics
