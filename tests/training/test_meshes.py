"""Every program that a run is made of, on meshes of eight devices and on one: the same losses and gradients."""

import functools
import re

import jax
import numpy as np
import optax
import pytest

from rlaif_jax.data.packing import lay_out
from rlaif_jax.judge.score import read_prefix
from rlaif_jax.models.parameters import Placement, decoding_model, decoding_parameters, place_parameters
from rlaif_jax.models.transformer import LanguageModel, ScalarModel
from rlaif_jax.parallel.mesh import JUDGE_RULES, make_mesh, shard_batch
from rlaif_jax.sampling.generate import generate
from rlaif_jax.sampling.trees import Scorer, grow, score_trees
from rlaif_jax.stages.preference import PreferenceBatch, loss_of_pairs
from rlaif_jax.stages.reward_model import Comparisons, reward_loss
from rlaif_jax.training.packed import sft_loss
from rlaif_jax.training.policy_update import update
from rlaif_jax.training.rollout import RLState, Sampled, initial_control, make_rollout
from rlaif_jax.training.state import init_state
from rlaif_jax.training.step import train_step
from tests.helpers import (
    SAMPLING,
    STOPPING,
    assert_trees_close,
    axes,
    mesh_config,
    one_device,
    one_reward_model,
    quickstart_config,
    random_params,
    random_sequences,
    rl_config,
    tiny,
)

MESHES = {
    "data": axes(data=8),
    "fsdp": axes(data=4, fsdp=2),
    "tensor": axes(data=2, fsdp=2, tensor=2),
    "sequence": axes(data=2, tensor=2, sequence=2),
    "slices": mesh_config(slices=2, data=2, fsdp=4),
}
SHAPES = {
    "divides": (tiny(num_hidden_layers=1), ()),
    "odd": (tiny(num_hidden_layers=1, hidden_size=72, num_attention_heads=9, num_key_value_heads=3),
            ("heads", "kv_heads")),  # as SmolLM2
}  # fmt: skip
ROWS = 16
A, B = (random_sequences(seed, ROWS, prompt_length=6) for seed in (0, 1))  # 12 tokens, which two devices divide
SCALARS = np.random.default_rng(0).uniform(0.1, 0.9, (4, ROWS)).astype(np.float32)
DESCENT = optax.sgd(1.0)  # what it takes from the parameters is the gradient


def step_on(loss, model, batch, placement, micro_batches=1):
    """The step, compiled, and its arguments."""
    state = init_state(model, place_parameters(model, random_params(model), placement), DESCENT, placement)
    step = jax.jit(functools.partial(train_step, loss=loss, optimizer=DESCENT, micro_batches=micro_batches))
    arguments = state, shard_batch(batch, placement.mesh)
    return step.lower(*arguments).compile(), arguments


def sft_step(config, placement, micro_batches=1):
    model = LanguageModel(config)
    rows = lay_out([[(list(range(2, 4 + i % 5)), list(range(20, 22 + i % 7)))] * 2 for i in range(ROWS)], 32)
    return step_on(functools.partial(sft_loss, model=model), model, rows, placement, micro_batches)


def sft(config, placement):
    step, arguments = sft_step(config, placement)
    return step(*arguments)


def accumulated(config, placement):
    step, arguments = sft_step(config, placement, micro_batches=2)
    return step(*arguments)


def reward(config, placement):
    model = ScalarModel(config)
    loss = functools.partial(reward_loss, model=model, config=quickstart_config().reward_model)
    step, arguments = step_on(loss, model, Comparisons(A, B, *SCALARS[:2]), placement)
    return step(*arguments)


def dpo(config, placement):
    model = LanguageModel(config)
    loss = functools.partial(loss_of_pairs, model=model, config=quickstart_config().preference)
    batch = PreferenceBatch(Comparisons(A, B, *SCALARS[:2]), *(-20 * SCALARS[2:]))
    step, arguments = step_on(loss, model, batch, placement)
    return step(*arguments)


def ppo(config, placement):
    model, scalar_model, rl = LanguageModel(config), ScalarModel(config), rl_config(batch_size=ROWS, minibatches=1)
    policy, value = (
        init_state(each, place_parameters(each, random_params(each), placement), DESCENT, placement)
        for each in (model, scalar_model)
    )
    reference = place_parameters(model, random_params(model, seed=1), placement)
    rewards = one_reward_model(place_parameters(scalar_model, random_params(scalar_model, seed=2), placement))
    control = jax.device_put(initial_control(rl), placement.whole)
    state = RLState(policy.step, policy.params, policy.opt_state, policy.skipped, value, control, None)
    sampled = Sampled(A, -4.0 * A.response_mask.astype(np.float32), np.ones(ROWS, bool))
    sampled, scores = shard_batch((sampled, SCALARS[0]), placement.mesh)
    rollout, control, scores, metrics = make_rollout(
        model, scalar_model, state, reference, rewards, sampled, scores, config=rl
    )
    updated = jax.jit(
        functools.partial(
            update, model=model, scalar_model=scalar_model, config=rl, optimizer=DESCENT, value_optimizer=DESCENT
        )
    )(state.replace(control=None), rollout, control.kl_coef, None, None, jax.random.key(0))
    return rollout, scores, metrics, updated


