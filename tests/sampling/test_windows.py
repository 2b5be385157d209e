"""Continuous batching of models whose attention has a window, against full forward passes."""

import jax
import numpy as np
import pytest

from rlaif_jax.models.parameters import abstract_parameters, decoding_model, decoding_parameters
from rlaif_jax.models.transformer import LanguageModel, next_token_logits
from rlaif_jax.models.weights import load_parameters, open_weights
from rlaif_jax.sampling.continuous import Sampler, SamplerConfig, sample
from rlaif_jax.sampling.distribution import SamplingConfig
from tests.helpers import STOPPING, apply, one_device
from tests.reference import families

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(2, 64, size).tolist() for size in (1, 9, 3, 7, 2, 8, 5)]  # the window is 4
GREEDY = SamplingConfig(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
(EOS,) = STOPPING.eos_token_ids


def by_full_forwards(model, params, limit):
    """The greedy replies, with no cache."""
    rows, lengths = np.zeros((len(PROMPTS), 9 + limit), np.int32), np.array([len(prompt) for prompt in PROMPTS])
    for row, prompt in zip(rows, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    for step in range(limit):
        states = np.asarray(apply(model, params, rows, np.ones_like(rows))[0])
        last = states[np.arange(len(rows)), lengths + step - 1]
        rows[np.arange(len(rows)), lengths + step] = np.argmax(next_token_logits(model, params, last), axis=1)
    replies = [row[length : length + limit].tolist() for row, length in zip(rows, lengths, strict=True)]
    return [reply[: reply.index(EOS) + 1] if EOS in reply else reply for reply in replies]


# The cache keeps limit + chunk - 1 tokens of a reply.
@pytest.mark.parametrize(
    ("case", "limit", "chunk"), [("mistral", 11, 3), pytest.param("gemma3", 2, 1, marks=pytest.mark.slow)]
)
def test_greedy_replies_in_reused_slots_are_those_of_full_forwards(tmp_path, case, limit, chunk):
    families.write_folder(case, tmp_path)
    weights = open_weights(str(tmp_path))
    model = LanguageModel(weights.config)
    params = load_parameters(weights, abstract_parameters(model, one_device()))
    config = SamplerConfig(slots=3, refill=2, chunk=chunk, prompt_buckets=1, bucket_multiple=1, cache_dtype="")
    sampler = Sampler(decoding_model(model), decoding_parameters(model, params, one_device()), one_device(), STOPPING,
                      GREEDY, limit, config)  # fmt: skip
    replies = dict(sample(sampler, PROMPTS, jax.random.key(0), range(len(PROMPTS))))
    expected = by_full_forwards(model, params, limit)
    assert [replies[row].tokens.tolist() for row in range(len(PROMPTS))] == expected
    assert len({tuple(reply) for reply in expected}) > 4
