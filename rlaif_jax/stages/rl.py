"""Policy gradients: the policy samples, its responses are scored, policy and value network are updated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlaif_jax.config import RLConfig
from rlaif_jax.data.encoding import decode_responses
from rlaif_jax.data.packing import PackedRows, lay_out
from rlaif_jax.errors import UserError
from rlaif_jax.models.lora import Start, joined, start
from rlaif_jax.models.parameters import init_parameters, to_device
from rlaif_jax.models.transformer import HEAD
from rlaif_jax.parallel.mesh import batch_sharding, shard_batch, shard_rows
from rlaif_jax.parallel.processes import put, to_host
from rlaif_jax.progress import warn
from rlaif_jax.stages.reward_model import load_reward_model, one_member
from rlaif_jax.stages.rewards import load_gold, load_rewards, load_token_reward_model
from rlaif_jax.stages.rollouts import Rollouts
from rlaif_jax.stages.run import Run, shuffled_batches
from rlaif_jax.stages.sft import demonstration_rows
from rlaif_jax.training.alarms import alarms
from rlaif_jax.training.loop import LoopConfig, train
from rlaif_jax.training.optimizer import make_optimizer
from rlaif_jax.training.policy_update import update
from rlaif_jax.training.rollout import Control, Frozen, Moments, RLState, Sampled, initial_control, make_rollout
from rlaif_jax.training.sequences import Sequences
from rlaif_jax.training.state import abstract_state, init_state


def run_rl(run: Run) -> None:
    """Reads the policy (`Run.start`) and, where it is part of the reward, the reward model; writes `rl/checkpoints`."""
    config, model, scalar_model = run.config.rl, run.language_model(), run.scalar_model()
    tokenizer, mesh = run.tokenizer(), run.placement.mesh
    count = config.batch_size // config.group_size
    one_shape = bool(config.rollout_lag)  # responses kept in the state
    what = "rl.batch_size / group_size"
    rollouts = Rollouts(run, "rl", count, config.group_size, config.sampling, what, one_shape)
    lora, reference = run.lora("rl"), run.waiting("reference", run.base_params("rl"))
    reward_model = run.waiting("reward_model", load_token_reward_model(run))
    exact_kl = config.kl.placement == "loss" and config.kl.estimator == "full"
    text_rewards, gold, demonstrations = load_rewards(run), load_gold(run), _demonstrations(run)

    begin = start(model, lora, lambda: to_device(reference), run.key("rl adapter"), run.placement)
    of_value = Start({}, dict)
    if config.advantage == "gae":
        key = run.key("value adapter")
        of_value = start(scalar_model, lora, lambda: _value_params(run, to_device(reference)), key, run.placement)
    frozen = Frozen(begin.frozen, of_value.frozen)
    optimizer, value_optimizer = optimizers(config)
    update_fn = update_function(run)
    zeros = shard_batch(np.zeros(config.batch_size, np.float32), mesh)

    def init() -> RLState:
        policy, value = init_state(model, begin.trained(), optimizer, run.placement, lora), None
        if config.advantage == "gae":
            value = init_state(scalar_model, of_value.trained(), value_optimizer, run.placement, lora)
        control = jax.tree.map(lambda x: put(x, run.placement.whole), initial_control(config))
        pending = rollouts.sample(to_device(reference), 0) if config.rollout_lag else None
        return RLState(policy.step, policy.params, policy.opt_state, policy.skipped, value, control, pending)

    def next_step(state: RLState, step: int):
        sampled, policy = state.pending, joined(frozen.policy, state.params)
        if config.rollout_lag:
            state = state.replace(pending=rollouts.sample(policy, step + 1))
        else:
            sampled = rollouts.sample(policy, step)
        del policy  # the update donates what is trained
        prompts, scores, text_metrics = rollouts.prompts(step), zeros, {}
        if text_rewards.needed or gold.needed:
            sequences, ended = to_host((sampled.sequences, sampled.ended))
            texts = decode_responses(tokenizer, sequences.responses, sequences.response_mask)
        if text_rewards.needed:
            host_scores, text_metrics = text_rewards(prompts, texts, sequences.response_mask.sum(axis=1), ended)
            scores = shard_batch(host_scores, mesh)
        used = to_device((None if lora else reference, reward_model))
        rollout, control, scores, metrics = make_rollout(
            model, scalar_model, state, *used, sampled, scores, frozen, config=config
        )
        in_update = used[0] if exact_kl else None
        del used  # copies of what waits in host memory are gone before the update
        kl_coef, key = state.control.kl_coef, run.key("permutation", step)
        state = state.replace(control=None)
        state, update_metrics = update_fn(state, rollout, kl_coef, in_update, demonstrations(step), key, frozen)
        state = state.replace(control=control)
        if gold.needed:  # nothing waits for it: the device updates meanwhile
            text_metrics |= gold.metrics(prompts, texts, ended)

        def shown() -> list[dict]:
            if step % config.samples_every and step + 1 < config.steps:
                return []
            first, reward = to_host((jax.tree.map(lambda x: x[:1], rollout.sequences), scores[0]))
            (reply,) = decode_responses(tokenizer, first.responses, first.response_mask)
            reward = float(reward) if np.isfinite(reward) else None
            return [{"prompt": prompts[0], "response": reply, "reward": reward}]

        return state, metrics | text_metrics | update_metrics, shown

    loop = LoopConfig(
        config.steps, config.checkpoint_every, config.keep_best, config.max_skipped_updates, config.keep_every
    )
    train(run.folder("rl"), loop, abstract_rl_state(run), init, next_step, _Watch(run))


def optimizers(config: RLConfig) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """The policy's, and the value network's."""
    updates = config.steps * config.epochs * config.minibatches
    return make_optimizer(config.optimizer, updates), make_optimizer(config.value_optimizer, updates)


def update_function(run: Run) -> jax.stages.Wrapped:
    """`policy_update.update` of a run, compiled; the state is donated."""
    config = run.config.rl
    optimizer, value_optimizer = optimizers(config)
    update_fn = functools.partial(
        update,
        model=run.language_model(),
        scalar_model=run.scalar_model(),
        config=config,
        optimizer=optimizer,
        value_optimizer=value_optimizer,
    )
    return jax.jit(update_fn, donate_argnums=0)


def abstract_rl_state(run: Run) -> RLState:
    """Shapes, dtypes and shardings of the state between two iterations."""
    config, (optimizer, value_optimizer) = run.config.rl, optimizers(run.config.rl)
    lora, value = run.lora("rl"), None
    begin = abstract_state(run.language_model(), optimizer, run.placement, lora)
    if config.advantage == "gae":
        value = abstract_state(run.scalar_model(), value_optimizer, run.placement, lora)
    pending = abstract_sampled(run) if config.rollout_lag else None
    return RLState(begin.step, begin.params, begin.opt_state, begin.skipped, value, _abstract_control(run), pending)


class _Watch:
    """Reads each iteration's metrics: says what alarms they raise, once each, and stops where scores are missing."""

    def __init__(self, run: Run):
        self._config, self._said = run.config.rl, set()
        rewards = self._config.rewards
        parts = {"the reward model": rewards.reward_model, "the judge": rewards.judge}
        parts[f"the verifier {rewards.verifier_function}"] = rewards.verifier
        self._scorers = " or ".join(part for part, weight in parts.items() if weight)

    def __call__(self, step: int, metrics: dict) -> None:
        unscored, limit = metrics["reward/unscored"], self._config.rewards.max_unscored_rate
        if unscored > limit:
            raise UserError(
                f"stage rl stopped at step {step}: {unscored:.1%} of the responses have no score, more than "
                f"config.rl.rewards.max_unscored_rate={limit:g}: see what {self._scorers} makes of rl/samples.jsonl"
            )
        for name, text in alarms(metrics, self._config.alarms).items():
            if name not in self._said:
                warn(f"alarm at rl step {step}: {text}")
                self._said.add(name)


