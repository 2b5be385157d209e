"""Rounds of several runs or sweeps side by side: python -m rlaif_jax.rounds RUN [RUN ...] --out=FILE.svg"""

import functools
import sys
from collections.abc import Mapping

from absl import flags
from etils import epath

from rlaif_jax.commands import run_command
from rlaif_jax.errors import UserError
from rlaif_jax.evaluation.statistics import t_ci
from rlaif_jax.files import read_json, write_text
from rlaif_jax.reporting.rounds import draw_rounds, series, table
from rlaif_jax.stages.folders import read_results, stage_folder

_USAGE = "usage: python -m rlaif_jax.rounds RUN [RUN ...] [--out=FILE.svg]"
_HELP = """  RUN              the --workdir of a run with rounds, or of a sweep: the mean of each arm's seeds (by t)
  --out=FILE.svg   where to draw what the table says"""


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    return run_command(argv, f"{__doc__}\n\n{_USAGE}\n\n{_HELP}", _main)


def _main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("out", "", "", flag_values=values)
    try:
        folders = values(argv)[1:]
    except flags.Error as error:
        raise UserError(f"{' '.join(str(error).split())}. {_USAGE}") from error
    if not folders:
        raise UserError(_USAGE)
    runs: dict[str, Mapping] = {}
    for folder in map(epath.Path, folders):
        runs |= _arms(folder) if (folder / "sweep.json").exists() else {folder.name: _results(folder)}
    for name, results in runs.items():
        if not series(results):
            raise UserError(f"{name} has no rounds: its config needs rounds of 2 or more, and to have run to its end")
    print(table(runs))
    if values.out:
        write_text(epath.Path(values.out), draw_rounds(runs))
    return 0


def _results(folder: epath.Path) -> dict:
    return read_results(functools.partial(stage_folder, folder))


def _arms(sweep: epath.Path) -> dict[str, dict]:
    """The mean of each figure over the finished seeds of each arm."""
    cells: dict[str, list[dict]] = {arm: [] for arm in read_json(sweep / "sweep.json")["config"]["arms"]}
    for arm, found in cells.items():
        for cell in sorted((sweep / "cells" / arm).glob("seed*")):
            if read_json(cell / "cell.json")["status"] == "done":
                found.append(_results(cell))
        if not found:
            raise UserError(f"{sweep / 'cells' / arm} has no finished cell: run the sweep to its end")
    return {arm: _mean(found) for arm, found in cells.items()}


def _mean(cells: list[dict]) -> dict:
    if len(cells) == 1:
        return cells[0]
    figures = [name for name, figure in cells[0].items() if isinstance(figure, dict)]
    return {
        name: t_ci([cell[name]["mean"] for cell in cells])
        for name in figures
        if all(name in cell and cell[name]["mean"] is not None for cell in cells)
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv))
