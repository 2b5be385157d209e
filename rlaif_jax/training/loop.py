"""The resumable loop that every training stage runs."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
from etils import epath

from rlaif_jax.errors import Stopped, UserError
from rlaif_jax.parallel import processes
from rlaif_jax.progress import progress, warn
from rlaif_jax.training.checkpoints import Checkpoints
from rlaif_jax.training.metrics import StageLog

State = TypeVar("State")
# (state, step) -> (state, metrics, what gives the samples to log). Everything random or read in a step is a function of
# the step, so that a resumed run does what an undisturbed one does. The metric `tokens` counts what the step worked on.
NextStep = Callable[[State, int], tuple[State, dict, Callable[[], list[dict]]]]


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long a stage trains and how often it saves."""

    steps: int
    checkpoint_every: int
    keep_best: str = ""  # "min METRIC" or "max METRIC": the best checkpoint is kept beside the newest
    max_skipped_updates: int = 0  # updates left out as not finite, before the stage stops
    keep_every: int = 0  # steps between checkpoints that are kept until the end, beside those of `checkpoint_every`

    def saves(self, done: int) -> bool:
        """Whether there is a checkpoint after so many steps."""
        kept = self.keep_every and done % self.keep_every == 0
        return bool(kept) or done % self.checkpoint_every == 0 or done == self.steps


def train(
    folder: epath.Path,
    config: LoopConfig,
    abstract: State,
    init: Callable[[], State],
    next_step: NextStep,
    watch: Callable[[int, dict], None] = lambda step, metrics: None,
) -> State:
    """Runs `next_step` from the newest checkpoint, or from `init()`, to `config.steps`; returns the last state.

    Checkpoints and metrics go to `folder`, TensorBoard files to `logs` beside it. `watch` is told of each step's
    metrics once they are logged, and may raise. Raises UserError, keeping the last checkpoint, where more updates than
    allowed were skipped, and where a metric is not finite although none was; and Stopped, with a checkpoint of the step
    just done, where a process was sent SIGTERM. Metrics of a skipped update are null.
    """
    name, saved, began = folder.name, 0, 0.0
    unlogged: list[tuple[int, dict, Callable[[], list[dict]]]] = []
    with contextlib.closing(Checkpoints(folder / "checkpoints", config.keep_best, config.keep_every)) as checkpoints:
        start, state = checkpoints.resume(abstract) or (0, init())
        _check_placement(state, abstract)
        saved, began = start, time.perf_counter()
        with _log(folder, start) as log:

            def flush() -> dict[str, float]:
                """Waits for the step that was begun last, and logs it."""
                nonlocal began
                step, values, samples = unlogged.pop()
                found = {key: float(value) for key, value in processes.to_host(values).items()}
                _check(name, config, folder, step, saved, found)
                metrics = {key: value if math.isfinite(value) else None for key, value in found.items()}
                now = time.perf_counter()
                shown = samples()
                if log:
                    log.write(step, metrics, shown, now - began)
                watch(step, metrics)
                began = now
                return metrics

            for step in progress(range(start, config.steps), name, total=config.steps, initial=start, unit="step"):
                state, metrics, samples = next_step(state, step)
                if step == start:
                    _check_placement(state, abstract)
                if unlogged:  # the step before: what is logged of it is worked out while the device does this one
                    flush()
                unlogged.append((step, metrics, samples))
                done = step + 1
                stop = processes.stop_point()
                if config.saves(done) or stop:
                    checkpoints.save(done, state, flush(), config.saves(done))
                    saved = done
                if stop:
                    raise Stopped
    return state


@contextlib.contextmanager
def _log(folder: epath.Path, start: int) -> Iterator[StageLog | None]:
    """The stage's log, in the process that reports."""
    log = processes.by_first(lambda: StageLog(folder, folder.parent / "logs", start))
    with contextlib.closing(log) if log else contextlib.nullcontext():
        yield log


def _check_placement(state, abstract) -> None:
    """Raises ValueError where an array does not lie as one read from a checkpoint does.

    The programs of a resumed run would be others then, which add up in another order.
    """

    def check(path, x, expected):
        if not x.sharding.is_equivalent_to(expected.sharding, x.ndim):
            name = jax.tree_util.keystr(path)
            raise ValueError(f"state{name} lies as {x.sharding}, and when it is resumed as {expected.sharding}")

    jax.tree_util.tree_map_with_path(check, state, abstract)


def _check(name: str, config: LoopConfig, folder: epath.Path, step: int, saved: int, metrics: dict) -> None:
    """Raises UserError where metrics are not as they must be, and where there is none by which to keep the best."""
    bad = sorted(key for key, value in metrics.items() if not math.isfinite(value))
    skipped = sum(metrics.get(f"{part}skipped_updates", 0) for part in ("", "value/"))
    here = sum(metrics.get(f"{part}skipped", 0) for part in ("", "value/"))
    what = ", ".join(bad) or "loss or gradient"  # means may be finite though some of their updates were not
    if skipped > config.max_skipped_updates or (bad and not here):
        raise UserError(
            f"stage {name} stopped at step {step}: {what} not finite; {skipped:.0f} updates were skipped for "
            f"that (config.{name}.max_skipped_updates={config.max_skipped_updates}); the last checkpoint is step "
            f"{saved}. Lower config.{name}.optimizer.learning_rate, and use another --workdir or delete {folder}"
        )
    if here:
        warn(f"stage {name}, step {step}: {what} not finite, {here:.0f} skipped")
    if config.keep_best and config.keep_best.split()[1] not in metrics:
        raise UserError(
            f"config.{name}.keep_best={config.keep_best!r} names no metric of the stage; they are "
            f"{', '.join(sorted(metrics))}"
        )
