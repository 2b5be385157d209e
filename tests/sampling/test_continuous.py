import dataclasses
import functools

import jax
import numpy as np
import pytest

from rlaif_jax.errors import UserError
from rlaif_jax.models.parameters import decoding_model, decoding_parameters
from rlaif_jax.models.transformer import LanguageModel
from rlaif_jax.sampling.continuous import Sampler, SamplerConfig, sample
from rlaif_jax.sampling.generate import generate
from tests.helpers import SAMPLING, STOPPING, eight_devices, one_device, random_params, tiny

MODEL = LanguageModel(tiny())
PARAMS = random_params(MODEL)
LIMIT, COPIES, LONGEST = 20, 2, 11
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(2, 64, RNG.integers(1, LONGEST + 1)).tolist() for _ in range(23)]
ROW_IDS = range(100, 100 + COPIES * len(PROMPTS))


def sampler(placement, model=MODEL, **changes):
    sizes = {"slots": 8, "refill": 2, "chunk": 5, "prompt_buckets": 2, "bucket_multiple": 4, "cache_dtype": ""}
    parameters = decoding_parameters(model, PARAMS, placement)
    config = SamplerConfig(**(sizes | changes))
    return Sampler(decoding_model(model), parameters, placement, STOPPING, SAMPLING, LIMIT, config)


@functools.cache
def at_once():
    """All replies as one batch of one length."""
    tokens, mask = np.zeros((len(PROMPTS), LONGEST), np.int32), np.zeros((len(PROMPTS), LONGEST), bool)
    for i, prompt in enumerate(PROMPTS):
        tokens[i, LONGEST - len(prompt) :], mask[i, LONGEST - len(prompt) :] = prompt, True
    replies = generate(
        decoding_model(MODEL),
        decoding_parameters(MODEL, PARAMS, one_device()),
        tokens,
        mask,
        jax.random.key(3),
        np.array(ROW_IDS, np.int32),
        STOPPING,
        max_new_tokens=LIMIT,
        sampling=SAMPLING,
        cache_dtype="float32",
    )
    return jax.device_get(replies)


def assert_equal_to_at_once(placement, **changes):
    expected = at_once()
    replies = dict(sample(sampler(placement, **changes), PROMPTS, jax.random.key(3), ROW_IDS))
    assert sorted(replies) == list(range(len(ROW_IDS)))
    for row, reply in replies.items():
        length = expected.samples.mask[row].sum()
        assert np.array_equal(reply.tokens, expected.samples.tokens[row, :length])
        np.testing.assert_allclose(reply.logprobs, expected.samples.logprobs[row, :length], atol=1e-4)
        np.testing.assert_allclose(reply.raw_logprobs, expected.samples.raw_logprobs[row, :length], atol=1e-4)
        assert reply.ended == expected.ended[row]
    assert 0 < expected.ended.sum() < len(ROW_IDS)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"slots": 16, "refill": 8, "chunk": 1, "prompt_buckets": 4},
        {"slots": 3, "refill": 4, "chunk": 30, "prompt_buckets": 1},
        {"slots": 100, "refill": 50},
    ],
)
def test_replies_do_not_depend_on_slots_refills_chunks_or_buckets(sizes):
    assert_equal_to_at_once(one_device(), **sizes)


def test_replies_do_not_depend_on_the_mesh():
    with jax.set_mesh(eight_devices().mesh):
        assert_equal_to_at_once(eight_devices())


def test_each_device_holds_the_keys_of_its_own_rows_and_heads():
    sizes = set()

    def conclude(slots):
        caches = slots.prompts, slots.replies.cache
        sizes.update(
            x.addressable_shards[0].data.size / x.size for cache in caches for x in jax.tree.leaves(cache.layers)
        )
        return slots.replies.done

    placement = eight_devices()
    with jax.set_mesh(placement.mesh):
        list(sample(sampler(placement), PROMPTS, jax.random.key(3), ROW_IDS, conclude=conclude))
    assert sizes == {1 / 8}


def test_replies_begin_to_come_before_the_last_prompt_is_read():
    replies = sample(sampler(one_device()), PROMPTS, jax.random.key(3), ROW_IDS)
    rows = [row for row, _ in replies]
    assert rows != sorted(rows)
    assert max(rows[:8]) < 30


def test_a_prefix_stands_before_every_prompt():
    shared = PROMPTS[0]
    whole = dict(sample(sampler(one_device()), [shared + prompt for prompt in PROMPTS], jax.random.key(3), ROW_IDS))
    plain = sampler(one_device())
    tokens = np.array([shared], np.int32)
    _, prefix = plain.model.apply({"params": plain.parameters}, tokens, np.ones_like(tokens), keep_keys=True)
    prefixed = dataclasses.replace(plain, prefix=prefix.replace(mask=None))
    for row, reply in sample(prefixed, PROMPTS, jax.random.key(3), ROW_IDS):
        assert np.array_equal(reply.tokens, whole[row].tokens)
        np.testing.assert_allclose(reply.logprobs, whole[row].logprobs, atol=1e-4)


def test_a_compressed_cache_changes_little():
    expected = at_once()
    rows = []
    for row, reply in sample(sampler(one_device(), cache_dtype="int8"), PROMPTS, jax.random.key(3), ROW_IDS):
        rows.append(np.array_equal(reply.tokens, expected.samples.tokens[row, : len(reply.tokens)]))
        assert abs(reply.raw_logprobs[0] - expected.samples.raw_logprobs[row, 0]) < 0.05
    assert np.mean(rows) > 0.8


def test_nothing_to_reply_to_is_no_reply():
    assert list(sample(sampler(one_device()), [], jax.random.key(0), [])) == []


def test_too_few_slots_for_the_replies_to_a_prompt_are_refused():
    with pytest.raises(UserError, match=r"sampler\.slots=1 must be at least 2"):
        list(sample(sampler(one_device(), slots=1), PROMPTS, jax.random.key(3), ROW_IDS))


@pytest.mark.parametrize(("prompts", "rows"), [([[2, 3], []], 2), ([[2, 3], [4]], 3)])
def test_an_empty_prompt_or_a_row_too_many_is_an_error(prompts, rows):
    with pytest.raises(ValueError, match="row ids for 2 prompts"):
        list(sample(sampler(one_device()), prompts, jax.random.key(3), range(rows)))
