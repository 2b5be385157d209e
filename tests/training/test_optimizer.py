"""AdamW with moments in bfloat16, against the same in float32 and with moments rounded to nearest."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from rlaif_jax.models.transformer import LanguageModel
from rlaif_jax.training.checkpoints import Checkpoints
from rlaif_jax.training.optimizer import make_optimizer, round_stochastically
from rlaif_jax.training.state import TrainState, abstract_state, new_state
from tests.helpers import assert_trees_close, eight_device_mesh, eight_devices, one_device, optimizer_config, tiny

CONFIG = optimizer_config(learning_rate=0.01, b2=0.999, weight_decay=0.0, max_grad_norm=1e9)
NARROW = optimizer_config(moment_dtype="bfloat16")
STEPS, SIZE = 4000, 64


def neighbours(x):
    """The bfloat16 numbers below and above in magnitude, and their distance: by NumPy, bit by bit."""
    bits = x.view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32), (bits + np.uint32(0x10000)).view(np.float32)


def test_rounding_gives_one_of_two_neighbours_and_the_value_itself_on_average():
    x = np.float32([1.001, -1.001, 0.3, 3.1e-17, -7e12, 1 + 2**-8, 1.9999, 1.5, 0.0])
    bits = np.arange(1 << 16, dtype=np.uint32)[:, None]  # each that there is, once
    rounded = np.asarray(jax.jit(round_stochastically)(x, bits), np.float32)
    low, high = neighbours(x)
    assert np.all((rounded == low) | (rounded == high))
    share = (x - low) / (high - low)
    np.testing.assert_array_equal((rounded == high).mean(0), share)
    assert np.all(rounded[:, share == 0] == x[share == 0])  # what a bfloat16 can say stays


def to_nearest(adam):
    """The control: what an optimizer does whose state is just cast."""

    def narrow(state):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, state)

    def update(gradient, state, params=None):
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, state)
        updates, wide = adam.update(gradient, wide, params)
        return updates, narrow(wide)

    return optax.GradientTransformation(lambda params: narrow(adam.init(params)), update)


@functools.partial(jax.jit, static_argnums=0)
def descend(optimizer):
    """Parameters and second moments in the course of a quadratic whose gradients' noise falls tenfold half-way."""

    def step(carry, i):
        x, state = carry
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), x.shape)
        updates, state = optimizer.update(x + jnp.where(i < STEPS // 2, 1.0, 0.1) * noise, state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), (x, optax.tree.get(state, "nu").astype(jnp.float32))

    x = jnp.linspace(-3, 3, SIZE)
    return jax.lax.scan(step, (x, optimizer.init(x)), jnp.arange(STEPS))[1]


def test_the_second_moment_follows_a_falling_gradient_which_it_does_not_when_rounded_to_nearest():
    nearest = to_nearest(optax.scale_by_adam(CONFIG.b1, CONFIG.b2, CONFIG.eps))
    x, nu = descend(make_optimizer(CONFIG, STEPS))
    ours = descend(make_optimizer(dataclasses.replace(CONFIG, moment_dtype="bfloat16"), STEPS))
    control = descend(optax.chain(nearest, optax.scale_by_learning_rate(CONFIG.learning_rate)))
    ratio = ours[1][-1] / nu[-1]
    assert 0.95 < ratio.mean() < 1.05 and ratio.std() < 0.15
    assert (control[1][-1] / nu[-1]).mean() > 2
    np.testing.assert_allclose(ours[0][-1], x[-1], atol=0.05)  # of 3, where it began


def test_float32_moments_are_those_of_optax_adamw():
    params = {"a": jnp.linspace(-1, 1, 5)}
    adamw = optax.adamw(optax.constant_schedule(1e-3), 0.9, 0.98, 1e-8, weight_decay=0.01)
    expected, ours = optax.chain(optax.clip_by_global_norm(1.0), adamw), make_optimizer(optimizer_config(), 3)
    both = [optimizer.update(params, optimizer.init(params), params) for optimizer in (ours, expected)]
    jax.tree.map(np.testing.assert_array_equal, *both)
    assert jax.tree.structure(both[0]) == jax.tree.structure(both[1])


def test_moments_take_half_the_bytes_and_are_split_as_their_parameters():
    placement, model = eight_devices(), LanguageModel(tiny(num_key_value_heads=4))
    wide, narrow = (abstract_state(model, make_optimizer(x, 10), placement) for x in (optimizer_config(), NARROW))
    for moment in ("mu", "nu"):
        each = [optax.tree.get(state.opt_state, moment) for state in (wide, narrow)]
        large, small = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in each)
        assert small == large / 2
        assert jax.tree.map(lambda x: x.sharding, each[1]) == jax.tree.map(lambda x: x.sharding, narrow.params)


GRADIENTS = {
    "w": np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32),
    "b": np.random.default_rng(1).normal(size=32).astype(np.float32),
}


