"""The Bradley-Terry reward model: trained on the judge's soft labels, centred on samples of the SFT policy."""

import functools
import json

import jax
import numpy as np
from flax import struct

from rlaif_jax.data.encoding import encode_prompts, encode_responses
from rlaif_jax.errors import UserError
from rlaif_jax.files import read_parquet, write_json
from rlaif_jax.judge import store
from rlaif_jax.losses.reward import bradley_terry_loss
from rlaif_jax.models.parameters import init_parameters
from rlaif_jax.models.transformer import ScalarModel
from rlaif_jax.parallel.mesh import shard_batch
from rlaif_jax.stages.run import Run, padded_batches, shuffled_batches
from rlaif_jax.training.loop import LoopConfig, train
from rlaif_jax.training.optimizer import make_optimizer
from rlaif_jax.training.sequences import Sequences, response_rewards
from rlaif_jax.training.state import TrainState, abstract_state, init_state
from rlaif_jax.training.step import train_step


class Comparisons(struct.PyTreeNode):
    """A batch of labelled pairs."""

    a: Sequences
    b: Sequences
    prob_a: jax.Array  # [batch] float32


def reward_loss(params, batch: Comparisons, model: ScalarModel):
    """Sum over pairs, their number, and sums of metrics: a `training.step.Loss`."""
    reward_a = response_rewards(model, params, batch.a)
    reward_b = response_rewards(model, params, batch.b)
    total, weight = bradley_terry_loss(reward_a, reward_b, batch.prob_a)
    difference = reward_a - reward_b
    agrees = (difference > 0) == (batch.prob_a > 0.5)
    return total, weight, {"accuracy": agrees.sum(), "margin": abs(difference).sum()}


def run_reward_model(run: Run) -> None:
    """Reads `label/preferences.parquet`; writes `reward_model/checkpoints` and `normalisation.json`."""
    config = run.config.reward_model
    table = _read_labels(run)
    comparisons = _encode(run, table)
    batches = shuffled_batches(range(len(comparisons.prob_a)), config.batch_size, run.config.seed)
    model = run.scalar_model()
    optimizer = make_optimizer(config.optimizer, config.steps)
    loss = functools.partial(reward_loss, model=model)
    step_fn = jax.jit(functools.partial(train_step, loss=loss, optimizer=optimizer), donate_argnums=0)

    def init() -> TrainState:
        params = init_parameters(model, run.key("reward_head"), run.placement)
        params["decoder"] = run.trained_params("sft", run.language_model())["decoder"]
        return init_state(model, params, optimizer, run.placement)

    def next_step(state: TrainState, step: int):
        rows = np.asarray(batches[step])
        batch = shard_batch(jax.tree.map(lambda x: x[rows], comparisons), run.placement.mesh)
        state, metrics = step_fn(state, batch)
        tokens = sum(x.prompt_mask[rows].sum() + x.response_mask[rows].sum() for x in (comparisons.a, comparisons.b))
        samples = []
        if step + 1 == config.steps:
            columns = (np.asarray(_rewards(model, state.params, x)).tolist() for x in (batch.a, batch.b))
            samples = [
                {name: table[name][row] for name in ("prompt", "response_a", "response_b", "prob_a")}
                | {"reward_a": reward_a, "reward_b": reward_b}
                for row, reward_a, reward_b in zip(rows, *columns, strict=True)
            ]
        return state, metrics | {"tokens": tokens}, samples

    loop = LoopConfig(config.steps, config.checkpoint_every)
    abstract = abstract_state(model, optimizer, run.placement)
    state = train("reward_model", run.workdir, loop, abstract, init, next_step)
    samples = jax.tree.map(lambda a, b: np.concatenate([a, b]), comparisons.a, comparisons.b)
    rewards = score(run, model, state.params, samples, config.batch_size)
    normalisation = {"mean": float(rewards.mean()), "std": float(rewards.std()), "n": len(rewards)}
    write_json(run.workdir / "reward_model" / "normalisation.json", normalisation)


def centred_params(run: Run) -> dict:
    """The reward model's parameters, its bias shifted so that samples of the SFT policy have mean reward 0.

    (Stiennon et al., arXiv 2009.01325: only differences of rewards are trained, so the offset is free.)
    """
    params = run.trained_params("reward_model", run.scalar_model())
    file = run.workdir / "reward_model" / "normalisation.json"
    if not file.exists():
        raise UserError(f"{file} is missing: run --stages=reward_model to its end")
    return params | {"bias": params["bias"] - json.loads(file.read_text())["mean"]}


def score(run: Run, model: ScalarModel, params, sequences: Sequences, batch_size: int) -> np.ndarray:
    """The reward of each response: [n] float32 on the host."""
    rewards = [
        np.asarray(_rewards(model, params, batch))[:rows]
        for rows, batch in padded_batches(sequences, batch_size, run.placement)
    ]
    return np.concatenate(rewards)


_rewards = jax.jit(response_rewards, static_argnums=0)


def _read_labels(run: Run) -> dict[str, list]:
    file = run.workdir / "label" / "preferences.parquet"
    if not file.exists():
        raise UserError(f"{file} is missing: run --stages=label first")
    return store.scored(read_parquet(file)).to_pydict()


def _encode(run: Run, table: dict[str, list]) -> Comparisons:
    policy, tokenizer = run.config.policy, run.tokenizer()
    prompts, prompt_mask = encode_prompts(tokenizer, table["prompt"], policy.max_prompt_length)

    def sequences(column: str) -> Sequences:
        encoded = encode_responses(tokenizer, table[column], policy.max_response_length, truncate=True)
        return Sequences(prompts, prompt_mask, *encoded)

    return Comparisons(sequences("response_a"), sequences("response_b"), np.asarray(table["prob_a"], np.float32))
