"""The updates of an RL iteration: several passes over a rollout in minibatches, as one scan."""

import functools

import jax
import jax.numpy as jnp
import optax

from rlaif_jax.config import RLConfig
from rlaif_jax.data.packing import PackedRows
from rlaif_jax.losses.kl import ESTIMATORS
from rlaif_jax.losses.logprobs import entropy_and_kl
from rlaif_jax.losses.policy import aggregate, clipped_loss, clipped_value_loss, reinforce_loss
from rlaif_jax.models.transformer import LanguageModel, ScalarModel, unembedding
from rlaif_jax.training.packed import sft_loss
from rlaif_jax.training.rollout import NOTHING, Frozen, RLState, Rollout
from rlaif_jax.training.sequences import logprobs_of, response_states, response_values
from rlaif_jax.training.step import train_step


def policy_loss(
    params,
    batch: tuple[Rollout, PackedRows | None],
    kl_coef: jax.Array,
    reference,
    model: LanguageModel,
    config: RLConfig,
):
    """The policy's loss on a minibatch, with the KL and the demonstrations that the config adds: a `step.Loss`."""
    rollout, demonstrations = batch
    states = response_states(model, params, rollout.sequences)
    logprobs = logprobs_of(model, states, params, rollout.sequences, config.sampling.temperature)
    arguments = (logprobs, rollout.old_logprobs, rollout.advantages, rollout.mask)
    if config.loss == "clipped":
        losses, metrics = clipped_loss(*arguments, config.clip_low, config.clip_high, config.dual_clip)
    else:
        losses, metrics = reinforce_loss(*arguments)
    if rollout.importance is not None:
        losses *= rollout.importance
    if config.kl.placement == "loss":
        kl = _kl(params, reference, states, logprobs, rollout, model, config)
        losses += kl_coef * kl
        metrics["kl/loss"] = (jnp.sum(kl * rollout.mask), jnp.sum(rollout.mask))
    total, weight = aggregate(losses, rollout.mask, config.aggregation)
    if demonstrations is None:
        return total, weight, metrics
    # PPO-ptx (Ouyang et al., arXiv 2203.02155, equation 2): log-likelihood of demonstrations beside the reward.
    ptx, ptx_weight, _ = sft_loss(params, demonstrations, model)
    metrics["ptx_loss"] = (ptx, ptx_weight)
    return {"policy": total, "ptx": config.ptx_coef * ptx}, {"policy": weight, "ptx": ptx_weight}, metrics


def _kl(params, reference, states, logprobs, rollout: Rollout, model: LanguageModel, config: RLConfig) -> jax.Array:
    """The penalty of each token, [batch, length]; what is off the mask does not count."""
    if config.kl.estimator != "full":
        # Where nothing counts there must be nothing to overflow, or its gradient is not a number.
        logprobs, ref_logprobs = (jnp.where(rollout.mask, x, 0.0) for x in (logprobs, rollout.ref_logprobs))
        return ESTIMATORS[config.kl.estimator](logprobs, ref_logprobs)
    # The reference's states, not its logits, are what a rollout can afford to keep.
    matrices, temperature = (unembedding(params), unembedding(reference)), config.sampling.temperature
    cap = model.config.final_logit_softcapping
    return entropy_and_kl(states, matrices[0], rollout.ref_states, matrices[1], temperature, cap=cap)[1]


def value_loss(params, batch: Rollout, model: ScalarModel, config: RLConfig):
    """The value network's loss on a minibatch: a `step.Loss`."""
    values = response_values(model, params, batch.sequences)
    return clipped_value_loss(values, batch.old_values, batch.returns, batch.mask, config.clip_value)


def update(
    state: RLState,
    rollout: Rollout,
    kl_coef: jax.Array,
    reference,
    demonstrations: PackedRows | None,
    key: jax.Array,
    frozen: Frozen = NOTHING,
    *,
    model: LanguageModel,
    scalar_model: ScalarModel,
    config: RLConfig,
    optimizer: optax.GradientTransformation,
    value_optimizer: optax.GradientTransformation,
) -> tuple[RLState, dict[str, jax.Array]]:
    """`epochs` passes over the rollout in freshly permuted minibatches, as one scan. Metrics are their means.

    state: donated by its caller, so without the control, whose arrays `make_rollout` may have passed on.
    kl_coef: [] float32, of a penalty in the loss. reference: the SFT policy's parameters, for the exact KL in
      the loss; None where there is none, or they are frozen.
    demonstrations: rows for all minibatches together, with `ptx_coef`.
    """
    reference = frozen.policy if reference is None else reference
    updates, size = config.epochs * config.minibatches, config.batch_size // config.minibatches
    permutations = [jax.random.permutation(key, config.batch_size) for key in jax.random.split(key, config.epochs)]
    rows = jnp.stack(permutations).reshape(updates, size)
    # Row i, i + updates, ... of the demonstrations are minibatch i's, so that each is spread over all devices.
    demonstrations = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, updates, *x.shape[1:]), 1, 0), demonstrations)
    losses = (
        functools.partial(policy_loss, kl_coef=kl_coef, reference=reference, model=model, config=config),
        functools.partial(value_loss, model=scalar_model, config=config),
    )

    def minibatch(state: RLState, inputs):
        rows, demonstrations = inputs
        batch = jax.tree.map(lambda x: x[rows], rollout)
        policy, metrics = train_step(
            state.policy, (batch, demonstrations), losses[0], optimizer, config.micro_batches, frozen.policy
        )
        state = state.with_policy(policy)
        if state.value is not None:
            value, of_value = train_step(
                state.value, batch, losses[1], value_optimizer, config.micro_batches, frozen.value
            )
            metrics |= {"value/" + name.removeprefix("value/"): x for name, x in of_value.items()}
            state = state.replace(value=value)
        return state, metrics

    state, metrics = jax.lax.scan(minibatch, state, (rows, demonstrations))
    # Of the minibatches whose update was made; where none was, there is no mean.
    means = {}
    for name, x in metrics.items():
        made = metrics["value/skipped" if name.startswith("value/") else "skipped"] == 0
        means[name] = jnp.nanmean(jnp.where(made, x, jnp.nan))
    for part in ("", "value/") if state.value is not None else ("",):
        means[part + "skipped"] = jnp.sum(metrics[part + "skipped"])
        means[part + "skipped_updates"] = metrics[part + "skipped_updates"][-1]
    return state, means