def replies(config, placement):
    model = LanguageModel(config)
    params = decoding_parameters(model, place_parameters(model, random_params(model), placement), placement)
    arrays = shard_batch((A.prompts, A.prompt_mask, np.arange(ROWS, dtype=np.int32)), placement.mesh)
    return generate(decoding_model(model), params, *arrays[:2], jax.random.key(0), arrays[2], STOPPING,
                    max_new_tokens=6, sampling=SAMPLING, cache_dtype="float32").samples  # fmt: skip


def judged(config, placement):
    model = LanguageModel(config)
    params = place_parameters(model, random_params(model), placement)
    params, model = decoding_parameters(model, params, placement, JUDGE_RULES), decoding_model(model)
    prefix = read_prefix(model, params, np.array([[11, 12, 13]], np.int32))  # odd, and whole
    trees = [grow([row[3 - i % 3 :].tolist() for row in A.prompts[i : i + 2]], [(5,), (6, 7)]) for i in range(9)]
    scorer = Scorer(model, params, placement, prefix, batch_tokens=64)
    return [scores for _, scores in sorted(score_trees(scorer, trees, [8, 16], 6), key=lambda pair: pair[0])]


def on_one_device(program, shape):
    config, _ = SHAPES[shape]
    with jax.set_mesh(one_device().mesh):
        return jax.device_get(program(config, one_device()))


def on_mesh(program, shape, mesh):
    config, replicated = SHAPES[shape]
    placement = Placement(make_mesh(MESHES[mesh]), replicated)
    with jax.set_mesh(placement.mesh):
        return jax.device_get(program(config, placement))


EACH = ("data", "fsdp", "tensor", "sequence")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "meshes"),
    [(sft, (*EACH, "slices")), (accumulated, ("tensor",)), (reward, EACH), (dpo, EACH), (ppo, EACH), (replies, EACH),
     (judged, ("data", "fsdp", "tensor"))],
)  # fmt: skip
def test_losses_and_gradients_on_any_mesh_are_those_of_one_device(program, meshes):
    expected = on_one_device(program, "divides")
    for mesh in meshes:
        assert_trees_close(on_mesh(program, "divides", mesh), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("program", [sft, replies, judged])
def test_heads_that_do_not_divide_stay_whole_and_change_nothing(program):
    expected = on_one_device(program, "odd")
    assert_trees_close(on_mesh(program, "odd", "tensor"), expected, rtol=1e-5, atol=1e-5)


def test_a_judge_whose_prompts_are_split_along_their_length_says_the_same():
    assert_trees_close(on_mesh(judged, "divides", "sequence"), on_one_device(judged, "divides"), rtol=1e-5, atol=1e-5)


_NAMES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def collectives(text):
    """The collectives of a compiled program: (name, shape of what it gives)."""
    return [(name, shape) for shape, name in re.findall(rf"= \(?\w+\[([\d,]*)\]\S* ({_NAMES})(?:-start)?\(", text)]


def test_a_train_step_gathers_weights_and_sums_gradients():
    placement = Placement(make_mesh(MESHES["slices"]))
    with jax.set_mesh(placement.mesh):
        found = collectives(sft_step(tiny(), placement)[0].as_text())
    assert ("all-gather", f"{tiny().hidden_size},{tiny().intermediate_size}") in found  # of a layer, for its product
    assert {name for name, _ in found} & {"reduce-scatter", "all-reduce"}


def test_a_split_prompt_has_its_keys_and_values_gathered_and_nothing_else():
    mesh, model = make_mesh(axes(data=4, sequence=2)), LanguageModel(tiny())
    ends = np.full((8, 16), 16, np.int32)
    with jax.set_mesh(mesh):
        tokens = shard_batch(ends * 0 + 2, mesh)
        read = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens, tokens, tokens, ends=ends)[0])
        compiled = read.lower(place_parameters(model, random_params(model), Placement(mesh)), tokens).compile()
    found = [shape for name, shape in collectives(compiled.as_text()) if name == "all-gather"]
    large = [shape for shape in found if shape.count(",") > 1]
    assert (
        large == [f"2,16,{tiny().num_key_value_heads},{tiny().head_dim}"] * 2
    )  # on each device; of all layers, a scan
