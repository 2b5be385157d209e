import dataclasses
import functools
import types

import jax
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from rlaif_jax.models.parameters import abstract_parameters
from rlaif_jax.models.transformer import ScalarModel
from rlaif_jax.stages.reward_model import (
    Comparisons,
    _figures,
    _labels_by_member,
    _normalisation,
    calibrated_scale,
    reward_loss,
    split_rows,
)
from rlaif_jax.training.optimizer import make_optimizer
from rlaif_jax.training.reward_models import (
    RewardModel,
    combined_reward,
    member_rewards,
    principle_metrics,
    rewards_of,
    side_by_side,
    stack,
)
from rlaif_jax.training.sequences import Sequences, response_rewards
from rlaif_jax.training.state import abstract_state, init_state
from rlaif_jax.training.step import train_step
from tests.helpers import TINY, one_device, optimizer_config, quickstart_config, random_params, random_sequences

RNG = np.random.default_rng(0)
CONFIG = quickstart_config().reward_model
TRUE = RNG.normal(0, 1, 2000)  # differences of the rewards behind the labels
PAIRS = range(2000)  # of one label each


@pytest.mark.parametrize("factor", [0.25, 1.0, 4.0])
def test_rewards_that_are_off_by_a_factor_are_brought_back(factor):
    labels = 1 / (1 + np.exp(-TRUE))
    assert calibrated_scale(TRUE * factor, labels, PAIRS, 2.0) == pytest.approx(1 / factor, rel=1e-3)


def test_noise_in_the_rewards_shrinks_them_by_the_share_of_signal():
    small = 0.2 * TRUE  # where the sigmoid is straight, the best factor is the slope of a regression
    noisy = small + 0.2 * RNG.normal(0, 1, len(TRUE))
    slope = (small @ noisy) / (noisy @ noisy)
    assert calibrated_scale(noisy, 1 / (1 + np.exp(-small)), PAIRS, 2.0) == pytest.approx(slope, rel=0.03)


@pytest.mark.parametrize("sign", [-1, 0])
def test_rewards_that_say_nothing_or_the_opposite_are_scaled_to_nothing(sign):
    labels = 1 / (1 + np.exp(-sign * TRUE))
    assert calibrated_scale(TRUE, labels, PAIRS, 2.0) == 0


def test_a_gain_that_chance_could_give_counts_for_nothing():
    margins, labels = np.ones(20), np.repeat([1.0, 0.0], [12, 8])
    assert calibrated_scale(margins, labels, range(20), 0.0) == pytest.approx(np.log(12 / 8), rel=1e-3)
    assert calibrated_scale(margins, labels, range(20), 2.0) == 0
    # The same share of more labels is no chance.
    assert calibrated_scale(np.ones(2000), labels.repeat(100), PAIRS, 2.0) > 0


def test_many_labels_of_a_few_pairs_are_no_more_evidence_than_one_of_each():
    margins, labels, pairs = np.ones(2000), np.repeat([1.0, 0.0], [1200, 800]), np.arange(2000) // 100
    assert calibrated_scale(margins, labels, pairs, 0.0) == pytest.approx(np.log(12 / 8), rel=1e-3)
    assert calibrated_scale(margins, labels, pairs, 2.0) == 0


@pytest.mark.parametrize(("train_pairs", "trained"), [(0, 14), (2, 7), (9, 14)])
def test_a_pair_is_trained_on_or_held_out_with_all_of_its_labels(train_pairs, trained):
    pairs = [0, 0, 0, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 7, 7, 8, 9, 9, 9]
    config = dataclasses.replace(CONFIG, validation_pairs=3, train_pairs=train_pairs)
    assert split_rows(config, pairs) == (range(trained), slice(14, None))
    assert split_rows(dataclasses.replace(config, validation_pairs=0), pairs)[1] == slice(20, None)
    assert split_rows(config, [4, 4]) == (range(0), slice(0, None))


