import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.models.transformer import LanguageModel, ScalarModel, empty_cache, unembedding
from tests.helpers import apply, assert_trees_close, random_params, random_tokens, tiny

MODEL = LanguageModel(tiny())
PARAMS = random_params(MODEL)
LENGTH = 8
TOKENS = random_tokens(0, 2, LENGTH)
ONES = np.ones_like(TOKENS)


def hidden(tokens=TOKENS, segment_ids=ONES, prefix=None):
    return np.asarray(apply(MODEL, PARAMS, tokens, segment_ids, prefix=prefix)[0])


def cached(tokens, segment_ids, cache, positions=None):
    state, cache = apply(MODEL, PARAMS, tokens, segment_ids, positions, cache)
    return np.asarray(state), cache


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(model, segment_ids):
    return jax.value_and_grad(lambda params: jnp.sum(model.apply({"params": params}, TOKENS, segment_ids)[0] ** 3))(
        PARAMS
    )


def changed(array, index, value):
    array = np.array(array)
    array[index] = value
    return array


def assert_close(a, b):
    np.testing.assert_allclose(a, b, atol=2e-5)


def padded(before: int, after: int):
    widths = ((0, 0), (before, after))
    return np.pad(TOKENS, widths, constant_values=7), np.pad(ONES, widths)


def test_a_token_changes_its_own_state_and_later_ones_only():
    other = hidden(changed(TOKENS, np.s_[:, 4], TOKENS[:, 4] % 60 + 2))
    assert_close(other[:, :4], hidden()[:, :4])
    assert np.all(np.abs(other[:, 4:] - hidden()[:, 4:]).max(-1) > 1e-3)


def test_states_depend_on_the_order_of_earlier_tokens():
    swapped = np.concatenate([TOKENS[:, 1::-1], TOKENS[:, 2:]], axis=1)
    assert np.abs(hidden(swapped) - hidden())[:, -1].max() > 1e-3


@pytest.mark.parametrize("prefill", [1, 5])
def test_cached_decode_equals_the_full_forward(prefill):
    cache = empty_cache(MODEL.config, 2, LENGTH + 3)  # the slots left over must not be seen
    states, cache = cached(TOKENS[:, :prefill], ONES[:, :prefill], cache)
    states = [states]
    for t in range(prefill, LENGTH):
        state, cache = cached(TOKENS[:, t : t + 1], ONES[:, :1], cache, np.full((2, 1), t))
        states.append(state)
    assert_close(np.concatenate(states, axis=1), hidden())
    assert cache.length == LENGTH
    assert np.array_equal(cache.mask[0], np.arange(LENGTH + 3) < LENGTH)


def test_cached_decode_after_left_padding_equals_the_full_forward_without():
    tokens, segments = padded(3, 0)
    _, cache = cached(tokens[:, :-1], segments[:, :-1], empty_cache(MODEL.config, 2, LENGTH + 3))
    state, _ = cached(tokens[:, -1:], segments[:, -1:], cache, np.full((2, 1), LENGTH - 1))
    assert_close(state[:, 0], hidden()[:, -1])


@pytest.mark.parametrize(("before", "after"), [(3, 0), (0, 3)])
def test_padding_changes_nothing_on_real_tokens(before, after):
    assert_close(hidden(*padded(before, after))[:, before : before + LENGTH], hidden())


def test_packed_equals_unpacked():
    packed = hidden(TOKENS.reshape(1, -1), np.repeat([[1, 2]], LENGTH, axis=1))
    assert_close(packed.reshape(2, LENGTH, -1), hidden())


def test_a_shared_prefix_equals_concatenation():
    prefix, segments = random_tokens(1, 1, 3), changed(ONES, np.s_[0, -2:], 0)
    _, cache = cached(prefix, ONES[:1, :3], empty_cache(MODEL.config, 1, 3))
    joined = np.concatenate([np.repeat(prefix, 2, axis=0), TOKENS], axis=1)
    expected = hidden(joined, np.concatenate([ONES[:, :3], segments], axis=1))[:, 3:]
    real = segments.astype(bool)
    assert_close(hidden(TOKENS, segments, cache)[real], expected[real])


def test_a_fully_padded_row_is_finite_and_so_is_its_gradient():
    leaves = jax.tree.leaves(value_and_gradient(MODEL, changed(ONES, 0, 0)))
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves)


def test_remat_gives_the_same_gradient():
    remat = LanguageModel(tiny(remat=True))
    assert_trees_close(value_and_gradient(remat, ONES), value_and_gradient(MODEL, ONES), rtol=1e-4, atol=1e-3)


def test_bfloat16_computation_stays_close():
    config = tiny(dtype="bfloat16")
    states, cache = apply(LanguageModel(config), PARAMS, TOKENS, ONES, None, empty_cache(config, 2, LENGTH))
    assert states.dtype == cache.key.dtype == jnp.bfloat16
    assert 0 < np.abs(np.asarray(states, np.float32) - hidden()).max() < 0.15  # 8 bits of numbers around 1


def test_the_scalar_model_gives_one_float32_a_token():
    scores = jax.eval_shape(
        lambda: ScalarModel(tiny(dtype="bfloat16")).init_with_output(jax.random.key(0), TOKENS, ONES)
    )
    assert scores[0].shape == TOKENS.shape
    assert scores[0].dtype == jnp.float32


def test_the_scalar_model_is_a_linear_map_of_the_states():
    model = ScalarModel(tiny())
    params = random_params(model) | {"decoder": PARAMS["decoder"]}
    scores = jax.jit(model.apply)({"params": params}, TOKENS, ONES)
    assert_close(scores, hidden() @ params["kernel"][:, 0] + params["bias"])


def test_unembedding_is_the_embedding_only_where_tied():
    assert np.array_equal(unembedding(PARAMS), PARAMS["decoder"]["embedding"].T)
    untied = random_params(LanguageModel(tiny(tie_word_embeddings=False)))
    assert untied["lm_head"].shape == (32, 64)
    assert unembedding(untied) is untied["lm_head"]