def several_updates(optimizer, state: TrainState, gradients, count: int) -> TrainState:
    """Each with gradients that differ from the last."""

    @jax.jit
    def update(state):
        scaled = jax.tree.map(lambda x: x * (1.0 + 0.1 * state.step), gradients)
        updates, opt_state = optimizer.update(scaled, state.opt_state, state.params)
        return state.replace(
            step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state
        )

    for _ in range(count):
        state = update(state)
    return state


def test_the_random_bits_do_not_depend_on_the_sharding():
    mesh, key = eight_device_mesh(), jax.random.key(3)
    draw = functools.partial(jax.random.bits, shape=(64, 48), dtype=jnp.uint32)
    for spec in (PartitionSpec("fsdp", "tensor"), PartitionSpec(None, ("fsdp", "tensor"))):
        split = jax.jit(draw, out_shardings=NamedSharding(mesh, spec))(key)
        np.testing.assert_array_equal(split, draw(key))


def test_updates_are_the_same_sharded_and_whole():
    optimizer, mesh = make_optimizer(NARROW, 10), eight_device_mesh()
    shardings = {"w": NamedSharding(mesh, PartitionSpec("fsdp", "tensor")), "b": NamedSharding(mesh, PartitionSpec())}
    whole = several_updates(optimizer, new_state(GRADIENTS, optimizer), GRADIENTS, 5)
    split = jax.device_put(GRADIENTS, shardings)
    state = several_updates(optimizer, new_state(split, optimizer), split, 5)
    assert optax.tree.get(state.opt_state, "nu")["w"].sharding.is_equivalent_to(shardings["w"], 2)
    # The norm by which gradients are clipped is a sum in another order: one number in thousands rounds otherwise.
    for moment in ("mu", "nu"):
        ours, theirs = (np.asarray(optax.tree.get(x.opt_state, moment)["w"], np.float32) for x in (state, whole))
        assert np.mean(ours == theirs) > 0.99
        np.testing.assert_allclose(ours, theirs, rtol=2**-7)
    assert_trees_close(state.params, whole.params, rtol=1e-4, atol=1e-6)


def test_a_saved_state_goes_on_bit_by_bit(tmp_path):
    optimizer = make_optimizer(NARROW, 10)
    begin = several_updates(optimizer, new_state(GRADIENTS, optimizer), GRADIENTS, 3)
    with contextlib.closing(Checkpoints(epath.Path(tmp_path) / "checkpoints")) as checkpoints:
        checkpoints.save(3, begin, {})
    whole = one_device().whole
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), begin)
    _, restored = Checkpoints(epath.Path(tmp_path) / "checkpoints").resume(target)
    assert optax.tree.get(restored.opt_state, "nu")["w"].dtype == jnp.bfloat16
    ours, theirs = (several_updates(optimizer, state, GRADIENTS, 3) for state in (restored, begin))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
