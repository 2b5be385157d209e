"""The stages in order, what each depends on, and the record of what has run under which config."""

import json
from collections.abc import Callable

from rlaif_jax.config import flatten
from rlaif_jax.errors import UserError
from rlaif_jax.files import write_json
from rlaif_jax.stages.evaluate import run_evaluation
from rlaif_jax.stages.label import run_label
from rlaif_jax.stages.reward_model import run_reward_model
from rlaif_jax.stages.rl import run_rl
from rlaif_jax.stages.run import Run
from rlaif_jax.stages.sft import run_sft

STAGES: dict[str, Callable[[Run], None]] = {
    "sft": run_sft,
    "label": run_label,
    "reward_model": run_reward_model,
    "rl": run_rl,
    "eval": run_evaluation,
}

# The parts of the config that a stage's result depends on, beyond those of the stages before it.
_PARTS = {
    "sft": ("seed", "data", "policy", "sft"),
    "label": ("judge", "label"),
    "reward_model": ("reward_model",),
    "rl": ("rl",),
    "eval": ("evaluation",),
}
# Fields that change how a stage runs, not what it computes.
_OPERATIONAL = ("checkpoint_every", "shown_samples")


def run_stages(run: Run, names: list[str]) -> None:
    """Runs the named stages in their order; a finished one is left alone.

    Raises UserError for an unknown stage, for a stage whose predecessor has not finished, and for a stage that
    was begun under another config.
    """
    for name in names:
        if name not in STAGES:
            raise UserError(f"unknown stage {name!r}; the stages are {', '.join(STAGES)}")
    order = list(STAGES)
    for name in sorted(names, key=order.index):
        _check_config(run, name)
    for name in sorted(names, key=order.index):
        record = run.workdir / name / "stage.json"
        if record.exists() and json.loads(record.read_text())["done"]:
            print(f"{name}: nothing to do", flush=True)
            continue
        _check_predecessors(run, name)
        write_json(record, {"done": False, "config": _stage_config(run, name)})
        STAGES[name](run)
        write_json(record, {"done": True, "config": _stage_config(run, name)})


def _stage_config(run: Run, name: str) -> dict:
    order = list(_PARTS)
    parts = [part for stage in order[: order.index(name) + 1] for part in _PARTS[stage]]
    flat = flatten(run.config)
    return {key: flat[key] for key in flat if key.split(".")[0] in parts and key.split(".")[-1] not in _OPERATIONAL}


def _check_config(run: Run, name: str) -> None:
    record = run.workdir / name / "stage.json"
    if not record.exists():
        return
    before, now = json.loads(record.read_text())["config"], _stage_config(run, name)
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        was = ", ".join(f"{key}={now.get(key)!r} (was {before.get(key)!r})" for key in changed)
        raise UserError(
            f"stage {name} in {run.workdir} was begun with another config: {was}. Use another --workdir, or delete "
            f"{run.workdir / name} and the stages after it"
        )


def _check_predecessors(run: Run, name: str) -> None:
    order = list(STAGES)
    for earlier in order[: order.index(name)]:
        record = run.workdir / earlier / "stage.json"
        if not record.exists() or not json.loads(record.read_text())["done"]:
            raise UserError(f"stage {name} needs stage {earlier}, which has not finished in {run.workdir}")
