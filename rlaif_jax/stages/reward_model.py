"""The Bradley-Terry reward model: trained on the judge's soft labels, calibrated on labels that it did not see, and
centred on samples of the SFT policy.
"""

import functools
from collections.abc import Mapping

import jax
import numpy as np
from scipy import optimize

from rlaif_jax.errors import UserError
from rlaif_jax.files import read_json, write_json
from rlaif_jax.losses.reward import bradley_terry_loss
from rlaif_jax.models.parameters import init_parameters
from rlaif_jax.models.transformer import ScalarModel
from rlaif_jax.parallel.mesh import shard_batch
from rlaif_jax.stages.preferences import Comparisons, encode_comparisons, read_preferences
from rlaif_jax.stages.replies import padded_batches
from rlaif_jax.stages.run import Run, shuffled_batches
from rlaif_jax.training.loop import LoopConfig, train
from rlaif_jax.training.optimizer import make_optimizer
from rlaif_jax.training.sequences import Sequences, response_rewards
from rlaif_jax.training.state import TrainState, abstract_state, init_state
from rlaif_jax.training.step import train_step


def reward_loss(params, batch: Comparisons, model: ScalarModel):
    """Weighted sum over pairs, their weight, and sums of metrics: a `training.step.Loss`."""
    reward_a = response_rewards(model, params, batch.a)
    reward_b = response_rewards(model, params, batch.b)
    total, weight = bradley_terry_loss(reward_a, reward_b, batch.prob_a, batch.weight)
    difference = reward_a - reward_b
    agrees = (difference > 0) == (batch.prob_a > 0.5)
    metrics = {"accuracy": agrees, "margin": abs(difference)}
    return total, weight, {name: ((batch.weight * value).sum(), weight) for name, value in metrics.items()}


def run_reward_model(run: Run) -> None:
    """Reads `label/`; writes `reward_model/checkpoints` and `normalisation.json`. The last pairs are held out."""
    config = run.config.reward_model
    table = read_preferences(run)
    comparisons = encode_comparisons(run, table)
    trained = range(len(comparisons.prob_a) - config.validation_pairs)
    batches = shuffled_batches(trained, config.batch_size, run.order_seed("reward_model"), "reward_model.batch_size")
    model = run.scalar_model()
    optimizer = make_optimizer(config.optimizer, config.steps)
    loss = functools.partial(reward_loss, model=model)
    step_fn = functools.partial(train_step, loss=loss, optimizer=optimizer, micro_batches=config.micro_batches)
    step_fn = jax.jit(step_fn, donate_argnums=0)

    def init() -> TrainState:
        params = init_parameters(model, run.key("reward_head"), run.placement)
        params["decoder"] = run.trained_params("sft", run.language_model())["decoder"]
        return init_state(model, params, optimizer, run.placement)

    def next_step(state: TrainState, step: int):
        rows = np.asarray(batches[step])
        batch = shard_batch(jax.tree.map(lambda x: x[rows], comparisons), run.placement.mesh)
        state, metrics = step_fn(state, batch)
        tokens = sum(x.prompt_mask[rows].sum() + x.response_mask[rows].sum() for x in (comparisons.a, comparisons.b))
        params = state.params

        def compared() -> list[dict]:
            if step + 1 < config.steps:
                return []
            columns = (np.asarray(_rewards(model, params, x)).tolist() for x in (batch.a, batch.b))
            return [
                {name: table[name][row] for name in ("prompt", "response_a", "response_b", "prob_a")}
                | {"reward_a": reward_a, "reward_b": reward_b}
                for row, reward_a, reward_b in zip(rows, *columns, strict=True)
            ]

        return state, metrics | {"tokens": tokens}, compared

    loop = LoopConfig(config.steps, config.checkpoint_every, config.keep_best, config.max_skipped_updates)
    abstract = abstract_state(model, optimizer, run.placement)
    state = train(run.folder("reward_model"), loop, abstract, init, next_step)
    rewards = [score(run, model, state.params, x, config.batch_size) for x in (comparisons.a, comparisons.b)]
    normalisation = _normalisation(run, *rewards, comparisons.prob_a)
    write_json(run.folder("reward_model") / "normalisation.json", normalisation)
    if not normalisation["scale"]:
        print("reward_model: predicts held-out labels no better than chance; its rewards are set to 0", flush=True)


