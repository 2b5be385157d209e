"""Results of finished runs side by side, as a Markdown table: python -m rlaif_jax.compare RUN [RUN ...]"""

import functools
import sys
from collections.abc import Mapping

from etils import epath

from rlaif_jax.commands import run_command
from rlaif_jax.errors import UserError
from rlaif_jax.evaluation.names import POLICY_STAGES, by_role, policy_stage
from rlaif_jax.evaluation.statistics import show_figure
from rlaif_jax.files import read_json, read_json_lines
from rlaif_jax.stages.folders import evaluated_round, name_in_round, read_results, record_file, stage_folder

_USAGE = "usage: python -m rlaif_jax.compare RUN [RUN ...]"
_HELP = """  RUN   the --workdir of a run, or the folder of a sweep's cell

Of a run with rounds, figures are those of the last one that has been evaluated, which the column's head names where
more are to come; seconds are of all rounds up to it."""


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    return run_command(argv, f"{__doc__}\n\n{_USAGE}\n\n{_HELP}", _main)


def _main(argv: list[str]) -> int:
    if len(argv) < 2 or any(name.startswith("-") for name in argv[1:]):
        raise UserError(_USAGE)
    print(table([epath.Path(name) for name in argv[1:]]))
    return 0


def table(runs: list[epath.Path]) -> str:
    """One row a figure, one column a run. Raises UserError for a folder that is no run, or has no results."""
    configs = [read_json(record_file(run))["config"] for run in runs]
    results = [read_results(functools.partial(stage_folder, run)) for run in runs]
    trained = [policy_stage(config.get("stages", ())) for config in configs]
    if len(set(trained)) > 1:  # their figures stand in one row under a name that is true of all
        results = [by_role(found, stage) for found, stage in zip(results, trained, strict=True)]
    results = [found | _seconds(run) for found, run in zip(results, runs, strict=True)]
    names = [run.resolve().name for run in runs]  # that of "." is empty
    names = names if len(set(names)) == len(runs) else list(map(str, runs))
    titles = [name + _round(run, config) for name, run, config in zip(names, runs, configs, strict=True)]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(runs) + 1) + "|"]
    for name in dict.fromkeys(name for result in results for name in result):
        lines.append(f"| `{name}` | {' | '.join(_cell(result.get(name)) for result in results)} |")
    return "\n".join(lines)


def _round(run: epath.Path, config: Mapping) -> str:
    """Of which round a run's figures are, where later ones have not been evaluated."""
    shown, rounds = evaluated_round(functools.partial(stage_folder, run)), config.get("rounds", 1)
    return f" (round {shown} of {rounds})" if shown < rounds else ""


def _seconds(run: epath.Path) -> dict[str, str]:
    """What the steps of each training stage took, by the clock: all rounds to the one shown have made its policy."""
    rounds = range(1, evaluated_round(functools.partial(stage_folder, run)) + 1)
    seconds = {}
    for stage in ("sft", "sl_cai", "reward_model", *POLICY_STAGES):
        names = dict.fromkeys(name_in_round(stage, number) for number in rounds)
        files = [file for name in names if (file := stage_folder(run, name) / "timing.jsonl").exists()]
        if files:
            seconds[f"seconds/{stage}"] = f"{sum(line['time'] for file in files for line in read_json_lines(file)):.0f}"
    return seconds


def _cell(figure) -> str:
    if not isinstance(figure, dict):
        return "-" if figure is None else str(figure).lower()
    return f"{show_figure(figure)} (n={figure['n']})"


if __name__ == "__main__":
    sys.exit(main(sys.argv))
