"""Sampling as one program: one prefill, then a decode loop that stops when every row is done."""

import functools

import jax
import jax.numpy as jnp

from rlaif_jax.models.cache import empty_cache
from rlaif_jax.models.transformer import LanguageModel
from rlaif_jax.sampling.decode import Replies, choose, decode, new_replies, prefill, row_keys
from rlaif_jax.sampling.distribution import SamplingConfig
from rlaif_jax.sampling.stopping import Stopping


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "sampling", "cache_dtype"))
def generate(
    model: LanguageModel,
    parameters,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    key: jax.Array,
    row_ids: jax.Array,
    stopping: Stopping,
    *,
    max_new_tokens: int,
    sampling: SamplingConfig,
    cache_dtype: str,
) -> Replies:
    """Samples replies to each prompt; the cache of what it returns is None.

    The random number of a token depends on `key`, on the row's id and on the token's position in the reply only, so
    a row gives the same text in any batch.

    Args:
      model, parameters: of `models.parameters.decoding_model` and `decoding_parameters`.
      prompts: [prompts, prompt_length] int32, padded on the left.
      prompt_mask: [prompts, prompt_length], 1 on the prompt's tokens.
      key: a typed PRNG key.
      row_ids: [rows] int32; rows are a multiple of the prompts, and as many consecutive ones reply to one prompt,
        which is read once.
      cache_dtype: of the keys and values kept: float32, bfloat16 or int8.
    """
    rows = len(row_ids)
    logits, prompt = prefill(model, parameters, prompts, prompt_mask, (), cache_dtype)
    copies = rows // len(prompts)
    lengths = jnp.repeat(jnp.sum(prompt_mask, axis=1, dtype=jnp.int32), copies)
    cache = empty_cache(prompt, rows, max_new_tokens)
    replies = new_replies(lengths, row_keys(key, row_ids), max_new_tokens, stopping, cache)
    replies = choose(replies, jnp.repeat(logits, copies, axis=0), sampling, stopping)
    step = functools.partial(decode, model, parameters, prefixes=(prompt,), sampling=sampling, stopping=stopping)
    return jax.lax.while_loop(lambda replies: ~jnp.all(replies.done), step, replies).replace(cache=None)
