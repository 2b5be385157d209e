"""The one decoding step, on rows that may each be at another position of their replies."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from rlaif_jax.models.cache import KVCache, compress
from rlaif_jax.models.transformer import LanguageModel, unembedding
from rlaif_jax.sampling.distribution import SamplingConfig, draw
from rlaif_jax.sampling.stopping import Stopping


class Samples(NamedTuple):
    """What was sampled, aligned with the response tokens; all are 0 off the mask."""

    tokens: jax.Array  # [rows, max_new_tokens] int32, the token that ends a reply kept
    mask: jax.Array  # [rows, max_new_tokens] bool, true up to and including the token that ends the reply
    logprobs: jax.Array  # [rows, max_new_tokens] float32, of the distribution sampled from
    raw_logprobs: jax.Array  # [rows, max_new_tokens] float32, at temperature 1 and unfiltered


class Replies(struct.PyTreeNode):
    """Replies in the making, one a row."""

    samples: Samples
    length: jax.Array  # [rows] int32: tokens so far
    done: jax.Array  # [rows] bool
    ended: jax.Array  # [rows] bool: done by an end of sequence or a stop string, not by the limit
    prompt_length: jax.Array  # [rows] int32: tokens before the reply, shared prefixes included
    keys: jax.Array  # [rows] typed keys
    window: jax.Array  # [rows, bytes] uint8, see `Stopping`
    cache: KVCache  # of the replies' tokens but the last


def new_replies(
    prompt_length: jax.Array, keys: jax.Array, max_new_tokens: int, stopping: Stopping, cache: KVCache | None
) -> Replies:
    """Replies without a token, to prompts of these lengths [rows]."""
    rows, shape = len(keys), (len(keys), max_new_tokens)
    zeros, no = jnp.zeros(shape, jnp.float32), jnp.zeros(rows, bool)
    return Replies(
        samples=Samples(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool), zeros, zeros),
        length=jnp.zeros(rows, jnp.int32),
        done=no,
        ended=no,
        prompt_length=prompt_length,
        keys=keys,
        window=jnp.zeros((rows, stopping.window), jnp.uint8),
        cache=cache,
    )


def row_keys(key: jax.Array, row_ids: jax.Array) -> jax.Array:
    """One key a row: a function of `key` and the row's id."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(row_ids)


def prefill(
    model: LanguageModel, parameters, tokens, mask, prefixes: tuple[KVCache, ...], cache_dtype: str
) -> tuple[jax.Array, KVCache]:
    """Reads prompts, however few: ([rows, vocab] float32 logits of the token after each, their cache).

    tokens, mask: [rows, length], padded on the left. prefixes: as `Decoder`, without padding.
    """
    segment_ids = mask.astype(jnp.int32)
    before = sum(prefix.slots for prefix in prefixes)
    positions = before + jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
    hidden, cache = model.apply(
        {"params": parameters},
        tokens,
        segment_ids,
        positions,
        prefixes=prefixes,
        keep_keys=True,
        odd=("batch", "length"),
    )
    layers = tuple(compress(layer, cache_dtype) for layer in cache.layers)
    return _logits(hidden[:, -1], parameters), cache.replace(layers=layers)


def choose(replies: Replies, logits: jax.Array, sampling: SamplingConfig, stopping: Stopping) -> Replies:
    """Draws the next token of every row that is not done.

    Its random number depends on the row's key and on the position in the reply alone.
    """
    keys = jax.vmap(jax.random.fold_in)(replies.keys, replies.length)
    tokens, logprobs, raw_logprobs = draw(logits, keys, sampling)
    rows, limit = jnp.arange(len(tokens)), replies.samples.tokens.shape[1]
    column = jnp.where(replies.done, limit, replies.length)  # out of bounds, where nothing is written
    new = Samples(tokens, jnp.ones_like(replies.done), logprobs, raw_logprobs)
    samples = jax.tree.map(lambda x, y: x.at[rows, column].set(y, mode="drop"), replies.samples, new)
    length = replies.length + ~replies.done
    window, ends = stopping.push(replies.window, tokens)
    ended = replies.ended | (ends & ~replies.done)
    return replies.replace(samples=samples, length=length, done=ended | (length >= limit), ended=ended, window=window)


def decode(
    model: LanguageModel,
    parameters,
    replies: Replies,
    prefixes: tuple[KVCache, ...],
    sampling: SamplingConfig,
    stopping: Stopping,
) -> Replies:
    """Feeds each row's last token to the model and draws the next one."""
    last = jnp.maximum(replies.length - 1, 0)
    tokens = jnp.take_along_axis(replies.samples.tokens, last[:, None], axis=1)
    positions = (replies.prompt_length + last)[:, None]
    alive = (~replies.done).astype(jnp.int32)[:, None]
    hidden, cache = model.apply(
        {"params": parameters}, tokens, alive, positions, prefixes=prefixes, cache=replies.cache
    )
    return choose(replies.replace(cache=cache), _logits(hidden[:, -1], parameters), sampling, stopping)


def _logits(hidden: jax.Array, parameters) -> jax.Array:
    return jnp.matmul(hidden, unembedding(parameters).astype(hidden.dtype), preferred_element_type=jnp.float32)
