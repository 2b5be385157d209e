import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.models.cache import compress, empty_cache
from rlaif_jax.models.parameters import decoding_model, decoding_parameters
from rlaif_jax.models.transformer import REMAT, LanguageModel, ScalarModel, unembedding
from tests.helpers import apply, assert_trees_close, one_device, random_params, random_tokens, tiny

MODEL = LanguageModel(tiny())
PARAMS = random_params(MODEL)
LENGTH = 8
TOKENS = random_tokens(0, 2, LENGTH)
ONES = np.ones_like(TOKENS)


DECODER = decoding_model(MODEL)
DECODER_PARAMS = decoding_parameters(MODEL, PARAMS, one_device())


def hidden(tokens=TOKENS, segment_ids=ONES, positions=None, **arguments):
    return np.asarray(apply(MODEL, PARAMS, tokens, segment_ids, positions, **arguments)[0])


def read(tokens, segment_ids, dtype="float32"):
    """The states of a prompt, and its cache."""
    states, cache = apply(DECODER, DECODER_PARAMS, tokens, segment_ids, keep_keys=True)
    return np.asarray(states), cache.replace(layers=tuple(compress(layer, dtype) for layer in cache.layers))


def decode(tokens, prompt, slots):
    """The states of tokens that are decoded one by one after a prompt, each row from its own number of slots on."""
    cache, states = empty_cache(prompt, len(tokens), slots), []
    before = np.sum(prompt.mask, axis=1, keepdims=True)
    ones = np.ones((len(tokens), 1), np.int32)
    for t in range(tokens.shape[1]):
        state, cache = apply(
            DECODER, DECODER_PARAMS, tokens[:, t : t + 1], ones, before + t, prefixes=(prompt,), cache=cache
        )
        states.append(np.asarray(state))
    return np.concatenate(states, axis=1), cache


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
    states, prompt = read(TOKENS[:, :prefill], ONES[:, :prefill])
    decoded, cache = decode(TOKENS[:, prefill:], prompt, LENGTH + 3)  # the slots left over must not be seen
    assert_close(np.concatenate([states, decoded], axis=1), hidden())
    assert cache.length == LENGTH - prefill
    assert np.array_equal(cache.mask[0], np.arange(LENGTH + 3) < LENGTH - prefill)


def test_cached_decode_after_left_padding_equals_the_full_forward_without():
    tokens, segments = padded(3, 0)
    decoded, _ = decode(TOKENS[:, -2:], read(tokens[:, :-2], segments[:, :-2])[1], 2)
    assert_close(decoded, hidden()[:, -2:])


def test_a_prompt_is_shared_by_consecutive_rows():
    _, prompt = read(TOKENS[:, :5], ONES[:, :5])
    tails = random_tokens(3, 4, 3)
    expected = hidden(np.concatenate([np.repeat(TOKENS[:, :5], 2, axis=0), tails], axis=1), np.ones((4, LENGTH), int))
    cache, ones = empty_cache(prompt, 4, 3), np.ones((4, 1), np.int32)
    for t in range(3):
        positions = np.full((4, 1), 5 + t)
        state, cache = apply(
            DECODER, DECODER_PARAMS, tails[:, t : t + 1], ones, positions, prefixes=(prompt,), cache=cache
        )
        assert_close(state[:, 0], expected[:, 5 + t])


def test_a_cache_that_is_full_begins_anew_at_its_first_slot():
    _, prompt = read(TOKENS[:, :2], ONES[:, :2])
    states, cache = decode(TOKENS[:, 2:], prompt, 3)
    assert_close(states[:, :3], hidden()[:, 2:5])  # afterwards the oldest tokens are gone
    assert cache.length == LENGTH - 2
    assert cache.mask.all()


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("int8", 0.05)])
def test_a_compressed_cache_stays_close(dtype, tolerance):
    _, prompt = read(TOKENS[:, :5], ONES[:, :5], dtype)
    decoded, cache = decode(TOKENS[:, 5:], prompt, 3)
    assert cache.layers[0].key.dtype == dtype
    assert 0 < np.abs(decoded - hidden()[:, 5:]).max() < tolerance


@pytest.mark.parametrize(("before", "after"), [(3, 0), (0, 3)])
def test_padding_changes_nothing_on_real_tokens(before, after):
    assert_close(hidden(*padded(before, after))[:, before : before + LENGTH], hidden())


def test_packed_equals_unpacked():
    packed = hidden(TOKENS.reshape(1, -1), np.repeat([[1, 2]], LENGTH, axis=1))
    assert_close(packed.reshape(2, LENGTH, -1), hidden())


def test_a_shared_prefix_equals_concatenation():
    prefix, segments = random_tokens(1, 1, 3), changed(ONES, np.s_[0, -2:], 0)
    _, cache = apply(MODEL, PARAMS, prefix, ONES[:1, :3], keep_keys=True)
    joined = np.concatenate([np.repeat(prefix, 2, axis=0), TOKENS], axis=1)
    expected = hidden(joined, np.concatenate([ONES[:, :3], segments], axis=1))[:, 3:]
    real, positions = segments.astype(bool), 3 + np.arange(LENGTH)[None].repeat(2, axis=0)
    for whole in (cache, cache.replace(mask=None)):
        assert_close(hidden(TOKENS, segments, positions, prefixes=(whole,))[real], expected[real])


def test_branches_of_a_tree_do_not_see_each_other():
    # A trunk of 4 tokens and branches of 2 and 2: the branches' states are those of two rows with the same beginning.
    ends = np.array([[8, 8, 8, 8, 6, 6, 8, 8]] * 2)
    positions = np.array([[0, 1, 2, 3, 4, 5, 4, 5]] * 2)
    tree = hidden(TOKENS, ONES, positions, ends=ends)
    assert_close(tree[:, :6], hidden()[:, :6])
    second = np.concatenate([TOKENS[:, :4], TOKENS[:, 6:]], axis=1)
    assert_close(tree[:, 6:], hidden(second, ONES[:, :6])[:, 4:])


def test_a_fully_padded_row_is_finite_and_so_is_its_gradient():
    leaves = jax.tree.leaves(value_and_gradient(MODEL, changed(ONES, 0, 0)))
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves)


@pytest.mark.parametrize("name", [name for name in REMAT if name != "products"])
def test_what_is_recomputed_changes_no_gradient(name):
    remat = LanguageModel(tiny(remat=name))
    assert_trees_close(value_and_gradient(remat, ONES), value_and_gradient(MODEL, ONES), rtol=1e-4, atol=1e-3)


def test_what_is_recomputed_takes_no_memory():
    def temporary_bytes(remat):
        model = LanguageModel(tiny(remat=remat, num_hidden_layers=8))
        rows = np.ones((8, 32), np.int32)

        def loss(params):
            return jnp.sum(model.apply({"params": params}, rows, rows)[0])

        compiled = jax.jit(jax.grad(loss)).lower(random_params(model)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes("full") < temporary_bytes("attention") < temporary_bytes("products")


def test_bfloat16_computation_stays_close():
    config = tiny(dtype="bfloat16")
    states, cache = apply(LanguageModel(config), PARAMS, TOKENS, ONES, keep_keys=True)
    assert states.dtype == cache.layers.key.dtype == jnp.bfloat16
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
