"""Every family of decoders against transformers (tests/reference/families), and against itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.losses.logprobs import token_logprobs
from rlaif_jax.models.cache import KVCache, empty_cache
from rlaif_jax.models.layouts import in_our_layout
from rlaif_jax.models.parameters import (
    Placement,
    abstract_parameters,
    decoding_model,
    decoding_parameters,
    place_parameters,
)
from rlaif_jax.models.transformer import LanguageModel, next_token_logits, unembedding
from rlaif_jax.models.weights import load_parameters, open_weights
from rlaif_jax.parallel.mesh import make_mesh, shard_batch
from rlaif_jax.sampling.decode import prefill
from tests.helpers import assert_trees_close, axes, one_device, stand_in_for_cudnn
from tests.reference import families, make_families_reference

ATTENTION = {"gpt2": "transformer.h.1.attn.c_attn.weight"}


def loaded(folder):
    weights = open_weights(str(folder))
    model = LanguageModel(weights.config)
    return model, load_parameters(weights, abstract_parameters(model, one_device()))


@pytest.fixture(scope="module", params=families.CASES)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    families.write_folder(request.param, folder)
    return request.param, *loaded(folder)


@pytest.mark.parametrize("source", ["committed", pytest.param("live", marks=pytest.mark.peer)])
def test_logits_and_gradients_equal_those_of_transformers(case, source):
    name, model, params = case
    expected = make_families_reference.reference(name) if source == "live" else families.read(name)[1]
    tokens = expected["tokens"]

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        hidden, _ = model.apply({"params": params}, tokens, jnp.ones_like(tokens))
        cap = model.config.final_logit_softcapping
        logprobs = token_logprobs(hidden[:, :-1], unembedding(params), tokens[:, 1:], cap=cap)
        return -jnp.sum(logprobs), next_token_logits(model, params, hidden)

    (value, logits), gradient = loss(params)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    np.testing.assert_allclose(value, expected["loss"], rtol=1e-5)
    for full, of_tensor in expected.items():
        if full.startswith("gradient."):
            check_gradient(full.removeprefix("gradient."), gradient["decoder"], of_tensor, model.config)


def check_gradient(tensor, decoder, expected, config):
    if "embed" in tensor or "wte" in tensor:
        found = {"embedding": decoder["embedding"]}
    else:
        parts = ("query", "key", "value") if "q_proj" not in tensor else ("query",)
        found = {part: decoder["layers"][part][1] for part in parts}
    for name, ours in found.items():
        np.testing.assert_allclose(ours, in_our_layout(name, expected, config), rtol=1e-3, atol=2e-4)


DECODED = [  # by default those that differ in what a cache must know
    case if case in ("mistral", "gemma3", "gpt2", "gpt_neox") else pytest.param(case, marks=pytest.mark.slow)
    for case in families.CASES
]
LENGTH = 16  # four times the window of those that have one
TOKENS = np.random.default_rng(7).integers(3, 64, (2, LENGTH)).astype(np.int32)
COUNT = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
ONES = np.ones_like(TOKENS)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens, segment_ids, positions, ends):
    hidden, cache = model.apply({"params": params}, tokens, segment_ids, positions, ends, keep_keys=True)
    return next_token_logits(model, params, hidden), cache


def logits_of(case, tokens, segment_ids=ONES, positions=COUNT, ends=ONES * LENGTH):
    return np.asarray(forward(*case[1:], tokens, segment_ids, positions, ends)[0])


@functools.partial(jax.jit, static_argnums=0)
def in_steps(model, params, shared, prompts, mask, tail):
    """Logits of prompts, padded on the left, after a prefix that all share, and of what is decoded after them."""
    before = shared.slots + jnp.sum(mask, axis=1)
    logits, prompt = prefill(model, params, prompts, mask, (shared,), "float32")

    def step(carry, tokens):
        cache, positions = carry
        hidden, cache = model.apply(
            {"params": params},
            tokens[:, None],
            jnp.ones_like(tokens)[:, None],
            positions[:, None],
            prefixes=(shared, prompt),
            cache=cache,
        )
        return (cache, positions + 1), next_token_logits(model, params, hidden[:, 0])

    slots = tail.shape[1] + 2  # those left over must not be seen
    _, decoded = jax.lax.scan(step, (empty_cache(prompt, len(prompts), slots), before), tail.T)
    return jnp.concatenate([logits[:, None], jnp.moveaxis(decoded, 0, 1)], axis=1)


def cut(cache, layers, slots):
    """The first slots of the first row, as what every row of a model with a tree for each layer is read after."""
    keys = tuple(jax.tree.map(lambda x: x[i, :1, :slots], cache.layers) for i in range(layers))  # noqa: B023
    return KVCache(keys, None, cache.length, None if cache.positions is None else cache.positions[:1, :slots])


@pytest.mark.parametrize("case", DECODED, indirect=True)
def test_decoding_after_a_shared_prefix_and_padded_prompts_equals_the_full_forward(case):
    _, model, params = case
    rows = np.concatenate([TOKENS[:1, :6].repeat(2, axis=0), TOKENS[:, 6:]], axis=1)
    # Of 4 tokens the second prompt has but 2, and its reply follows them at once.
    mask = np.array([[1, 1, 1, 1], [0, 0, 1, 1]], bool)
    whole = np.stack([rows[0], np.concatenate([rows[1, :6], rows[1, 8:], rows[1, 6:8]])])
    expected, cache = forward(model, params, whole, ONES, COUNT, ONES * LENGTH)
    stepped = in_steps(decoding_model(model), decoding_parameters(model, params, one_device()),
                       cut(cache, model.config.num_hidden_layers, 6), np.where(mask, rows[:, 6:10], 5), mask,
                       rows[:, 10:])  # fmt: skip
    np.testing.assert_allclose(stepped[0], expected[0, 9:], atol=1e-4)
    np.testing.assert_allclose(stepped[1], expected[1, 7:14], atol=1e-4)


def test_padding_on_either_side_changes_nothing(case):
    expected = logits_of(case, TOKENS)[:, : LENGTH - 3]
    for before, after in ((3, 0), (0, 3)):
        place = lambda x, fill: np.pad(x[:, :-3], ((0, 0), (before, after)), constant_values=fill)  # noqa: B023, E731
        found = logits_of(case, place(TOKENS, 5), place(ONES, 0), place(COUNT, 0))
        np.testing.assert_allclose(found[:, before : LENGTH - after], expected, atol=1e-4)


def test_packed_equals_unpacked(case):
    sizes = (6, 7, 3)
    segments = np.repeat([[1, 2, 3]], sizes, axis=1).repeat(2, axis=0).astype(np.int32)
    positions = np.concatenate([np.arange(size) for size in sizes])[None].repeat(2, axis=0).astype(np.int32)
    packed = np.split(logits_of(case, TOKENS, segments, positions), np.cumsum(sizes)[:-1], axis=1)
    parts = np.split(TOKENS, np.cumsum(sizes)[:-1], axis=1)
    for found, part in zip(packed, parts, strict=True):
        alone = np.pad(part, ((0, 0), (0, LENGTH - part.shape[1])))
        np.testing.assert_allclose(found, logits_of(case, alone)[:, : part.shape[1]], atol=1e-4)


def test_branches_of_a_tree_do_not_see_each_other_and_windows_go_by_position(case):
    # A trunk of 6 tokens, one of whose branches has 5, more than a window, before the other's 5.
    ends = np.tile(np.repeat([LENGTH, 11, LENGTH], [6, 5, 5]), (2, 1)).astype(np.int32)
    positions = np.tile(np.concatenate([np.arange(11), np.arange(6, 11)]), (2, 1)).astype(np.int32)
    tree = logits_of(case, TOKENS, ONES, positions, ends)
    for branch in (np.s_[6:11], np.s_[11:]):
        row = np.pad(np.concatenate([TOKENS[:, :6], TOKENS[:, branch]], axis=1), ((0, 0), (0, 5)))
        np.testing.assert_allclose(tree[:, branch], logits_of(case, row)[:, 6:11], atol=1e-4)


MESHES = {
    "tensor": axes(fsdp=4, tensor=2, replicated=("heads", "kv_heads")),  # SmolLM2's do not divide
    "sequence": axes(data=2, tensor=2, sequence=2, replicated=("heads", "kv_heads")),
}


def loss_and_gradient(model, params, placement):
    """The mean loss of 8 rows and its gradients, on the host."""
    tokens = np.random.default_rng(8).integers(3, 64, (8, LENGTH)).astype(np.int32)

    @jax.jit
    @jax.value_and_grad
    def loss(params, tokens):
        hidden, _ = model.apply({"params": params}, tokens, jnp.ones_like(tokens))
        cap = model.config.final_logit_softcapping
        return -jnp.mean(token_logprobs(hidden[:, :-1], unembedding(params), tokens[:, 1:], cap=cap))

    with jax.set_mesh(placement.mesh):
        params = place_parameters(model, params, placement)
        return jax.device_get(loss(params, shard_batch(tokens, placement.mesh)))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_losses_and_gradients_on_any_mesh_are_those_of_one_device(case, mesh):
    _, model, params = case
    params = jax.device_get(params)
    found = loss_and_gradient(model, params, Placement(make_mesh(mesh), mesh.replicated))
    assert_trees_close(found, loss_and_gradient(model, params, one_device()), rtol=1e-5, atol=1e-5)


def program(model, params, length):
    """The text of the program of a forward pass."""
    tokens = jnp.ones((2, length), jnp.int32)
    return jax.jit(model.apply).lower({"params": params}, tokens, tokens).as_text()


@pytest.mark.parametrize("case", ["mistral", "gemma2"], indirect=True)
def test_kernels_leave_windows_and_soft_caps_to_the_plain_path(case):
    _, model, params = case
    capped = bool(model.config.attn_logit_softcapping)
    of = {name: LanguageModel(dataclasses.replace(model.config, attention=name)) for name in ("plain", "splash")}
    plain = program(of["plain"], params, LENGTH)
    assert program(of["splash"], params, LENGTH) == plain
    # What is no longer than the window has no window.
    assert (program(of["splash"], params, 4) == program(of["plain"], params, 4)) == capped


@pytest.mark.parametrize("case", ["mistral", "gemma2"], indirect=True)
def test_the_fused_kernel_gets_the_window_and_no_soft_cap(case, monkeypatch):
    called = stand_in_for_cudnn(monkeypatch)
    name, model, params = case
    fused = LanguageModel(dataclasses.replace(model.config, attention="cudnn"))
    found = logits_of((name, fused, params), TOKENS)
    np.testing.assert_allclose(found, logits_of(case, TOKENS), atol=1e-4)
    assert bool(called) != bool(model.config.attn_logit_softcapping)
