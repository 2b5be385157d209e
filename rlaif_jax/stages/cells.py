"""The cells of a sweep, arms x seeds of one config: built and checked before any work, then run one by one.

A stage is kept under a hash of all that its result depends on, so that the cells in which it is the same share it.
"""

import dataclasses
import difflib
import json
import re
import traceback
from collections.abc import Sequence

import jax
import xxhash
from etils import epath

from rlaif_jax.config import Config, override
from rlaif_jax.errors import UserError, blame
from rlaif_jax.files import read_json, write_json
from rlaif_jax.parallel import processes
from rlaif_jax.progress import warn
from rlaif_jax.stages.folders import all_stages
from rlaif_jax.stages.pipeline import check_verifiers, is_done, run_stages, stage_inputs
from rlaif_jax.stages.reward_model import check_labels_by_principle
from rlaif_jax.stages.run import Run, open_run, run_record


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Arms x seeds of one config."""

    base: Config  # what every cell starts from, but for its seed
    arms: dict  # name -> {dotted field of base: value}
    seeds: tuple[int, ...]
    baseline: str  # the arm that the others are compared with, seed by seed
    figures: tuple[str, ...]  # names in eval/results.json, for the table; "policy" stands for what an arm trains


@dataclasses.dataclass(frozen=True)
class Cell:
    """One arm with one seed. `run.workdir` is the cell's own folder; `run.shared` says where its stages are."""

    arm: str
    seed: int
    run: Run

    @property
    def path(self) -> str:
        """The cell's folder, relative to the sweep's."""
        return f"cells/{self.arm}/seed{self.seed}"

    @property
    def name(self) -> str:
        """What the cell is called on the screen."""
        return f"{self.arm} seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a stage failed."""

    error: str  # one line
    traceback: str | None  # where it was no UserError


@dataclasses.dataclass
class Outcome:
    """What running the cells came to."""

    executed: int = 0  # stages run, here and now
    reused: int = 0  # stages found finished: by another cell, or before an interruption
    errors: dict[str, str] = dataclasses.field(default_factory=dict)  # a failed cell's path -> one line


def make_cells(sweep: SweepConfig, root: epath.Path) -> list[Cell]:
    """All cells, seed by seed so that every arm has the first seed early on.

    Raises UserError, before any work, for whatever a run of any cell would refuse.
    """
    _check(sweep)
    runs = {}
    for arm, changes in sweep.arms.items():
        with blame(f"arms.{arm}"):
            runs[arm] = open_run(override(sweep.base, changes), root)
            check_verifiers(runs[arm], runs[arm].config.stages)
    return [_cell(root, arm, seed, run) for seed in sweep.seeds for arm, run in runs.items()]


def _cell(root: epath.Path, arm: str, seed: int, run: Run) -> Cell:
    cell = Cell(arm, seed, dataclasses.replace(run, config=dataclasses.replace(run.config, seed=seed)))
    with blame(f"arms.{arm}"):
        check_labels_by_principle(cell.run)  # which depends on the seed
        hashes = {stage: _content_hash(stage_inputs(cell.run, stage)) for stage in _stages_of(run)}
    shared = {
        stage: root / "shared" / f"{stage.replace('/', '_')}-{digest}" / stage for stage, digest in hashes.items()
    }
    return dataclasses.replace(cell, run=dataclasses.replace(cell.run, workdir=root / cell.path, shared=shared))


def _stages_of(run: Run) -> tuple[str, ...]:
    return all_stages(run.config.stages, run.config.rounds)


def _content_hash(inputs: dict) -> str:
    return xxhash.xxh3_64(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _check(sweep: SweepConfig) -> None:
    for arm, changes in sweep.arms.items():
        if not re.fullmatch(r"[\w+=-][\w.+=-]*", str(arm)):  # it becomes the name of a folder
            raise UserError(f"config.arms: the name {arm!r} may hold letters, digits and any of _ . + = - alone")
        if not isinstance(changes, dict):
            raise UserError(f"config.arms.{arm} must be a mapping of fields to values, not {changes!r}")
        if "seed" in changes:
            raise UserError(f"config.arms.{arm} must not set seed: each arm runs with every seed of config.seeds")
    if sweep.baseline not in sweep.arms:
        near = difflib.get_close_matches(sweep.baseline, sweep.arms, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the arms are {', '.join(sweep.arms) or 'none'}"
        raise UserError(f"config.baseline={sweep.baseline!r} is no arm: {hint}")
    if not sweep.seeds or len(set(sweep.seeds)) < len(sweep.seeds) or min(sweep.seeds) < 0:
        raise UserError(f"config.seeds={sweep.seeds} must be one or more different numbers, 0 or more")
    if not sweep.figures:
        raise UserError("config.figures names no figure for the table")


def run_cells(cells: Sequence[Cell], root: epath.Path) -> Outcome:
    """Runs what has not finished of each cell and records it in its cell.json. A cell that fails stops no other."""
    for cell in cells:
        _begin(cell, root)
    outcome = Outcome()
    broken: dict[epath.Path, Failure] = {}  # a stage that failed here fails alike in the cells that share it
    for number, cell in enumerate(cells, 1):
        print(f"cell {number}/{len(cells)} {cell.name}", flush=True)
        failure = _run_cell(cell, outcome, broken)
        _write(cell, root, "failed" if failure else "done", failure)
        if failure:
            outcome.errors[cell.path] = failure.error
            warn(f"cell {cell.name} failed: {failure.error}")
    return outcome


def _run_cell(cell: Cell, outcome: Outcome, broken: dict[epath.Path, Failure]) -> Failure | None:
    for stage in _stages_of(cell.run):
        folder = cell.run.folder(stage)
        if folder in broken:
            return broken[folder]
        try:
            if is_done(cell.run, stage):
                outcome.reused += 1
                continue
            print(f"{stage}: {folder}", flush=True)
            outcome.executed += 1
            with jax.set_mesh(cell.run.placement.mesh):
                run_stages(cell.run, [stage])
        except Exception as error:  # whatever it is, the other cells are worth running
            if processes.count() > 1 and not isinstance(error, UserError):
                raise  # it may be that of one process, for which the others would wait
            # As text: the exception itself would keep the stage's arrays alive.
            broken[folder] = Failure(_one_line(error), None if isinstance(error, UserError) else traceback.format_exc())
            return broken[folder]
    return None


def _begin(cell: Cell, root: epath.Path) -> None:
    """Writes what the cell is; a status that an earlier call gave to the same stages stands until it runs again."""
    record = cell.run.workdir / "cell.json"
    begun = processes.agree(lambda: record.exists() and read_json(record)["stages"] == _stages(cell, root))
    if not begun:
        _write(cell, root, "pending")
    write_json(cell.run.workdir / "config.json", run_record(cell.run.config))


def _write(cell: Cell, root: epath.Path, status: str, failure: Failure | None = None) -> None:
    """cell.json: status (pending, done or failed), the error, and each stage's folder relative to the sweep's."""
    record = {
        "arm": cell.arm,
        "seed": cell.seed,
        "status": status,
        "error": failure and failure.error,
        "traceback": failure and failure.traceback,
        "stages": _stages(cell, root),
    }
    write_json(cell.run.workdir / "cell.json", record)


def _stages(cell: Cell, root: epath.Path) -> dict[str, str]:
    return {stage: folder.relative_to(root).as_posix() for stage, folder in cell.run.shared.items()}


def _one_line(error: Exception) -> str:
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return kind + (str(error).strip().splitlines() or ["no message"])[0]
