import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlaif_jax.data.packing import lay_out
from rlaif_jax.models.transformer import LanguageModel
from rlaif_jax.training.optimizer import make_optimizer
from rlaif_jax.training.packed import sft_loss
from rlaif_jax.training.state import new_state
from rlaif_jax.training.step import train_step
from tests.helpers import assert_trees_close, full_logits, optimizer_config, random_params, tiny

MODEL = LanguageModel(tiny())
SGD = optax.sgd(0.1)
# Prompts and completions of several lengths.
EXAMPLES = [([2, 3, 4], [5, 6, 1]), ([9], [8, 7, 6, 5, 1]), ([3, 3, 3, 3], [1]), ([10, 11], [12, 1])]


@jax.jit
def sft_step(batch):
    state = new_state(random_params(MODEL), SGD)
    return train_step(state, batch, functools.partial(sft_loss, model=MODEL), SGD)


def rows(*numbers):
    return lay_out([[EXAMPLES[i]] if i is not None else [] for i in numbers], 12)


def test_empty_rows_change_nothing():
    padded = sft_step(rows(0, 1, None, None))
    twice = sft_step(rows(0, 1, 0, 1))  # the same mean over tokens as rows 0 and 1 alone
    assert_trees_close(padded, twice, rtol=1e-4, atol=1e-6)
    assert padded[1]["loss"] > 1
    assert padded[0].step == 1


def test_packed_examples_teach_what_examples_in_rows_of_their_own_do():
    packed = sft_step(lay_out([[EXAMPLES[0], EXAMPLES[2]], [EXAMPLES[1], EXAMPLES[3]], [], []], 24))
    apart = sft_step(lay_out([[example] for example in EXAMPLES], 24))
    assert_trees_close(packed, apart, rtol=1e-4, atol=1e-6)


def test_the_loss_is_on_completions_alone():
    changed = [([*prompt[:-1], 7], completion) for prompt, completion in EXAMPLES]
    logprobs = full_logprobs([[*prompt, *completion] for prompt, completion in changed])
    learned = [row[len(p) - 1 : len(p) + len(c) - 1] for row, (p, c) in zip(logprobs, changed, strict=True)]
    _, metrics = sft_step(lay_out([[example] for example in changed], 12))
    np.testing.assert_allclose(metrics["loss"], -np.concatenate(learned).mean(), rtol=1e-4)


def full_logprobs(rows):
    for row in rows:
        logits = full_logits(MODEL, random_params(MODEL), np.array([row]))[0].astype(np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        yield logits[np.arange(len(row) - 1), row[1:]]


def test_an_empty_batch_leaves_the_parameters_as_they_are():
    state, metrics = sft_step(rows(None, None, None, None))
    jax.tree.map(np.testing.assert_array_equal, state.params, random_params(MODEL))
    assert metrics["loss"] == 0


def test_loss_gradient_and_metrics_are_sums_over_weight():
    x, y = np.float32([[1, 2], [3, 4], [5, 7]]), np.float32([1, -1, 2])

    def loss(params, batch):
        error = batch[0] @ params["w"] - batch[1]
        return jnp.sum(error**2), jnp.float32(len(error)), {"error": (jnp.sum(error), jnp.float32(len(error)))}

    w = np.float32([0.5, -0.5])
    state, metrics = train_step(new_state({"w": w}, SGD), (x, y), loss, SGD)
    error, gradient = x @ w - y, 2 * x.T @ (x @ w - y) / 3
    np.testing.assert_allclose(state.params["w"], w - 0.1 * gradient, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], np.mean(error**2), rtol=1e-6)
    np.testing.assert_allclose(metrics["error"], error.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "rates"),
    [
        ("constant", 0, [1] * 9),
        ("constant", 4, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("linear", 0, [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0]),
        ("linear", 4, [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", 0, (1 + np.cos(np.pi * np.arange(9) / 8)) / 2),
        ("cosine", 4, [0, 0.25, 0.5, 0.75, *(1 + np.cos(np.pi * np.arange(5) / 4)) / 2]),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule, warmup_steps, rates):
    config = optimizer_config(learning_rate=0.01, schedule=schedule, warmup_steps=warmup_steps, weight_decay=0.0)
    optimizer = make_optimizer(config, 8)

    @jax.jit
    def updates(param):
        def step(state, _):
            update, state = optimizer.update(param, state, param)
            return state, -update  # Adam under a constant gradient moves by the learning rate

        return jax.lax.scan(step, optimizer.init(param), length=9)[1]

    np.testing.assert_allclose(updates(jnp.float32(0.5)), 0.01 * np.array(rates), rtol=1e-4, atol=1e-8)


def test_the_gradient_is_clipped_by_its_global_norm_before_adam_sees_it():
    optimizer = make_optimizer(optimizer_config(max_grad_norm=0.5, b1=0.9), 8)
    params = {"a": np.ones(3, np.float32), "b": np.ones(1, np.float32)}
    gradient = jax.tree.map(lambda x: 4 * x, params)
    _, state = jax.jit(lambda: optimizer.update(gradient, optimizer.init(params), params))()
    moments = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose([*moments["a"], *moments["b"]], 0.1 * 0.5 / 2, rtol=1e-5)  # four equal entries


def ragged_loss(params, batch):
    """Two terms over weights of their own, and a metric."""
    x, y, mask = batch
    error = (x @ params["w"] - y) * mask
    sums = {"squares": jnp.sum(error**2), "sizes": 0.5 * jnp.sum(jnp.abs(error))}
    weights = {"squares": jnp.sum(mask), "sizes": jnp.float32(len(mask))}
    return sums, weights, {"error": (jnp.sum(error), jnp.sum(mask))}


def ragged_batch():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3, 2)).astype(np.float32), rng.normal(size=(8, 3)).astype(np.float32)
    return x, y, np.float32(np.arange(3) < rng.integers(0, 4, (8, 1)))


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_micro_batches_add_up_to_the_whole_batch(parts):
    batch, adam = ragged_batch(), optax.adam(0.1, eps=1.0)
    state = new_state({"w": np.float32([0.5, -0.5])}, adam)
    whole, apart = (train_step(state, batch, ragged_loss, adam, count) for count in (1, parts))
    assert_trees_close(apart, whole, rtol=1e-5, atol=1e-7)
    assert whole[1]["grad_norm"] > 0.1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(bad):
    x, y, mask = ragged_batch()
    adam = optax.adam(0.1)
    state, _ = train_step(new_state({"w": np.float32([0.5, -0.5])}, adam), (x, y, mask), ragged_loss, adam)
    y = np.where(mask > 0, bad, y).astype(np.float32)
    after, metrics = train_step(state, (x, y, mask), ragged_loss, adam)
    assert (after.skipped, after.step, metrics["skipped"], metrics["skipped_updates"]) == (1, 1, 1, 1)
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (state.params, state.opt_state))
    again, metrics = train_step(after, ragged_batch(), ragged_loss, adam)
    assert (again.step, metrics["skipped"], metrics["skipped_updates"]) == (2, 0, 1)
