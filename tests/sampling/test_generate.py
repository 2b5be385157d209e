import dataclasses
import functools

import jax
import numpy as np
from scipy import stats

from rlaif_jax.models.parameters import decoding_model, decoding_parameters
from rlaif_jax.models.transformer import LanguageModel
from rlaif_jax.sampling.generate import generate
from rlaif_jax.training.sequences import Sequences, response_logprobs
from tests.helpers import (
    EOS,
    SAMPLING,
    STOPPING,
    full_logits,
    one_device,
    random_params,
    random_sequences,
    tiny,
)

MODEL = LanguageModel(tiny())
PARAMS = random_params(MODEL)
ROWS, NEW, TEMPERATURE = 256, 8, 0.7
PROMPTS = random_sequences(0, ROWS)
ROW_IDS = np.arange(ROWS, dtype=np.int32)


def sample(
    tokens=PROMPTS.prompts, mask=PROMPTS.prompt_mask, row_ids=ROW_IDS, seed=0, temperature=TEMPERATURE, params=PARAMS
):
    replies = generate(
        decoding_model(MODEL),
        decoding_parameters(MODEL, params, one_device()),
        tokens,
        mask,
        jax.random.key(seed),
        row_ids,
        STOPPING,
        max_new_tokens=NEW,
        sampling=dataclasses.replace(SAMPLING, temperature=temperature),
        cache_dtype="float32",
    )
    return jax.device_get(replies.samples)


SAMPLES = functools.cache(sample)


def unpadded(row):
    """A row's prompt from position 0 on, with room for a response; what follows a token can't change its state."""
    prompt = PROMPTS.prompts[row][PROMPTS.prompt_mask[row]]
    return np.pad(prompt, (0, PROMPTS.prompts.shape[1] + NEW - len(prompt)))[None]


def test_end_of_sequence_is_kept_and_nothing_follows_it():
    tokens, mask, logprobs, _ = SAMPLES()
    ended = (tokens == EOS).any(1)
    assert 0 < ended.sum() < ROWS
    lengths = np.where(ended, (tokens == EOS).argmax(1) + 1, NEW)
    assert np.array_equal(mask, np.arange(NEW) < lengths[:, None])
    assert not tokens[~mask].any()
    assert not logprobs[~mask].any()
    assert np.all(logprobs[mask] < 0)


def test_sampler_logprobs_equal_those_of_a_full_forward_at_the_temperature():
    tokens, mask, logprobs, raw = SAMPLES()
    sequences = Sequences(PROMPTS.prompts, PROMPTS.prompt_mask, tokens, mask)
    for found, temperature in ((logprobs, TEMPERATURE), (raw, 1.0)):
        expected = jax.jit(response_logprobs, static_argnums=(0, 3))(MODEL, PARAMS, sequences, temperature)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_text_is_a_function_of_the_key():
    assert np.array_equal(SAMPLES().tokens, sample().tokens)
    assert np.mean(SAMPLES().tokens[:, 0] != sample(seed=1).tokens[:, 0]) > 0.5


def test_each_token_of_a_row_has_noise_of_its_own():
    tokens = sample(params=jax.tree.map(np.zeros_like, PARAMS)).tokens  # every token equally likely
    assert np.mean(tokens[:, 0] == tokens[:, 1]) < 0.1


def test_rows_of_one_prompt_differ_by_their_ids_alone():
    first = np.zeros(ROWS, int)
    tokens = sample(PROMPTS.prompts[first], PROMPTS.prompt_mask[first]).tokens
    assert len(np.unique(tokens, axis=0)) > ROWS / 2
    same = sample(PROMPTS.prompts[first], PROMPTS.prompt_mask[first], np.zeros_like(ROW_IDS)).tokens
    assert len(np.unique(same, axis=0)) == 1


def test_several_replies_to_a_prompt_read_once_equal_those_to_a_prompt_read_for_each():
    copied = np.repeat(np.arange(ROWS // 4), 4)
    apart = sample(PROMPTS.prompts[copied], PROMPTS.prompt_mask[copied])
    shared = sample(PROMPTS.prompts[: ROWS // 4], PROMPTS.prompt_mask[: ROWS // 4])
    assert np.array_equal(shared.tokens, apart.tokens)
    np.testing.assert_allclose(shared.logprobs, apart.logprobs, atol=1e-4)


def test_a_row_gives_the_same_text_in_any_order_of_rows():
    order = np.random.default_rng(0).permutation(ROWS)
    shuffled = sample(PROMPTS.prompts[order], PROMPTS.prompt_mask[order], ROW_IDS[order])
    assert np.array_equal(shuffled.tokens, SAMPLES().tokens[order])


def test_a_row_gives_the_same_text_in_a_smaller_batch_with_more_padding():
    rows, widths = slice(10, 26), ((0, 0), (3, 0))
    tokens = np.pad(PROMPTS.prompts[rows], widths, constant_values=9)
    few = sample(tokens, np.pad(PROMPTS.prompt_mask[rows], widths), ROW_IDS[rows])
    assert np.array_equal(few.tokens, SAMPLES().tokens[rows])
    np.testing.assert_allclose(few.logprobs, SAMPLES().logprobs[rows], atol=1e-4)


def test_greedy_equals_a_loop_of_full_forwards():
    samples = sample(temperature=0.0)
    for row in range(3):
        text, start = unpadded(row), PROMPTS.prompt_mask[row].sum()
        for t in range(samples.mask[row].sum()):
            logits = full_logits(MODEL, PARAMS, text)[0, start + t - 1]
            text[0, start + t] = logits.argmax()
            assert samples.tokens[row, t] == logits.argmax()
            np.testing.assert_allclose(samples.logprobs[row, t], jax.nn.log_softmax(logits).max(), atol=1e-4)


def test_first_tokens_are_drawn_from_the_softmax_at_the_temperature():
    logits = full_logits(MODEL, PARAMS, unpadded(0))[0, PROMPTS.prompt_mask[0].sum() - 1]
    rows = np.zeros(ROWS, int)
    drawn = [sample(PROMPTS.prompts[rows], PROMPTS.prompt_mask[rows], seed=seed).tokens[:, 0] for seed in range(12)]
    counts = np.bincount(np.concatenate(drawn), minlength=64)
    expected = np.exp(logits.astype(np.float64) / TEMPERATURE)
    expected *= counts.sum() / expected.sum()
    common = expected > 5
    observed = np.append(counts[common], counts[~common].sum())
    assert stats.chisquare(observed, np.append(expected[common], expected[~common].sum())).pvalue > 0.001
