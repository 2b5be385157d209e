import dataclasses
import functools

import jax
import numpy as np
import pytest

from rlaif_jax.losses.advantages import leave_one_out
from rlaif_jax.models.parameters import decoding_model, decoding_parameters, place_parameters
from rlaif_jax.models.transformer import LanguageModel, ScalarModel
from rlaif_jax.sampling.generate import generate
from rlaif_jax.training.optimizer import make_optimizer
from rlaif_jax.training.policy_update import policy_loss, update
from rlaif_jax.training.rollout import (
    Moments,
    RLState,
    Sampled,
    initial_control,
    make_rollout,
    normalise,
    reward_per_token,
)
from rlaif_jax.training.sequences import Sequences
from rlaif_jax.training.state import init_state
from tests.helpers import (
    EOS,
    STOPPING,
    full_logits,
    one_device,
    one_reward_model,
    optimizer_config,
    random_params,
    random_sequences,
    rl_config,
    tiny,
)

LANGUAGE, SCALAR = LanguageModel(tiny()), ScalarModel(tiny())
NEW = 12
CONFIG = rl_config(batch_size=16)
OPTIMIZER = make_optimizer(optimizer_config(learning_rate=0.02), 100)


@pytest.fixture(scope="module")
def state():
    policy, value = (
        init_state(model, place_parameters(model, random_params(model), one_device()), OPTIMIZER, one_device())
        for model in (LANGUAGE, SCALAR)
    )
    control = initial_control(CONFIG)
    return RLState(policy.step, policy.params, policy.opt_state, policy.skipped, value, control, None)


@pytest.fixture(scope="module")
def sampled(state):
    prompts = random_sequences(0, CONFIG.batch_size)
    replies = generate(
        decoding_model(LANGUAGE),
        decoding_parameters(LANGUAGE, state.params, one_device()),
        prompts.prompts,
        prompts.prompt_mask,
        jax.random.key(0),
        np.arange(CONFIG.batch_size, dtype=np.int32),
        STOPPING,
        max_new_tokens=NEW,
        sampling=CONFIG.sampling,
        cache_dtype="float32",
    )
    samples = replies.samples
    sequences = Sequences(prompts.prompts, prompts.prompt_mask, samples.tokens, samples.mask)
    return Sampled(sequences, samples.logprobs, replies.ended)


def roll_out(state, sampled, reference=None, scores=None, reward_model="random", config=CONFIG):
    """(rollout, scores, metrics); by default the reward model alone gives the scores."""
    rollout, _, scores, metrics = make_rollout(
        LANGUAGE,
        SCALAR,
        state,
        state.params if reference is None else reference,
        one_reward_model(random_params(SCALAR, seed=1)) if reward_model == "random" else reward_model,
        sampled,
        np.zeros(CONFIG.batch_size, np.float32) if scores is None else scores,
        config=config,
    )
    return rollout, scores, metrics


@pytest.fixture(scope="module")
def rolled_out(state, sampled):
    return roll_out(state, sampled)


@jax.jit
def run_update(state, rollout, key):
    return update(
        state,
        rollout,
        state.control.kl_coef,
        state.params,
        None,
        key,
        model=LANGUAGE,
        scalar_model=SCALAR,
        config=CONFIG,
        optimizer=OPTIMIZER,
        value_optimizer=OPTIMIZER,
    )


@functools.partial(jax.jit, static_argnames="config")
def policy_sums(params, rollout, reference=None, config=CONFIG):
    return policy_loss(params, (rollout, None), CONFIG.kl.coef, reference, LANGUAGE, config)


def test_the_kl_to_the_reference_is_zero_at_the_start_up_to_rounding(rolled_out):
    _, _, metrics = rolled_out
    assert max(abs(float(metrics[name])) for name in ("kl/k1", "kl/k2", "kl/k3", "kl/full", "kl/sequence")) < 1e-6


def test_the_kl_to_another_reference_is_not(state, sampled):
    other = jax.tree.map(lambda x: x * 1.1, state.params)
    rollout, _, metrics = roll_out(state, sampled, other)
    assert metrics["kl/k3"] > 0
    assert metrics["kl/k1"] != 0
    lengths = np.asarray(sampled.sequences.response_mask).sum(1)
    np.testing.assert_allclose(metrics["kl/sequence"], metrics["kl/k1"] * lengths.mean(), rtol=1e-4)
    plain, _, _ = roll_out(state, sampled)
    assert np.abs(rollout.returns - plain.returns).max() > 1e-3  # the KL is part of the reward
    assert np.array_equal(rollout.old_logprobs, plain.old_logprobs)


