"""Runs arms x seeds of a config: python -m rlaif_jax.sweep --config=configs/sweeps/quickstart_kl.py --workdir=DIR"""

import difflib
import sys
from collections.abc import Sequence

from absl import flags

from rlaif_jax.commands import open_folder, parse_flags, run_command
from rlaif_jax.config import parse
from rlaif_jax.errors import UserError, room_in
from rlaif_jax.evaluation.names import by_role
from rlaif_jax.evaluation.sweep_table import Values, markdown, to_csv
from rlaif_jax.files import write_json, write_text
from rlaif_jax.parallel import processes
from rlaif_jax.progress import warn
from rlaif_jax.stages.cells import Cell, SweepConfig, make_cells, run_cells
from rlaif_jax.stages.folders import read_results
from rlaif_jax.stages.run import run_record

_USAGE = "usage: python -m rlaif_jax.sweep --config=configs/sweeps/NAME.py[:ARM] --workdir=DIR"
_HELP = """  --config.base.FIELD=VALUE   overrides a field of the config that every cell starts from
  --config.FIELD=VALUE        overrides a field of the sweep, e.g. --config.seeds=0,1

Exit status 1 if a cell failed. The same command goes on where it stopped, and tries failed cells again."""


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    return run_command(argv, f"{__doc__}\n\n{_USAGE}\n\n{_HELP}", _main)


def _main(argv: list[str]) -> int:
    options = parse_flags(argv, _USAGE, flags.FlagValues())
    sweep, root = parse(options.config.to_dict(), SweepConfig), open_folder(options.workdir)
    cells = make_cells(sweep, root)
    record = run_record(sweep)
    processes.check_alike(record["config"], root)
    write_json(root / "sweep.json", record)
    with room_in(root), processes.heeding_sigterm():
        outcome = run_cells(cells, root)
    done = [cell for cell in cells if cell.path not in outcome.errors]
    figures = {name: _values(name, list(sweep.arms), done) for name in sweep.figures}
    paths: dict[str, dict[int, str]] = {arm: {} for arm in sweep.arms}
    for cell in cells:
        paths[cell.arm][cell.seed] = cell.path
    table = markdown(figures, sweep.baseline, paths, outcome.errors)
    write_text(root / "table.md", table)
    write_text(root / "table.csv", to_csv(figures, sweep.baseline, paths))
    print(f"\n{table}\n{root / 'table.md'}, {root / 'table.csv'}")
    print(f"{len(cells)} cells, {len(done)} done: {outcome.executed} stages run, {outcome.reused} reused", flush=True)
    for path, error in outcome.errors.items():
        warn(f"failed: {root / path}: {error}")
    return 1 if outcome.errors else 0


def _values(name: str, arms: Sequence[str], cells: Sequence[Cell]) -> Values:
    """The mean of a figure in each cell that has one.

    Raises UserError where the results have no such figure.
    """
    values: dict[str, dict[int, float]] = {arm: {} for arm in arms}
    for cell in cells:
        results = read_results(cell.run.folder)
        results = results | by_role(results, cell.run.config.policy_stage)
        if not isinstance(results.get(name), dict):
            known = [figure for figure, value in results.items() if isinstance(value, dict)]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"see the results.json of {cell.path}"
            raise UserError(f"config.figures: the results have no figure {name!r}: {hint}")
        if results[name]["mean"] is not None:  # a figure of no observation
            values[cell.arm][cell.seed] = results[name]["mean"]
    return values


if __name__ == "__main__":
    sys.exit(main(sys.argv))
