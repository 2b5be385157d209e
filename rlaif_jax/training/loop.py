"""The resumable loop that every training stage runs."""

import dataclasses
import time
from collections.abc import Callable
from typing import TypeVar

import jax
from etils import epath

from rlaif_jax.errors import UserError
from rlaif_jax.progress import progress
from rlaif_jax.training.checkpoints import Checkpoints
from rlaif_jax.training.metrics import StageLog

State = TypeVar("State")
# (state, step) -> (state, metrics, samples to log). Everything random or read in a step is a function of the
# step, so that a resumed run does what an undisturbed one does. The metric `tokens` counts what the step worked on.
NextStep = Callable[[State, int], tuple[State, dict, list[dict]]]


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long a stage trains and how often it saves."""

    steps: int
    checkpoint_every: int


def train(
    folder: epath.Path, config: LoopConfig, abstract: State, init: Callable[[], State], next_step: NextStep
) -> State:
    """Runs `next_step` from the newest checkpoint, or from `init()`, to `config.steps`; returns the last state.

    Checkpoints and metrics go to `folder`, TensorBoard files to `logs` beside it. Raises UserError where a metric
    is not finite, keeping the last checkpoint.
    """
    name = folder.name
    checkpoints = Checkpoints(folder / "checkpoints")
    start = checkpoints.latest_step() or 0
    state = checkpoints.restore(abstract) if start else init()
    log = StageLog(folder, folder.parent / "logs", start)
    try:
        for step in progress(range(start, config.steps), name, total=config.steps, initial=start, unit="step"):
            began = time.perf_counter()
            state, metrics, samples = next_step(state, step)
            metrics = jax.device_get(metrics)
            if not all(map(_finite, metrics.values())):
                bad = sorted(key for key, value in metrics.items() if not _finite(value))
                raise UserError(
                    f"stage {name} stopped at step {step}: {', '.join(bad)} not finite; the last checkpoint is "
                    f"step {checkpoints.latest_step() or 0}. Lower config.{name}.optimizer.learning_rate, and use "
                    f"another --workdir or delete {folder}"
                )
            log.metrics(step, metrics)
            for sample in samples:
                log.sample(step, sample)
            log.timing(step, time.perf_counter() - began, float(metrics["tokens"]))
            done = step + 1
            if done % config.checkpoint_every == 0 or done == config.steps:
                checkpoints.save(done, state)
    finally:
        log.close()
        checkpoints.close()
    return state


def _finite(value) -> bool:
    return abs(float(value)) < float("inf")  # False for NaN, too
