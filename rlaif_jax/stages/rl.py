"""PPO: the policy samples, the reward model scores, and both policy and value network are updated.

Follows Huang et al., "The N+ Implementation Details of RLHF with PPO" (arXiv 2403.17031).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from rlaif_jax.config import RLConfig
from rlaif_jax.data.encoding import decode_responses, encode_prompts
from rlaif_jax.losses.advantages import gae, masked_mean, whiten
from rlaif_jax.losses.kl import k1, k3
from rlaif_jax.losses.policy import clipped_value_loss, ppo_policy_loss
from rlaif_jax.models.parameters import decoding_model, decoding_parameters
from rlaif_jax.models.transformer import LanguageModel, ScalarModel
from rlaif_jax.parallel.mesh import shard_batch
from rlaif_jax.sampling.buckets import bucket_of, length_buckets
from rlaif_jax.sampling.decode import Replies
from rlaif_jax.sampling.generate import generate
from rlaif_jax.sampling.stopping import make_stopping
from rlaif_jax.stages.reward_model import centred_params
from rlaif_jax.stages.run import Run, shuffled_batches
from rlaif_jax.training.loop import LoopConfig, train
from rlaif_jax.training.optimizer import make_optimizer
from rlaif_jax.training.sequences import Sequences, response_logprobs, response_rewards, response_values
from rlaif_jax.training.state import TrainState, abstract_state, init_state
from rlaif_jax.training.step import train_step


class RLState(struct.PyTreeNode):
    """Policy and value network with their optimizers."""

    step: jax.Array  # [] int32: policy updates done
    params: dict  # of the policy
    opt_state: optax.OptState
    value: TrainState


class Rollout(struct.PyTreeNode):
    """What an iteration trains on; all of it frozen before the first update."""

    sequences: Sequences
    old_logprobs: jax.Array  # [batch, length] of the parameters that sampled, by one full forward pass
    old_values: jax.Array  # [batch, length]
    advantages: jax.Array  # [batch, length] whitened
    returns: jax.Array  # [batch, length]


def reward_per_token(
    scores: jax.Array,
    log_ratio: jax.Array,
    mask: jax.Array,
    ended: jax.Array,
    kl_coef: float,
    missing_eos_reward: float,
) -> jax.Array:
    """-kl_coef * k1 on each token, and the score on the last one.

    Args:
      scores: [batch] float32, the reward model's.
      log_ratio: [batch, length] float32, k1 of policy against reference, zero outside the mask.
      mask: [batch, length], a prefix of each row.
      ended: [batch] bool; a response without end-of-sequence token gets `missing_eos_reward` as its score.

    Returns [batch, length] float32.
    """
    scores = jnp.where(ended, scores, missing_eos_reward)
    last = jnp.sum(mask, axis=1) - 1
    at_last = jnp.arange(mask.shape[1]) == last[:, None]
    return -kl_coef * log_ratio + jnp.where(at_last, scores[:, None], 0.0)


@functools.partial(jax.jit, static_argnames=("model", "scalar_model", "config"))
def make_rollout(
    model: LanguageModel,
    scalar_model: ScalarModel,
    state: RLState,
    reference,
    reward_params,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    replies: Replies,
    *,
    config: RLConfig,
) -> tuple[Rollout, jax.Array, dict[str, jax.Array]]:
    """Everything the updates need, from the state that sampled. Returns (rollout, scores [batch], metrics)."""
    samples, mask = replies.samples, replies.samples.mask
    sequences = Sequences(prompts, prompt_mask, samples.tokens, mask)
    old_logprobs, entropy = response_logprobs(model, state.params, sequences, config.sampling.temperature)
    ref_logprobs, _ = response_logprobs(model, reference, sequences, config.sampling.temperature)
    old_values = response_values(scalar_model, state.value.params, sequences)
    scores = response_rewards(scalar_model, reward_params, sequences)
    log_ratio = k1(old_logprobs, ref_logprobs)
    rewards = reward_per_token(scores, log_ratio, mask, replies.ended, config.kl_coef, config.missing_eos_reward)
    advantages, returns = gae(rewards, old_values, mask, config.gamma, config.gae_lambda)
    rollout = Rollout(sequences, old_logprobs, old_values, whiten(advantages, mask), returns)
    metrics = {
        "reward/mean": jnp.mean(scores),  # of the reward model alone, before missing_eos_reward and KL
        "reward/std": jnp.std(scores),
        "kl/k1": masked_mean(log_ratio, mask),
        "kl/k3": masked_mean(k3(old_logprobs, ref_logprobs), mask),
        "kl/sequence": jnp.mean(jnp.sum(log_ratio, axis=1)),
        "entropy": masked_mean(entropy, mask),
        "tokens": jnp.sum(prompt_mask) + jnp.sum(mask),
        "response_length": jnp.mean(jnp.sum(mask, axis=1).astype(jnp.float32)),
        "ended_fraction": jnp.mean(replies.ended.astype(jnp.float32)),
        "sampler_mismatch": jnp.max(jnp.abs(samples.logprobs - old_logprobs)),
    }
    return rollout, scores, metrics


def policy_loss(params, batch: Rollout, model: LanguageModel, config: RLConfig):
    """PPO's policy loss on a minibatch: a `training.step.Loss`."""
    logprobs, _ = response_logprobs(model, params, batch.sequences, config.sampling.temperature)
    mask = batch.sequences.response_mask
    return ppo_policy_loss(logprobs, batch.old_logprobs, batch.advantages, mask, config.clip_ratio)


