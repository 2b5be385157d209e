"""From sampled responses to what an RL iteration trains on: rewards, KL, advantages, all frozen.

Follows Huang et al., "The N+ Implementation Details of RLHF with PPO" (arXiv 2403.17031), where they say it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from rlaif_jax.config import RLConfig
from rlaif_jax.losses.advantages import gae, group_relative, leave_one_out, masked_mean, whiten
from rlaif_jax.losses.kl import adapt, k1, k2, k3
from rlaif_jax.losses.logprobs import entropy_and_kl
from rlaif_jax.losses.policy import truncated_weights
from rlaif_jax.models.lora import joined
from rlaif_jax.models.transformer import LanguageModel, ScalarModel, unembedding
from rlaif_jax.training.reward_models import RewardModel, centred_rewards, combined_reward, principle_metrics
from rlaif_jax.training.sequences import Sequences, logprobs_of, response_states, response_values
from rlaif_jax.training.state import TrainState


class Moments(struct.PyTreeNode):
    """Count, mean and summed squared deviation of the scores seen so far (Welford, 1962); [] float32 each."""

    count: jax.Array
    mean: jax.Array
    squares: jax.Array

    @property
    def std(self) -> jax.Array:
        """The population's standard deviation."""
        return jnp.sqrt(self.squares / jnp.maximum(self.count, 1.0))


class Control(struct.PyTreeNode):
    """What an iteration adapts besides parameters."""

    kl_coef: jax.Array  # [] float32
    moments: Moments  # of the scores


class Sampled(struct.PyTreeNode):
    """Responses as they were sampled; those to one prompt stand in consecutive rows."""

    sequences: Sequences
    logprobs: jax.Array  # [batch, length] of the distribution sampled from, by the decoding path
    ended: jax.Array  # [batch] bool, false for a response cut off at the limit


class RLState(struct.PyTreeNode):
    """Policy, value network, their optimizers, and all else that an iteration hands to the next."""

    step: jax.Array  # [] int32: policy updates done
    params: dict  # of the policy
    opt_state: optax.OptState
    skipped: jax.Array  # [] int32: policy updates left out
    value: TrainState | None  # None where advantages need no value network
    control: Control | None  # None while the updates are made
    pending: Sampled | None  # where rollouts lag one iteration: what the next one trains on

    @property
    def policy(self) -> TrainState:
        """The policy's part."""
        return TrainState(self.step, self.params, self.opt_state, self.skipped)

    def with_policy(self, policy: TrainState) -> "RLState":
        """The state with another policy."""
        return self.replace(step=policy.step, params=policy.params, opt_state=policy.opt_state, skipped=policy.skipped)


class Frozen(NamedTuple):
    """Parameters that RL does not train, as where it trains adapters: `lora.joined` with a state's they are whole."""

    policy: dict
    value: dict


NOTHING = Frozen({}, {})


class Rollout(struct.PyTreeNode):
    """What an iteration trains on; all of it frozen before the first update. [batch, length], 0 off the mask."""

    sequences: Sequences
    mask: jax.Array  # bool: response tokens that count; none of a response without a score
    old_logprobs: jax.Array  # of the parameters before the updates, by one full forward pass
    ref_logprobs: jax.Array
    ref_states: jax.Array | None  # [batch, length, width], for the exact KL in the loss
    importance: jax.Array | None  # truncated weights, where they are wanted
    advantages: jax.Array
    old_values: jax.Array | None
    returns: jax.Array | None


def initial_control(config: RLConfig) -> Control:
    """The control of a run's first iteration."""
    zeros = Moments(*jnp.zeros((3,), jnp.float32))
    return Control(jnp.float32(config.kl.coef), zeros)


def reward_per_token(scores: jax.Array, log_ratio: jax.Array, mask: jax.Array, kl_coef: jax.Array) -> jax.Array:
    """-kl_coef * k1 on each token, and the score on the last one.

    Args:
      scores: [batch] float32.
      log_ratio: [batch, length] float32, k1 of policy against reference, zero outside the mask.
      mask: [batch, length], a prefix of each row.

    Returns [batch, length] float32.
    """
    last = jnp.sum(mask, axis=1) - 1
    at_last = jnp.arange(mask.shape[1]) == last[:, None]
    return -kl_coef * log_ratio + jnp.where(at_last, scores[:, None], 0.0)


def normalise(scores: jax.Array, valid: jax.Array, moments: Moments, how: str) -> tuple[jax.Array, Moments]:
    """Scores less their mean and over their deviation so far: (scores, the new moments).

    scores: [batch] float32; valid: [batch] bool, those that count. how: "running" takes in each iteration's scores,
    "reference" those of the first iteration alone, which are the SFT policy's; "none" changes nothing.
    """
    count = jnp.sum(valid.astype(jnp.float32))
    mean = masked_mean(scores, valid)
    squares = jnp.sum(jnp.where(valid, (scores - mean) ** 2, 0.0))
    total, shift = moments.count + count, mean - moments.mean
    share = count / jnp.maximum(total, 1.0)
    merged = Moments(total, moments.mean + shift * share, moments.squares + squares + shift**2 * moments.count * share)
    if how == "reference":
        merged = jax.tree.map(lambda old, new: jnp.where(moments.count > 0, old, new), moments, merged)
    if how == "none":
        return scores, merged
    return (scores - merged.mean) / (merged.std + 1e-8), merged