def test_old_logprobs_are_those_of_the_sampler_up_to_rounding(rolled_out, sampled):
    rollout, _, metrics = rolled_out
    assert metrics["sampler_mismatch/max"] < 1e-4
    np.testing.assert_allclose(rollout.old_logprobs, sampled.logprobs, atol=1e-4)
    assert rollout.old_logprobs.min() < -1


def test_the_ratio_is_exactly_one_before_the_first_update(state, rolled_out):
    rollout, _, _ = rolled_out
    first = jax.tree.map(lambda x: x[:8], rollout)
    for batch in (rollout, first):
        _, weight, sums = policy_sums(state.params, batch)
        assert sums["ratio"] == (weight, weight)
        assert sums["approx_kl"][0] == sums["clip_fraction"][0] == 0


def test_an_update_moves_the_policy_away_from_frozen_old_logprobs_until_the_clip_acts(state, rolled_out):
    rollout, _, _ = rolled_out
    before = jax.device_get(rollout)
    new_state, metrics = run_update(state, rollout, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(rollout))
    assert new_state.step == new_state.value.step == CONFIG.minibatches
    assert metrics["clip_fraction"] > 0  # the mean over minibatches, of which the first has none
    _, weight, sums = policy_sums(new_state.params, rollout)
    assert sums["clip_fraction"][0] > 0
    assert sums["ratio"][0] != weight


def test_another_key_permutes_the_minibatches(state, rolled_out):
    one, two, again = (run_update(state, rolled_out[0], jax.random.key(seed))[1] for seed in (0, 1, 0))
    assert one["loss"] != two["loss"]
    assert one["loss"] == again["loss"]


def test_advantages_are_whitened_and_zero_off_the_mask(rolled_out):
    rollout, _, _ = rolled_out
    mask = np.asarray(rollout.sequences.response_mask)
    advantages, returns = np.asarray(rollout.advantages), np.asarray(rollout.returns)
    assert not mask.all()
    assert not advantages[~mask].any()
    assert not returns[~mask].any()
    assert abs(advantages[mask].mean()) < 1e-5
    assert abs(advantages[mask].std() - 1) < 1e-4


def test_only_responses_that_end_get_their_score(state, rolled_out):
    rollout, scores, metrics = rolled_out
    mask = np.asarray(rollout.sequences.response_mask)
    ended = (np.asarray(rollout.sequences.responses) == EOS).any(1)
    assert 0 < ended.sum() < len(ended)
    np.testing.assert_allclose(metrics["ended_fraction"], ended.mean())
    # With gamma = 1 and no KL the rewards sum to the score; the last token's return is its reward.
    last = mask.sum(1) - 1
    expected = np.where(ended, scores, CONFIG.missing_eos_reward)
    np.testing.assert_allclose(np.asarray(rollout.returns)[np.arange(len(last)), last], expected, atol=1e-4)
    np.testing.assert_allclose(metrics["reward/mean"], np.mean(scores), rtol=1e-5)


def test_the_score_sits_on_the_last_real_token_and_the_kl_on_each():
    scores = np.float32([2, -7, 5])
    mask = np.arange(4) < np.array([[4], [2], [1]])
    log_ratio = np.where(mask, np.float32([[1, -1, 2, 3]] * 3), np.float32(0))
    rewards = reward_per_token(scores, log_ratio, mask, 0.5)
    assert rewards.dtype == np.float32
    np.testing.assert_allclose(rewards, [[-0.5, 0.5, -1, 0.5], [-0.5, -6.5, 0, 0], [4.5, 0, 0, 0]])


def test_fractional_scores_are_not_rounded():
    rewards = reward_per_token(np.float32([0.25]), np.zeros((1, 2), np.float32), np.ones((1, 2), int), 0.0)
    np.testing.assert_allclose(rewards, [[0, 0.25]])


def test_the_exact_kl_is_that_of_the_whole_vocabulary_at_the_sampling_temperature(state, sampled):
    other = jax.tree.map(lambda x: x * 1.1, state.params)
    _, _, metrics = roll_out(state, sampled, other)
    total, count = 0.0, 0
    prompts, mask, responses, kept = (np.asarray(x) for x in dataclasses.astuple(sampled.sequences))
    for row in range(0, len(prompts)):
        tokens = np.concatenate([prompts[row][mask[row]], responses[row][kept[row]]])
        start, end = mask[row].sum() - 1, len(tokens) - 1
        logits = [full_logits(LANGUAGE, params, np.pad(tokens, (0, 20 - len(tokens)))[None])[0, start:end].astype(float)
                  for params in (state.params, other)]  # fmt: skip
        ours, theirs = (x / CONFIG.sampling.temperature for x in logits)
        ours, theirs = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (ours, theirs))
        total, count = total + (np.exp(ours) * (ours - theirs)).sum(), count + end - start
    np.testing.assert_allclose(metrics["kl/full"], total / count, rtol=1e-3)