def value_loss(params, batch: Rollout, model: ScalarModel, config: RLConfig):
    """PPO's value loss on a minibatch: a `training.step.Loss`."""
    values = response_values(model, params, batch.sequences)
    mask = batch.sequences.response_mask
    return clipped_value_loss(values, batch.old_values, batch.returns, mask, config.clip_value)


def update(
    state: RLState,
    rollout: Rollout,
    key: jax.Array,
    *,
    model: LanguageModel,
    scalar_model: ScalarModel,
    config: RLConfig,
    optimizer: optax.GradientTransformation,
    value_optimizer: optax.GradientTransformation,
) -> tuple[RLState, dict[str, jax.Array]]:
    """`epochs` passes over the rollout in freshly permuted minibatches, as one scan. Metrics are their means."""
    size = config.batch_size // config.minibatches
    permutations = [jax.random.permutation(key, config.batch_size) for key in jax.random.split(key, config.epochs)]
    rows = jnp.stack(permutations).reshape(-1, size)
    losses = (
        functools.partial(policy_loss, model=model, config=config),
        functools.partial(value_loss, model=scalar_model, config=config),
    )

    def minibatch(state: RLState, rows):
        batch = jax.tree.map(lambda x: x[rows], rollout)
        policy = TrainState(state.step, state.params, state.opt_state)
        policy, metrics = train_step(policy, batch, losses[0], optimizer)
        value, value_metrics = train_step(state.value, batch, losses[1], value_optimizer)
        metrics |= {"value/" + name.removeprefix("value/"): x for name, x in value_metrics.items()}
        return RLState(policy.step, policy.params, policy.opt_state, value), metrics

    state, metrics = jax.lax.scan(minibatch, state, rows)
    return state, jax.tree.map(jnp.mean, metrics)


def run_rl(run: Run) -> None:
    """Reads the SFT policy and the reward model; writes `rl/checkpoints`."""
    config, policy = run.config.rl, run.config.policy
    model, scalar_model, tokenizer = run.language_model(), run.scalar_model(), run.tokenizer()
    texts = run.data("train_prompts")["prompt"]
    tokens, mask = encode_prompts(tokenizer, texts, policy.max_prompt_length)
    lengths = mask.sum(axis=1)
    buckets = length_buckets(lengths, run.config.sampler.prompt_buckets, run.config.sampler.bucket_multiple)
    batches = shuffled_batches(range(len(texts)), config.batch_size, run.order_seed("rl"))
    reference, reward_params = run.trained_params("sft", model), centred_params(run)
    stopping = make_stopping(tokenizer)

    updates = config.steps * config.epochs * config.minibatches
    optimizer = make_optimizer(config.optimizer, updates)
    value_optimizer = make_optimizer(config.value_optimizer, updates)
    update_fn = functools.partial(
        update,
        model=model,
        scalar_model=scalar_model,
        config=config,
        optimizer=optimizer,
        value_optimizer=value_optimizer,
    )
    update_fn = jax.jit(update_fn, donate_argnums=0)

    def state_of(policy: TrainState, value: TrainState) -> RLState:
        return RLState(policy.step, policy.params, policy.opt_state, value)

    def init() -> RLState:
        value = init_state(scalar_model, reward_params, value_optimizer, run.placement)
        return state_of(init_state(model, reference, optimizer, run.placement), value)

    def next_step(state: RLState, step: int):
        rows = np.asarray(batches[step])
        padding = max(policy.max_prompt_length - bucket_of(lengths[rows].max(), buckets), 0)
        arrays = (tokens[rows, padding:], mask[rows, padding:], np.arange(len(rows), dtype=np.int32))
        prompts, prompt_mask, row_ids = shard_batch(arrays, run.placement.mesh)
        replies = generate(
            decoding_model(model),
            decoding_parameters(model, state.params, run.placement),
            prompts,
            prompt_mask,
            run.key("rollout", step),
            row_ids,
            stopping,
            max_new_tokens=policy.max_response_length,
            sampling=config.sampling,
            cache_dtype=run.config.sampler.cache_dtype or model.config.dtype,
        )
        rollout, scores, metrics = make_rollout(
            model, scalar_model, state, reference, reward_params, prompts, prompt_mask, replies, config=config
        )
        state, update_metrics = update_fn(state, rollout, run.key("permutation", step))

        def shown() -> list[dict]:
            if step % config.samples_every and step + 1 < config.steps:
                return []
            first, reward = jax.device_get((jax.tree.map(lambda x: x[:1], replies.samples), scores[0]))
            (reply,) = decode_responses(tokenizer, first.tokens, first.mask)
            return [{"prompt": texts[rows[0]], "response": reply, "reward": float(reward)}]

        return state, metrics | update_metrics, shown

    abstract = state_of(
        abstract_state(model, optimizer, run.placement), abstract_state(scalar_model, value_optimizer, run.placement)
    )
    train(
        run.folder("rl"), LoopConfig(config.steps, config.checkpoint_every, config.keep_best), abstract, init, next_step
    )
