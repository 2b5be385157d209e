"""Prompts with responses in one layout, and what the models say of them.

Every stage uses this layout: prompts padded on the left to one length, responses padded on the right to
another, so that response token t always sits at prompt_length + t.
"""

import jax
import jax.numpy as jnp
from flax import struct

from rlaif_jax.losses.logprobs import token_logprobs
from rlaif_jax.models.transformer import LanguageModel, ScalarModel, unembedding


class Sequences(struct.PyTreeNode):
    """A batch of prompts and responses."""

    prompts: jax.Array  # [batch, prompt_length] int32, padded on the left
    prompt_mask: jax.Array  # [batch, prompt_length] bool
    responses: jax.Array  # [batch, response_length] int32, padded on the right
    response_mask: jax.Array  # [batch, response_length] bool, true up to and including end of sequence


def _joined(sequences: Sequences) -> tuple[jax.Array, jax.Array]:
    tokens = jnp.concatenate([sequences.prompts, sequences.responses], axis=1)
    mask = jnp.concatenate([sequences.prompt_mask, sequences.response_mask], axis=1)
    return tokens, mask.astype(jnp.int32)


def response_states(model: LanguageModel, params, sequences: Sequences) -> jax.Array:
    """The hidden state before each response token: [batch, response_length, width]."""
    tokens, segment_ids = _joined(sequences)
    hidden, _ = model.apply({"params": params}, tokens, segment_ids)
    return hidden[:, sequences.prompts.shape[1] - 1 : -1]


def response_logprobs(model: LanguageModel, params, sequences: Sequences, temperature: float) -> jax.Array:
    """Log-probs of the response tokens: [batch, response_length] float32, 0 off the mask."""
    return logprobs_of(model, response_states(model, params, sequences), params, sequences, temperature)


def logprobs_of(model: LanguageModel, states: jax.Array, params, sequences: Sequences, temperature: float) -> jax.Array:
    """The same from `response_states`.

    The one log-prob function of the project: policy, old policy and reference all go through it.
    """
    cap = model.config.final_logit_softcapping
    logprobs = token_logprobs(states, unembedding(params), sequences.responses, temperature, cap=cap)
    return jnp.where(sequences.response_mask, logprobs, 0.0)


def response_values(model: ScalarModel, params, sequences: Sequences) -> jax.Array:
    """The value of the state before each response token: [batch, response_length] float32, 0 off the mask."""
    scores = model.apply({"params": params}, *_joined(sequences))
    start = sequences.prompts.shape[1] - 1
    return jnp.where(sequences.response_mask, scores[:, start:-1], 0.0)


def response_rewards(model: ScalarModel, params, sequences: Sequences) -> jax.Array:
    """The reward at each response's last token (end of sequence where there is one): [batch] float32."""
    scores = model.apply({"params": params}, *_joined(sequences))
    last = sequences.prompts.shape[1] + jnp.sum(sequences.response_mask, axis=1) - 1
    return jnp.take_along_axis(scores, last[:, None], axis=1)[:, 0]
