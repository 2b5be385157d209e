"""Sampling from a language model: one prefill, then a decode loop that stops when every row is done."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlaif_jax.models.transformer import KVCache, LanguageModel, empty_cache, unembedding


class Samples(NamedTuple):
    """What was sampled, aligned with the response tokens."""

    tokens: jax.Array  # [batch, max_new_tokens] int32, end-of-sequence token kept, 0 after it
    mask: jax.Array  # [batch, max_new_tokens] bool, true up to and including the end-of-sequence token
    logprobs: jax.Array  # [batch, max_new_tokens] float32, of the distribution sampled from; 0 outside the mask


class _State(NamedTuple):
    step: jax.Array  # [] int32: tokens decoded so far
    cache: KVCache
    logits: jax.Array  # [batch, vocab] float32, of the next token
    done: jax.Array  # [batch] bool
    samples: Samples


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "eos_token_id", "temperature"))
def generate(
    model: LanguageModel,
    parameters,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    key: jax.Array,
    row_ids: jax.Array,
    *,
    max_new_tokens: int,
    eos_token_id: int,
    temperature: float,
) -> Samples:
    """Samples one response for each prompt.

    The random number of a token depends on `key`, on the row's id and on the token's position in the response
    only, so a row gives the same text in any batch.

    Args:
      prompts: [batch, prompt_length] int32, padded on the left.
      prompt_mask: [batch, prompt_length], 1 on the prompt's tokens.
      key: a typed PRNG key.
      row_ids: [batch] int32, what tells two samples of one prompt apart.
      temperature: softmax temperature; 0 takes the likeliest token.
    """
    batch, prompt_length = prompts.shape
    segment_ids = prompt_mask.astype(jnp.int32)
    prompt_lengths = jnp.sum(segment_ids, axis=1, keepdims=True)
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(row_ids)

    def next_logits(tokens, segment_ids, cache, positions=None):
        hidden, cache = model.apply({"params": parameters}, tokens, segment_ids, positions, cache)
        logits = hidden[:, -1] @ unembedding(parameters).astype(hidden.dtype)
        return logits.astype(jnp.float32), cache

    def choose(logits, step):
        if temperature == 0:
            tokens = jnp.argmax(logits, axis=-1)
            scaled = logits
        else:
            scaled = logits / temperature
            keys = jax.vmap(lambda row_key: jax.random.fold_in(row_key, step))(row_keys)
            tokens = jax.vmap(jax.random.categorical)(keys, scaled)
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(scaled, axis=-1), tokens[:, None], axis=-1)[:, 0]
        return tokens.astype(jnp.int32), logprobs

    def decode(state: _State) -> _State:
        tokens, logprobs = choose(state.logits, state.step)
        alive = ~state.done
        samples = Samples(
            state.samples.tokens.at[:, state.step].set(jnp.where(alive, tokens, 0)),
            state.samples.mask.at[:, state.step].set(alive),
            state.samples.logprobs.at[:, state.step].set(jnp.where(alive, logprobs, 0.0)),
        )
        done = state.done | (tokens == eos_token_id)
        positions = prompt_lengths + state.step
        logits, cache = next_logits(tokens[:, None], jnp.ones((batch, 1), jnp.int32), state.cache, positions)
        return _State(state.step + 1, cache, logits, done, samples)

    cache = empty_cache(model.config, batch, prompt_length + max_new_tokens)
    logits, cache = next_logits(prompts, segment_ids, cache)
    shape = (batch, max_new_tokens)
    samples = Samples(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool), jnp.zeros(shape, jnp.float32))
    state = _State(jnp.zeros((), jnp.int32), cache, logits, jnp.zeros(batch, bool), samples)
    keep_going = lambda state: (state.step < max_new_tokens) & ~jnp.all(state.done)  # noqa: E731
    return jax.lax.while_loop(keep_going, decode, state).samples