def test_a_response_without_a_score_counts_for_nothing(state, sampled):
    config = rl_config(batch_size=16, advantage="leave_one_out", group_size=4, whiten_advantages=False)
    state = state.replace(value=None)
    scores = np.arange(16, dtype=np.float32)
    scores[[2, 12, 13, 14, 15]] = np.nan
    rollout, _, metrics = roll_out(state, sampled, scores=scores, reward_model=None, config=config)
    assert metrics["reward/unscored"] == 5 / 16
    known = np.isfinite(scores)
    np.testing.assert_allclose(metrics["reward/mean"], scores[known].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["reward/std"], scores[known].std(), rtol=1e-5)
    ended = np.where(sampled.ended, np.nan_to_num(scores), CONFIG.missing_eos_reward).reshape(-1, 4)
    expected = np.asarray(leave_one_out(ended.astype(np.float32), known.reshape(-1, 4))).reshape(-1, 1)
    mask = np.asarray(sampled.sequences.response_mask) & known[:, None]
    assert np.array_equal(rollout.mask, mask)
    np.testing.assert_allclose(rollout.advantages, expected * mask, atol=1e-5)
    total, weight, _ = policy_sums(state.params, rollout, config=config)
    assert np.isfinite(total) and weight == mask.sum()


def test_the_exact_kl_in_the_loss_has_the_gradient_of_a_distribution_from_its_reference(state, sampled):
    kl = dataclasses.replace(CONFIG.kl, placement="loss", estimator="full")
    config = rl_config(batch_size=16, kl=kl)
    other = jax.tree.map(lambda x: x * 1.1, state.params)
    rollout, _, _ = roll_out(state, sampled, other, config=config)
    frozen = rollout.replace(advantages=0 * rollout.advantages)
    gradient = jax.grad(lambda params, reference: policy_sums(params, frozen, reference, config)[0])
    assert max(np.abs(x).max() for x in jax.tree.leaves(gradient(state.params, other))) > 1e-2
    own = roll_out(state, sampled, config=config)[0].replace(advantages=0 * rollout.advantages)
    at_home = jax.grad(lambda params: policy_sums(params, own, state.params, config)[0])(state.params)
    assert max(np.abs(x).max() for x in jax.tree.leaves(at_home)) < 1e-4


def test_running_moments_are_those_of_all_scores_so_far_and_the_references_of_the_first():
    rng, seen = np.random.default_rng(0), []
    running = reference = Moments(*np.zeros(3, np.float32))
    for size in (5, 8, 3):
        scores, valid = rng.normal(3, 2, size).astype(np.float32), rng.random(size) < 0.8
        seen.append(scores[valid])
        ours, running = normalise(scores, valid, running, "running")
        everything = np.concatenate(seen).astype(np.float64)
        np.testing.assert_allclose(ours, (scores - everything.mean()) / everything.std(), rtol=1e-4, atol=1e-4)
        ours, reference = normalise(scores, valid, reference, "reference")
        np.testing.assert_allclose(ours, (scores - seen[0].mean()) / seen[0].std(), rtol=1e-4, atol=1e-4)
        assert np.array_equal(normalise(scores, valid, running, "none")[0], scores)


def test_metrics_are_means_of_the_minibatches_whose_update_was_made(state, rolled_out):
    rollout, _, _ = rolled_out
    broken = rollout.replace(advantages=rollout.advantages.at[0].set(np.nan))
    _, metrics = run_update(state, broken, jax.random.key(0))
    assert (metrics["skipped"], metrics["skipped_updates"], metrics["value/skipped"]) == (1, 1, 0)
    assert all(np.isfinite(value) for value in metrics.values())


def test_a_response_without_a_score_may_be_as_far_from_the_reference_as_it_likes(state, sampled):
    kl = dataclasses.replace(CONFIG.kl, placement="loss", estimator="k3")
    config = rl_config(batch_size=16, kl=kl)
    rollout, _, _ = roll_out(state, sampled, config=config)
    far = rollout.replace(mask=rollout.mask.at[0].set(False), ref_logprobs=rollout.ref_logprobs.at[0].set(200.0))
    value, gradient = jax.value_and_grad(lambda params: policy_sums(params, far, config=config)[0])(state.params)
    assert np.isfinite(value) and all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
