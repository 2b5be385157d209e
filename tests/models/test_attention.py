import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.models import attention
from rlaif_jax.models.attention import Block, attend, choose_implementation
from rlaif_jax.models.transformer import LanguageModel
from rlaif_jax.parallel.mesh import make_mesh
from tests.helpers import (
    assert_trees_close,
    axes,
    eight_device_mesh,
    random_params,
    random_tokens,
    stand_in_for_cudnn,
    tiny,
)

RNG = np.random.default_rng(0)
BATCH, LENGTH, HEADS, KV_HEADS, DIM = 4, 6, 4, 2, 8


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def oracle(query, key, value, mask):
    """One query and one head at a time, in float64."""
    out = np.zeros(query.shape)
    for b, q, h in np.ndindex(*query.shape[:3]):
        seen = mask[b, q]
        k, v = (x[b, seen, h * KV_HEADS // HEADS].astype(np.float64) for x in (key, value))
        weights = np.exp(k @ query[b, q, h] / DIM**0.5)
        out[b, q, h] = weights @ v / weights.sum()
    return out


def test_blocks_together_are_one_softmax_over_all_their_keys():
    query, sizes = normal(BATCH, LENGTH, HEADS, DIM), {1: 5, 2: 3, 4: LENGTH}  # groups -> slots
    keys = {groups: [normal(groups, slots, KV_HEADS, DIM) for _ in range(2)] for groups, slots in sizes.items()}
    masks = {groups: RNG.random((groups, 1, slots)) < 0.7 for groups, slots in sizes.items()}
    masks[4] = np.tril(np.ones((LENGTH, LENGTH), bool))[None].repeat(4, axis=0)
    blocks = [Block(*keys[groups], masks[groups]) for groups in sizes]
    whole = [
        np.concatenate([x[i].repeat(BATCH // groups, axis=0) for groups, x in keys.items()], axis=1) for i in (0, 1)
    ]
    seen = [
        np.broadcast_to(mask.repeat(BATCH // groups, axis=0), (BATCH, LENGTH, sizes[groups]))
        for groups, mask in masks.items()
    ]
    expected = oracle(query, *whole, np.concatenate(seen, axis=2))
    np.testing.assert_allclose(attend(query, blocks, "plain"), expected, atol=1e-5)


def test_a_causal_block_in_parts_is_the_whole_block():
    length = 150
    query, key, value = (normal(2, length, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    mask = np.tril(RNG.random((2, length, length)) < 0.9)
    causal, shared = (
        Block(key, value, mask, causal=True),
        Block(normal(1, 5, KV_HEADS, DIM), normal(1, 5, KV_HEADS, DIM)),
    )
    for others in ([], [shared]):
        expected = attend(query, [causal._replace(causal=False), *others], "plain")
        np.testing.assert_allclose(attend(query, [causal, *others], "plain"), expected, atol=1e-5)


def test_a_block_without_mask_counts_all_its_slots():
    query, key, value = normal(BATCH, LENGTH, HEADS, DIM), normal(1, 5, KV_HEADS, DIM), normal(1, 5, KV_HEADS, DIM)
    masked = Block(key, value, np.ones((1, 1, 5), bool))
    assert np.array_equal(attend(query, [Block(key, value)], "plain"), attend(query, [masked], "plain"))


TOKENS = random_tokens(0, 8, 40)
SEGMENTS = np.concatenate([np.zeros((8, 5)), np.ones((8, 20)), np.full((8, 15), 2)], axis=1).astype(np.int32)


def loss_and_gradient(implementation):
    model = LanguageModel(tiny(attention=implementation))
    weights = (SEGMENTS > 0)[..., None]

    def loss(params):
        hidden, _ = model.apply({"params": params}, TOKENS, SEGMENTS)
        return jnp.sum(weights * jnp.sin(hidden))

    return jax.jit(jax.value_and_grad(loss))(random_params(model))


def test_splash_attention_equals_the_plain_path_in_states_and_gradients_on_any_mesh():
    expected = loss_and_gradient("plain")
    assert_trees_close(loss_and_gradient("splash"), expected, rtol=1e-4, atol=2e-4)
    for mesh in (eight_device_mesh(), make_mesh(axes(data=2, tensor=2, sequence=2))):
        with jax.set_mesh(mesh):
            assert_trees_close(loss_and_gradient("splash"), expected, rtol=1e-4, atol=2e-4)


def test_the_fused_kernels_interface_computes_what_the_plain_path_does(monkeypatch):
    called = stand_in_for_cudnn(monkeypatch)
    query = normal(BATCH, LENGTH, HEADS, DIM)
    mask = np.tril(np.ones((LENGTH, LENGTH), bool))[None].repeat(BATCH, axis=0)
    own = Block(normal(BATCH, LENGTH, KV_HEADS, DIM), normal(BATCH, LENGTH, KV_HEADS, DIM), mask)
    shared = Block(normal(1, 7, KV_HEADS, DIM), normal(1, 7, KV_HEADS, DIM))
    for blocks in ([own], [own, shared]):
        np.testing.assert_allclose(attend(query, blocks, "cudnn"), attend(query, blocks, "plain"), atol=1e-5)
    assert called == ["cudnn"] * 3


@pytest.mark.parametrize(
    ("platform", "changes", "expected"),
    [
        ("cpu", {}, "plain"),
        ("gpu", {}, "cudnn"),
        ("gpu", {"dtype": "float32"}, "plain"),
        ("gpu", {"length": 1}, "plain"),
        ("gpu", {"head_dim": 12}, "plain"),
        ("gpu", {"int8": True}, "plain"),
        ("tpu", {}, "splash"),
        ("tpu", {"blocks": 2}, "plain"),
        ("tpu", {"tree": True}, "plain"),
    ],
)
def test_the_path_is_chosen_by_what_the_kernels_can_do(monkeypatch, platform, changes, expected):
    case = {"dtype": "bfloat16", "length": 16, "head_dim": 8, "int8": False, "blocks": 1, "tree": False} | changes
    monkeypatch.setattr(attention, "platform", lambda: platform)
    query = jnp.zeros((2, case["length"], 4, case["head_dim"]), case["dtype"])
    key = jnp.zeros((2, case["length"], 2, case["head_dim"]), "int8" if case["int8"] else case["dtype"])
    scale = jnp.ones(key.shape[:3]) if case["int8"] else None
    segments = None if case["tree"] else jnp.ones(key.shape[:2], jnp.int32)
    block = Block(key, key, jnp.ones((2, 1, case["length"]), bool), scale, scale, segments)
    assert choose_implementation("auto", query, [block] * case["blocks"]) == expected
    with jax.set_mesh(make_mesh(axes(data=4, sequence=2))):  # which cuDNN can't be split over
        assert choose_implementation("auto", query, [block] * case["blocks"]) == expected.replace("cudnn", "plain")