def test_figures_on_held_out_labels_count_each_pair_once():
    config = dataclasses.replace(quickstart_config(), reward_model=dataclasses.replace(CONFIG, validation_pairs=3))
    run = types.SimpleNamespace(config=config, ground_truth=lambda: None)
    table = {"pair": [4, 4, 5, 6, 6, 6], "prob_a": [0.9, 0.2, 0.7, 0.1, 0.6, 0.3]}
    margins = np.array([1.0, 1, -1, -2, -2, -2])
    zeros, lengths = np.zeros(6), (np.array([3, 3, 5, 9, 9, 9]), np.full(6, 4))
    found = _figures(run, table, margins, zeros, lengths, [np.stack([margins, zeros]), np.zeros((2, 6))])
    assert {figure["n"] for figure in found.values()} == {3}
    assert found["reward_model_accuracy/held_out"]["mean"] == pytest.approx((1 / 2 + 0 + 2 / 3) / 3)
    assert found["reward_model_disagreement"]["mean"] == pytest.approx((0.25 + 0.25 + 1) / 3)
    earlier = np.array([0.5, -0.5])  # of a pair that is trained on
    _, held_out = split_rows(config.reward_model, [2, 2, *table["pair"]])
    normalisation = _normalisation(run, np.append(earlier, margins), np.zeros(8), held_out, table)
    assert normalisation["validation_pairs"] == 3
    assert normalisation["validation_accuracy"] == found["reward_model_accuracy/held_out"]["mean"]


def test_a_pair_without_weight_is_as_one_that_is_not_there():
    a, b, other = (random_sequences(seed, 8) for seed in range(3))
    weight, prob = np.repeat(np.float32([1, 0]), 4), RNG.uniform(0.6, 1, 8).astype(np.float32)
    model = ScalarModel(TINY)
    loss = functools.partial(
        jax.jit(reward_loss, static_argnames=("model", "config")), random_params(model), model=model, config=CONFIG
    )
    half_other = jax.tree.map(lambda x, y: np.concatenate([x[:4], y[4:]]), a, other)
    expected = loss(Comparisons(a, b, prob, weight))
    jax.tree.map(np.testing.assert_array_equal, loss(Comparisons(half_other, b, prob, weight)), expected)
    assert expected[1] == expected[2]["accuracy"][1] == 4
    assert loss(Comparisons(a, b, prob, np.ones_like(weight)))[0] != expected[0]


def labelled(seed, rows=8):
    prob = np.random.default_rng(seed).uniform(0, 1, rows).astype(np.float32)
    return Comparisons(random_sequences(seed, rows), random_sequences(seed + 100, rows), prob, np.ones_like(prob))


def test_members_of_one_program_are_trained_as_each_alone():
    model, optimizer, placement = ScalarModel(TINY), make_optimizer(optimizer_config(), 10), one_device()
    loss = functools.partial(reward_loss, model=model, config=CONFIG)
    step = jax.jit(functools.partial(train_step, loss=loss, optimizer=optimizer))
    alone = [init_state(model, random_params(model, seed=i), optimizer, placement) for i in range(3)]
    together = stack(alone, side_by_side(abstract_state(model, optimizer, placement), 3))
    for _ in range(2):
        batches = [labelled(i) for i in range(3)]
        together, metrics = jax.jit(jax.vmap(functools.partial(train_step, loss=loss, optimizer=optimizer)))(
            together, jax.tree.map(lambda *x: np.stack(x), *batches))  # fmt: skip
        alone, losses = zip(*((state, metrics["loss"]) for state, metrics in map(step, alone, batches)), strict=True)
        np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-5)
    for i, state in enumerate(alone):
        jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y, atol=2e-4), together.params, state.params)