@functools.partial(jax.jit, static_argnames=("model", "scalar_model", "config"))
def make_rollout(
    model: LanguageModel,
    scalar_model: ScalarModel,
    state: RLState,
    reference,
    reward_model: RewardModel | None,
    sampled: Sampled,
    scores: jax.Array,
    frozen: Frozen = NOTHING,
    *,
    config: RLConfig,
) -> tuple[Rollout, Control, jax.Array, dict[str, jax.Array]]:
    """Everything that the updates need.

    reference: None where it is what the policy's adapter is trained on. reward_model: None where it has no part in the
      reward.
    scores: [batch] float32, the other parts of the reward, NaN where there is none to be had.

    Returns (rollout, the control of the next iteration, scores with all parts [batch], metrics).
    """
    sequences, temperature = sampled.sequences, config.sampling.temperature
    policy, reference = joined(frozen.policy, state.params), frozen.policy if reference is None else reference
    states = response_states(model, policy, sequences)
    ref_states = response_states(model, reference, sequences)
    old_logprobs = logprobs_of(model, states, policy, sequences, temperature)
    ref_logprobs = logprobs_of(model, ref_states, reference, sequences, temperature)
    matrices = unembedding(policy), unembedding(reference)
    cap = model.config.final_logit_softcapping
    entropy, full_kl = entropy_and_kl(states, matrices[0], ref_states, matrices[1], temperature, cap=cap)
    by_principle = {}
    if reward_model is not None:
        each = centred_rewards(scalar_model, reward_model, sequences)
        scores = scores + config.rewards.reward_model * combined_reward(reward_model, each)
        by_principle = principle_metrics(reward_model, each)

    valid = jnp.isfinite(scores)
    mask = sequences.response_mask & valid[:, None]
    known = jnp.where(valid, scores, 0.0)
    used, moments = normalise(known, valid, state.control.moments, config.rewards.normalise)
    if config.rewards.clip:
        used = jnp.clip(used, -config.rewards.clip, config.rewards.clip)
    if config.penalise_missing_eos:
        used = jnp.where(sampled.ended, used, config.missing_eos_reward)
    kl_coef = state.control.kl_coef
    if config.kl.interpolate:
        used *= 1 - kl_coef
    log_ratio = k1(old_logprobs, ref_logprobs) * mask
    in_reward = kl_coef if config.kl.placement == "reward" else jnp.float32(0)
    values = None
    if state.value is not None:
        values = response_values(scalar_model, joined(frozen.value, state.value.params), sequences) * mask
    advantages, returns = _advantages(used, log_ratio, in_reward, values, mask, valid, config)

    lags = old_logprobs - sampled.logprobs
    importance = None
    if config.importance_cap:
        importance = truncated_weights(old_logprobs, sampled.logprobs, config.importance_cap)
    kl_sequence = jnp.sum(log_ratio) / jnp.maximum(jnp.sum(valid), 1)
    metrics = {
        "reward/mean": masked_mean(known, valid),  # before normalisation, penalties and KL
        "reward/std": jnp.sqrt(masked_mean((known - masked_mean(known, valid)) ** 2, valid)),
        "reward/unscored": jnp.mean(1.0 - valid),
        "reward/used": masked_mean(used, valid),
        "kl/k1": masked_mean(log_ratio, mask),
        "kl/k2": masked_mean(k2(old_logprobs, ref_logprobs), mask),
        "kl/k3": masked_mean(k3(old_logprobs, ref_logprobs), mask),
        "kl/full": masked_mean(full_kl, mask),
        "kl/sequence": kl_sequence,  # of k1, nats a response
        "kl/coef": kl_coef,
        "entropy": masked_mean(entropy, mask),
        "tokens": jnp.sum(sequences.prompt_mask) + jnp.sum(sequences.response_mask),
        "response_length": jnp.mean(jnp.sum(sequences.response_mask, axis=1).astype(jnp.float32)),
        "ended_fraction": jnp.mean(sampled.ended.astype(jnp.float32)),
        "sampler_mismatch/max": jnp.max(jnp.abs(lags)),
        "sampler_mismatch/k1": masked_mean(-lags, sequences.response_mask),  # KL of the sampler from the policy
    }
    if importance is not None:
        metrics["importance/mean"] = masked_mean(importance, mask)
        metrics["importance/capped"] = masked_mean(importance >= config.importance_cap, mask)
    if config.kl.target:
        kl_coef = adapt(kl_coef, kl_sequence, config.kl.target, config.kl.horizon, config.batch_size)
    keep_states = config.kl.placement == "loss" and config.kl.estimator == "full"
    rollout = Rollout(
        sequences, mask, old_logprobs, ref_logprobs, ref_states if keep_states else None, importance, advantages,
        values, returns,
    )  # fmt: skip
    return rollout, Control(kl_coef, moments), scores, metrics | by_principle


def _advantages(scores, log_ratio, kl_coef, values, mask, valid, config: RLConfig):
    """(advantages, returns), each [batch, length], 0 off the mask; no returns without values."""
    returns = None
    if config.advantage == "gae":
        rewards = reward_per_token(scores, log_ratio, mask, kl_coef)
        if config.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, values, mask, config.gamma, config.gae_lambda)
    else:
        groups = (-1, config.group_size)
        totals = (scores - kl_coef * jnp.sum(log_ratio, axis=1)).reshape(groups)
        if config.advantage == "leave_one_out":
            each = leave_one_out(totals, valid.reshape(groups))
        else:
            each = group_relative(totals, valid.reshape(groups), config.group_std)
        advantages = each.reshape(-1, 1) * mask
    return (whiten(advantages, mask) if config.whiten_advantages else advantages), returns