def _value_params(run: Run, reference) -> dict:
    """What the value network begins as (Huang et al.: the reward model; Lee et al.: the SFT policy)."""
    if run.config.rl.value_init == "reward_model":
        return one_member(load_reward_model(run), 0)
    head = init_parameters(run.scalar_model(), run.key("value_head"), run.placement, HEAD)
    return head | {"decoder": reference["decoder"]}


def _demonstrations(run: Run):
    """step -> the packed demonstrations beside its minibatches, or None without `ptx_coef`."""
    config, sft = run.config.rl, run.config.sft
    if not config.ptx_coef:
        return lambda step: None
    rows = demonstration_rows(run)
    count = config.ptx_rows * config.epochs * config.minibatches
    what = "rl.ptx_rows x epochs x minibatches"
    batches = shuffled_batches(range(len(rows)), count, run.order_seed("ptx"), what, "rows")

    def batch(step: int) -> PackedRows:
        chosen = [rows[row] for row in batches[step]]
        return shard_rows(chosen, lambda rows: lay_out(rows, sft.row_length), run.placement.mesh)

    return batch


def _abstract_control(run: Run) -> Control:
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=run.placement.whole)
    return Control(number, Moments(number, number, number))


def abstract_sampled(run: Run) -> Sampled:
    """Shapes, dtypes and shardings of an iteration's responses."""
    policy, rows = run.config.policy, run.config.rl.batch_size

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=batch_sharding((rows, *shape), run.placement.mesh))

    prompt, response = policy.max_prompt_length, policy.max_response_length
    sequences = Sequences(
        array(jnp.int32, prompt), array(jnp.bool_, prompt), array(jnp.int32, response), array(jnp.bool_, response)
    )
    return Sampled(sequences, array(jnp.float32, response), array(jnp.bool_))
