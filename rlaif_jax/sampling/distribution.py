"""The distribution that a token is drawn from: temperature, then top-k, top-p and min-p."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn. The filters apply in this order, each to what those before it have left."""

    temperature: float  # of the softmax; 0 takes the likeliest token
    top_k: int  # the likeliest k tokens; 0: all
    top_p: float  # the fewest likeliest tokens with at least this probability together (Holtzman et al., 1904.09751)
    min_p: float  # tokens with at least this share of the likeliest one's probability (Nguyen et al., 2407.01082)


def filter_logits(logits: jax.Array, config: SamplingConfig) -> jax.Array:
    """Logits of the distribution sampled from, -inf for what is left out. [rows, vocab] float32 -> the same.

    The temperature must be positive. At least the likeliest token stays; equal logits stay or go together.
    """
    logits = logits / config.temperature
    if config.top_k:
        least = jax.lax.top_k(logits, min(config.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if config.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ordered, axis=-1)
        inside = jnp.cumsum(probs, axis=-1) - probs < config.top_p  # what comes before it does not reach top_p
        least = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if config.min_p > 0:
        least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(config.min_p)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def draw(logits: jax.Array, keys: jax.Array, config: SamplingConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One token a row, drawn with the row's own key.

    logits: [rows, vocab] float32; keys: [rows] typed keys.

    Returns (tokens int32, log-probs under the distribution sampled from, log-probs under softmax(logits)), each
    [rows]. At temperature 0 both are the latter.
    """
    raw = jax.nn.log_softmax(logits, axis=-1)
    if config.temperature == 0:
        tokens, sampled = _argmax(logits), raw
    else:
        filtered = filter_logits(logits, config)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, filtered.shape[1:]))(keys)
        tokens = _argmax(filtered + noise)
        sampled = jax.nn.log_softmax(filtered, axis=-1)

    def chosen(logprobs):
        return jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]

    return tokens, chosen(sampled), chosen(raw)


def _argmax(x: jax.Array) -> jax.Array:
    """As jnp.argmax along the last axis, [rows, vocab] -> [rows] int32: first of the blocks' largest, then in a block.

    XLA's CPU backend takes the largest of many numbers ten times as fast as its index.
    """
    rows, vocab = x.shape
    blocks = jnp.pad(x, ((0, 0), (0, -vocab % _BLOCK)), constant_values=-jnp.inf).reshape(rows, -1, _BLOCK)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * _BLOCK + jnp.argmax(inside, axis=-1)).astype(jnp.int32)


_BLOCK = 256