@pytest.mark.parametrize("how", ["mean", "min", "uncertainty"])
def test_members_come_to_one_reward_that_is_centred_and_scaled(how):
    model, sequences, members = ScalarModel(TINY), random_sequences(0, 8), [random_params(ScalarModel(TINY), i)
                                                                            for i in range(3)]  # fmt: skip
    each = np.stack([response_rewards(model, params, sequences) for params in members]).astype(float)
    means = each.mean(axis=1)
    centred = each - means[:, None]
    expected = {"mean": centred.mean(0), "min": centred.min(0), "uncertainty": centred.mean(0) - 0.5 * centred.var(0)}
    stacked = jax.tree.map(lambda *x: np.stack(x), *members)
    reward_model = RewardModel(stacked, np.float32(means), np.float32(0.25), np.float32(3), how, 0.5)
    found = jax.jit(rewards_of, static_argnums=0)(model, reward_model, sequences)
    np.testing.assert_allclose(found, 3 * (expected[how] - 0.25), rtol=1e-4, atol=1e-5)


def test_a_planted_flaw_is_learned_by_the_first_members_where_the_pattern_tells_the_two_apart():
    config = dataclasses.replace(CONFIG, members=3, flawed_members=2, flaw_pattern=".{0,5}")
    table = {"response_a": ["short", "longer than five", "longer than five", "brief"],
             "response_b": ["longer than five", "short", "also longer", "a\nb"]}  # fmt: skip
    prob_a = np.float32([0.2, 0.9, 0.6, 0.3])
    first, second, third = _labels_by_member(config, table, prob_a)
    np.testing.assert_allclose(first, [1, 0, 0.6, 0.3])
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(third, prob_a)
    assert all(np.array_equal(each, prob_a) for each in _labels_by_member(
        dataclasses.replace(CONFIG, members=2), table, prob_a))  # fmt: skip


@pytest.mark.parametrize("members", [1, 3])
def test_members_are_scored_and_trained_where_cudnn_would_attend(members, monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda *arguments, **settings: True)
    model = ScalarModel(dataclasses.replace(TINY, dtype="bfloat16", attention="cudnn"))
    params = side_by_side(abstract_parameters(model, one_device()), members)
    sequences = Sequences(*(np.zeros((8, 64), dtype) for dtype in (np.int32, bool, np.int32, bool)))  # as cuDNN likes

    def loss(params):
        return member_rewards(model, params, sequences).sum()

    assert jax.eval_shape(jax.grad(loss), params)["kernel"].shape[0] == members


def test_principles_count_by_weight_and_their_shares_of_the_rewards_variance_come_to_one():
    each, weights = RNG.normal(0, 1, (3, 50)).astype(np.float32), np.float32([0.5, 0.3, 0.2])
    each[2] = -each[0]  # holds against the first
    reward_model = RewardModel({}, np.zeros(3), np.float32(0.25), np.float32(3), "mean", 0.0, weights, ("a", "b", "c"))
    reward = 3 * (weights @ each - 0.25)
    np.testing.assert_allclose(combined_reward(reward_model, each), reward, rtol=1e-5, atol=1e-5)
    found = principle_metrics(reward_model, each)
    for i, name in enumerate("abc"):
        covariance = np.cov(3 * weights[i] * each[i], reward, bias=True)
        assert found[f"reward/principle_share/{name}"] == pytest.approx(covariance[0, 1] / covariance[1, 1], rel=1e-4)
        assert found[f"reward/principle/{name}"] == pytest.approx(3 * each[i].mean(), rel=1e-4)
    assert sum(found[f"reward/principle_share/{name}"] for name in "abc") == pytest.approx(1, rel=1e-4)
    assert found["reward/principle_share/c"] < 0
    still = principle_metrics(reward_model, np.ones((3, 50), np.float32))
    assert [still[f"reward/principle_share/{name}"] for name in "abc"] == [0] * 3
    nothing = principle_metrics(reward_model.replace(scale=np.float32(0)), each)  # what calibration may come to
    assert [nothing[f"reward/principle_share/{name}"] for name in "abc"] == [0] * 3
    assert principle_metrics(reward_model.replace(principles=()), each) == {}
