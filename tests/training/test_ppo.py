import jax
import numpy as np
import pytest

from rlaif_jax.models.parameters import decoding_model, decoding_parameters, place_parameters
from rlaif_jax.models.transformer import LanguageModel, ScalarModel
from rlaif_jax.sampling.generate import generate
from rlaif_jax.stages.rl import RLState, make_rollout, policy_loss, reward_per_token, update
from rlaif_jax.training.optimizer import make_optimizer
from rlaif_jax.training.state import init_state
from tests.helpers import EOS, STOPPING, one_device, optimizer_config, random_params, random_sequences, rl_config, tiny

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
    return RLState(policy.step, policy.params, policy.opt_state, value)


@pytest.fixture(scope="module")
def samples(state):
    prompts = random_sequences(0, CONFIG.batch_size)
    return prompts, generate(
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


def roll_out(state, samples, reference=None):
    prompts, samples = samples
    return make_rollout(
        LANGUAGE,
        SCALAR,
        state,
        state.params if reference is None else reference,
        random_params(SCALAR, seed=1),
        prompts.prompts,
        prompts.prompt_mask,
        samples,
        config=CONFIG,
    )


@pytest.fixture(scope="module")
def rolled_out(state, samples):
    return roll_out(state, samples)


@jax.jit
def run_update(state, rollout, key):
    return update(
        state,
        rollout,
        key,
        model=LANGUAGE,
        scalar_model=SCALAR,
        config=CONFIG,
        optimizer=OPTIMIZER,
        value_optimizer=OPTIMIZER,
    )


@jax.jit
def policy_sums(params, rollout):
    return policy_loss(params, rollout, LANGUAGE, CONFIG)


def test_the_kl_to_the_reference_is_zero_at_the_start_up_to_rounding(rolled_out):
    _, _, metrics = rolled_out
    assert max(abs(float(metrics[name])) for name in ("kl/k1", "kl/k3", "kl/sequence")) < 1e-6


def test_the_kl_to_another_reference_is_not(state, samples):
    other = jax.tree.map(lambda x: x * 1.1, state.params)
    rollout, _, metrics = roll_out(state, samples, other)
    assert metrics["kl/k3"] > 0
    assert metrics["kl/k1"] != 0
    lengths = np.asarray(samples[1].samples.mask).sum(1)
    np.testing.assert_allclose(metrics["kl/sequence"], metrics["kl/k1"] * lengths.mean(), rtol=1e-4)
    plain, _, _ = roll_out(state, samples)
    assert np.abs(rollout.returns - plain.returns).max() > 1e-3  # the KL is part of the reward
    assert np.array_equal(rollout.old_logprobs, plain.old_logprobs)


def test_old_logprobs_are_those_of_the_sampler_up_to_rounding(rolled_out, samples):
    rollout, _, metrics = rolled_out
    assert metrics["sampler_mismatch"] < 1e-4
    np.testing.assert_allclose(rollout.old_logprobs, samples[1].samples.logprobs, atol=1e-4)
    assert rollout.old_logprobs.min() < -1


def test_the_ratio_is_exactly_one_before_the_first_update(state, rolled_out):
    rollout, _, _ = rolled_out
    first = jax.tree.map(lambda x: x[:8], rollout)
    for batch in (rollout, first):
        _, weight, sums = policy_sums(state.params, batch)
        assert sums["ratio"] == weight
        assert sums["approx_kl"] == sums["clip_fraction"] == 0


def test_an_update_moves_the_policy_away_from_frozen_old_logprobs_until_the_clip_acts(state, rolled_out):
    rollout, _, _ = rolled_out
    before = jax.device_get(rollout)
    new_state, metrics = run_update(state, rollout, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(rollout))
    assert new_state.step == new_state.value.step == CONFIG.minibatches
    assert metrics["clip_fraction"] > 0  # the mean over minibatches, of which the first has none
    _, weight, sums = policy_sums(new_state.params, rollout)
    assert sums["clip_fraction"] > 0
    assert sums["ratio"] != weight


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
    scores = np.float32([2, 3, 5])
    mask = np.arange(4) < np.array([[4], [2], [1]])
    log_ratio = np.where(mask, np.float32([[1, -1, 2, 3]] * 3), np.float32(0))
    rewards = reward_per_token(scores, log_ratio, mask, np.array([True, False, True]), 0.5, -7.0)
    assert rewards.dtype == np.float32
    np.testing.assert_allclose(rewards, [[-0.5, 0.5, -1, 0.5], [-0.5, -6.5, 0, 0], [4.5, 0, 0, 0]])


def test_fractional_scores_are_not_rounded():
    rewards = reward_per_token(np.float32([0.25]), np.zeros((1, 2), np.float32), np.ones((1, 2), int), np.ones(1), 0, 0)
    np.testing.assert_allclose(rewards, [[0, 0.25]])