def _normalisation(run: Run, reward_a: np.ndarray, reward_b: np.ndarray, prob_a: np.ndarray) -> dict:
    """The mean of all rewards, their scale, and how well the held-out labels are predicted."""
    config, rewards = run.config.reward_model, np.concatenate([reward_a, reward_b])
    normalisation = {"mean": float(rewards.mean()), "std": float(rewards.std()), "n": len(rewards), "scale": 1.0}
    if config.validation_pairs:
        margins, labels = (reward_a - reward_b)[-config.validation_pairs :], prob_a[-config.validation_pairs :]
        normalisation |= {
            "scale": calibrated_scale(margins, labels, config.min_evidence) if config.calibrate else 1.0,
            "validation_loss": float(np.mean(_losses(margins, labels))),  # 0.693 for a reward model that knows nothing
            "validation_accuracy": float(np.mean((margins > 0) == (labels > 0.5))),
            "validation_pairs": len(labels),
        }
    return normalisation


def calibrated_scale(margins: np.ndarray, prob_a: np.ndarray, min_evidence: float) -> float:
    """The factor in [0, 10] on rewards that predicts held-out labels best; 0 where that shows no more than chance.

    Temperature scaling (Guo et al., arXiv 1706.04599) of sigmoid(reward_a - reward_b). A policy is not to follow
    rewards that do not hold beyond the pairs they were trained on: their mean gain in log-likelihood over knowing
    nothing must be `min_evidence` standard errors above 0.

    margins: [pairs], reward_a - reward_b; prob_a: [pairs], the labels.
    """
    result = optimize.minimize_scalar(lambda scale: np.mean(_losses(scale * margins, prob_a)), bounds=(0, 10))
    gains = _losses(np.zeros_like(margins), prob_a) - _losses(result.x * margins, prob_a)
    standard_error = np.std(gains) / np.sqrt(len(gains))
    return float(result.x) if np.mean(gains) > min_evidence * standard_error else 0.0


def _losses(margins: np.ndarray, prob_a: np.ndarray) -> np.ndarray:
    """-log-likelihood of each label: [pairs], nats."""
    return np.logaddexp(0, margins) - prob_a * margins


def centred_params(run: Run) -> dict:
    """The reward model's parameters with its head scaled and shifted: samples of the SFT policy have mean reward 0.

    (Stiennon et al., arXiv 2009.01325: only differences of rewards are trained, so the offset is free.)
    """
    params = run.trained_params("reward_model", run.scalar_model())
    file = run.folder("reward_model") / "normalisation.json"
    if not file.exists():
        raise UserError(f"{file} is missing: run --stages=reward_model to its end")
    normalisation = read_json(file)
    scale, bias = normalisation["scale"], params["bias"] - normalisation["mean"]
    return params | {"kernel": scale * params["kernel"], "bias": scale * bias}


def score(run: Run, model: ScalarModel, params, sequences: Sequences, batch_size: int) -> np.ndarray:
    """The reward of each response: [n] float32 on the host."""
    rewards = [
        np.asarray(_rewards(model, params, batch))[:rows]
        for rows, batch in padded_batches(sequences, batch_size, run.placement)
    ]
    return np.concatenate(rewards)


def score_texts(run: Run, params, pairs: Mapping[str, list], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The rewards of both responses of each pair (`prompt`, `response_a`, `response_b`): two [n] float32.

    A response that does not fit the policy's length is scored by what fits.
    """
    ended, weight = [True] * len(pairs["prompt"]), [1.0] * len(pairs["prompt"])
    encoded = encode_comparisons(run, {**pairs, "ended_a": ended, "ended_b": ended, "weight": weight})
    a, b = (score(run, run.scalar_model(), params, x, batch_size) for x in (encoded.a, encoded.b))
    return a, b


_rewards = jax.jit(response_rewards, static_argnums=0)
