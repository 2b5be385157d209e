"""Results of finished runs side by side, as a Markdown table: python -m rlaif_jax.compare RUN [RUN ...]"""

import functools
import sys

from etils import epath

from rlaif_jax.errors import UserError
from rlaif_jax.evaluation.names import POLICY_STAGES, by_role, policy_stage
from rlaif_jax.evaluation.statistics import show_figure
from rlaif_jax.files import read_json, read_json_lines
from rlaif_jax.stages.folders import read_results, stage_folder


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    try:
        if len(argv) < 2 or any(name.startswith("-") for name in argv[1:]):
            raise UserError("usage: python -m rlaif_jax.compare RUN [RUN ...]")
        print(table([epath.Path(name) for name in argv[1:]]))
    except UserError as error:
        print(f"rlaif_jax: {error}", file=sys.stderr)
        return 2
    return 0


def table(runs: list[epath.Path]) -> str:
    """One row a figure, one column a run. Raises UserError where a run has no results."""
    results = []
    for run in runs:
        results.append(read_results(functools.partial(stage_folder, run)))
    trained = [policy_stage(_config(run).get("stages", ())) for run in runs]
    if len(set(trained)) > 1:  # their figures stand in one row under a name that is true of all
        results = [by_role(found, stage) for found, stage in zip(results, trained, strict=True)]
    results = [found | _seconds(run) for found, run in zip(results, runs, strict=True)]
    distinct = len({run.name for run in runs}) == len(runs)
    titles = [run.name if distinct else str(run) for run in runs]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(runs) + 1) + "|"]
    for name in dict.fromkeys(name for result in results for name in result):
        lines.append(f"| `{name}` | {' | '.join(_cell(result.get(name)) for result in results)} |")
    return "\n".join(lines)


def _config(run: epath.Path) -> dict:
    record = run / "config.json"
    return read_json(record)["config"] if record.exists() else {}


def _seconds(run: epath.Path) -> dict[str, str]:
    """What the steps of each training stage took together, by the clock."""
    files = {
        stage: stage_folder(run, stage) / "timing.jsonl" for stage in ("sft", "sl_cai", "reward_model", *POLICY_STAGES)
    }
    return {
        f"seconds/{stage}": f"{sum(line['time'] for line in read_json_lines(file)):.0f}"
        for stage, file in files.items()
        if file.exists()
    }


def _cell(figure) -> str:
    if not isinstance(figure, dict):
        return "-" if figure is None else str(figure).lower()
    return f"{show_figure(figure)} (n={figure['n']})"


if __name__ == "__main__":
    sys.exit(main(sys.argv))
