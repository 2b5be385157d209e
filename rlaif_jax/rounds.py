"""Rounds of several runs or sweeps side by side: python -m rlaif_jax.rounds RUN [RUN ...] --out=FILE.svg"""

import collections
import functools
import sys
from collections.abc import Mapping, Sequence

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
    if values.out and not values.out.endswith(".svg"):
        raise UserError(f"--out={values.out} must end in .svg, which is what is drawn")
    runs = _runs([epath.Path(folder).resolve() for folder in folders])
    for name, results in runs.items():
        if not series(results):
            raise UserError(f"{name} has no rounds: its config needs rounds of 2 or more, and to have run to its end")
    print(table(runs))
    if values.out:
        write_text(epath.Path(values.out), draw_rounds(runs))
    return 0


def _runs(folders: Sequence[epath.Path]) -> dict[str, Mapping]:
    """The figures of runs and of the arms of sweeps, by their names; by folder and name where two have one name."""
    found = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not there: give the --workdir of a run, or of a sweep")
        if (folder / "sweep.json").exists():
            found += [(name, folder / name, results) for name, results in _arms(folder).items()]
        else:
            found.append((folder.name, folder, _results(folder)))
    named = collections.Counter(name for name, _, _ in found)
    return {name if named[name] == 1 else str(path): results for name, path, results in found}


def _results(folder: epath.Path) -> dict:
    return read_results(functools.partial(stage_folder, folder))


def _arms(sweep: epath.Path) -> dict[str, dict]:
    """The mean of each figure over the finished seeds of each arm."""
    cells: dict[str, list[dict]] = {arm: [] for arm in read_json(sweep / "sweep.json")["config"]["arms"]}
    for arm, found in cells.items():
        for cell in sorted((sweep / "cells" / arm).glob("seed*")):
            if read_json(cell / "cell.json")["status"] == "done":
                found.append(_results(cell))
    missing = [arm for arm, found in cells.items() if not found]
    if len(missing) == len(cells):
        raise UserError(f"{sweep} has no finished cell: run the sweep to its end")
    for arm in missing:
        print(f"{sweep / 'cells' / arm} has no finished cell: left out", file=sys.stderr)
    return {arm: _mean(found) for arm, found in cells.items() if found}


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
