import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from rlaif_jax.data.packing import lay_out
from rlaif_jax.models.parameters import place_parameters
from rlaif_jax.models.transformer import LanguageModel, ScalarModel
from rlaif_jax.parallel.mesh import shard_batch
from rlaif_jax.stages.reward_model import Comparisons, reward_loss
from rlaif_jax.training.packed import sft_loss
from rlaif_jax.training.policy_update import update
from rlaif_jax.training.rollout import RLState, Rollout, Sampled, initial_control, make_rollout
from rlaif_jax.training.state import init_state
from rlaif_jax.training.step import train_step
from tests.helpers import (
    assert_trees_close,
    eight_devices,
    one_device,
    quickstart_config,
    random_params,
    random_sequences,
    rl_config,
    tiny,
)

CONFIG = tiny(hidden_size=64, intermediate_size=256, vocab_size=512, head_dim=16, num_key_value_heads=4)
LANGUAGE, SCALAR = LanguageModel(CONFIG), ScalarModel(CONFIG)
SEQUENCES = random_sequences(0, 8)
RNG = np.random.default_rng(0)
# With an eps this large an update is close to linear in the gradient, and rounding stays rounding in later ones.
OPTIMIZER = optax.adamw(0.01, eps=1.0)


def loss_sft():
    examples = [(list(range(2, 4 + i)), list(range(20, 22 + i))) for i in range(8)]
    return LANGUAGE, functools.partial(sft_loss, model=LANGUAGE), lay_out([[e, e] for e in examples], 40)


def loss_reward():
    pairs = Comparisons(SEQUENCES, random_sequences(1, 8), *RNG.uniform(0, 1, (2, 8)).astype(np.float32))
    return SCALAR, functools.partial(reward_loss, model=SCALAR, config=quickstart_config().reward_model), pairs


def noise(scale, mask):
    return (RNG.normal(0, scale, mask.shape) * mask).astype(np.float32)


def assert_same_shardings(a, b):
    jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y, x.ndim) or pytest.fail(f"{x.sharding} != {y}"), a, b)


@pytest.mark.parametrize("make", [loss_sft, pytest.param(loss_reward, marks=pytest.mark.slow)])
def test_a_train_step_is_the_same_on_eight_devices_and_on_one(make):
    model, loss, batch = make()
    step = jax.jit(functools.partial(train_step, loss=loss, optimizer=OPTIMIZER), donate_argnums=0)

    def run(placement):
        with jax.set_mesh(placement.mesh):
            params = place_parameters(model, random_params(model), placement)
            state = init_state(model, params, OPTIMIZER, placement)
            shardings = jax.tree.map(lambda x: x.sharding, state)
            new_state, metrics = step(state, shard_batch(batch, placement.mesh))
        assert_same_shardings(new_state, shardings)
        assert jax.tree.leaves(state.params)[0].is_deleted()  # donated
        return jax.device_get((new_state, metrics))

    eight, one = run(eight_devices()), run(one_device())
    assert one[1]["grad_norm"] > 0.1
    assert_trees_close(eight, one, rtol=1e-4, atol=1e-6)


LOSS_KL = dataclasses.replace(rl_config().kl, placement="loss", estimator="full")


@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"advantage": "group", "group_size": 2, "kl": LOSS_KL}, marks=pytest.mark.slow)],
)
def test_policy_updates_are_the_same_on_eight_devices_and_on_one(changes):
    config = rl_config(batch_size=16, **changes)
    with_value = config.advantage == "gae"
    mask = random_sequences(0, 16).response_mask
    states = RNG.normal(0, 1, (*mask.shape, CONFIG.hidden_size)).astype(np.float32)
    rollout = Rollout(
        sequences=random_sequences(0, 16),
        mask=mask,
        old_logprobs=noise(0.2, mask) - 6.2 * mask,  # log(1/512) is -6.2
        ref_logprobs=noise(0.2, mask) - 6.2 * mask,
        ref_states=None if with_value else states,
        importance=None,
        advantages=noise(1, mask),
        old_values=noise(1, mask) if with_value else None,
        returns=noise(1, mask) if with_value else None,
    )
    apply_update = functools.partial(
        update,
        model=LANGUAGE,
        scalar_model=SCALAR,
        config=config,
        optimizer=OPTIMIZER,
        value_optimizer=OPTIMIZER,
    )
    apply_update = jax.jit(apply_update, donate_argnums=0)

    def run(placement):
        with jax.set_mesh(placement.mesh):
            reference = place_parameters(LANGUAGE, random_params(LANGUAGE, seed=1), placement)
            policy, value = (
                init_state(model, place_parameters(model, random_params(model), placement), OPTIMIZER, placement)
                for model in (LANGUAGE, SCALAR)
            )
            kl_coef = jax.device_put(np.float32(config.kl.coef), placement.whole)
            state = RLState(policy.step, policy.params, policy.opt_state, policy.skipped, value if with_value else None,
                            None, None)  # fmt: skip
            shardings = jax.tree.map(lambda x: x.sharding, state)
            placed = shard_batch(rollout, placement.mesh)
            state, metrics = apply_update(state, placed, kl_coef, reference, None, jax.random.key(0))
        assert_same_shardings(state, shardings)
        return jax.device_get((state, metrics))

    eight, one = run(eight_devices()), run(one_device())
    assert one[0].step == config.minibatches
    assert one[1]["grad_norm"] > 0.1
    assert not with_value or one[1]["value/grad_norm"] > 0.1
    assert_trees_close(eight, one, rtol=1e-4, atol=1e-6)


def test_groups_are_compared_on_eight_devices_as_on_one():
    config = rl_config(batch_size=16, advantage="leave_one_out", group_size=2, whiten_advantages=False)
    sequences, scores = random_sequences(0, 16), RNG.normal(0, 1, 16).astype(np.float32)
    scores[3] = np.nan
    sampled = Sampled(sequences, -6.2 * sequences.response_mask.astype(np.float32), np.ones(16, bool))

    def run(placement):
        with jax.set_mesh(placement.mesh):
            reference, params = (
                place_parameters(LANGUAGE, random_params(LANGUAGE, seed), placement) for seed in (1, 0)
            )
            policy = init_state(LANGUAGE, params, OPTIMIZER, placement)
            control = jax.device_put(initial_control(config), placement.whole)
            state = RLState(policy.step, policy.params, policy.opt_state, policy.skipped, None, control, None)
            placed = shard_batch((sampled, scores), placement.mesh)
            return jax.device_get(make_rollout(LANGUAGE, SCALAR, state, reference, None, *placed, config=config))

    eight, one = run(eight_devices()), run(one_device())
    assert_trees_close(eight, one, rtol=1e-4, atol=1e-5)
    assert not one[0].advantages[2:4].any()  # a group with one score compares nothing
    assert one[0].advantages[:2].any()


@pytest.mark.parametrize("model", [LANGUAGE, SCALAR])
def test_each_of_eight_devices_holds_an_eighth_of_parameters_and_moments(model):
    placement = eight_devices()
    state = init_state(model, place_parameters(model, random_params(model), placement), OPTIMIZER, placement)
    leaves = jax.tree.leaves((state.params, state.opt_state))
    total = sum(leaf.nbytes for leaf in leaves)
    held = dict.fromkeys(placement.mesh.devices.flat, 0)
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert total > 3 * 4 * 150_000
    assert max(held.values()) <= 1.1 * total / 8
