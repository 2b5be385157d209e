"""Runs the stages of a config: python -m rlaif_jax.main --config=configs/quickstart.py --workdir=runs/quickstart"""

import dataclasses
import functools
import random
import re
import sys
from collections.abc import Callable

import jax
from absl import flags
from etils import epath

from rlaif_jax.commands import open_folder, parse_flags, run_command
from rlaif_jax.config import flatten, parse
from rlaif_jax.errors import UserError, room_in
from rlaif_jax.evaluation.principles import FOLDER as PRINCIPLES
from rlaif_jax.files import read_parquet, remove_leftovers, write_json
from rlaif_jax.judge import store
from rlaif_jax.judge.score import Judge, load_judge
from rlaif_jax.parallel import processes
from rlaif_jax.report import write_report
from rlaif_jax.stages.folders import all_stages, in_round, name_in_round
from rlaif_jax.stages.panel import member
from rlaif_jax.stages.pipeline import STAGES, plan, run_stages
from rlaif_jax.stages.run import Run, open_run, run_record, with_seed
from rlaif_jax.summary import print_replay, print_summary

_USAGE = "usage: python -m rlaif_jax.main --config=configs/NAME.py[:ARM] --workdir=DIR"
_HELP = f"""  --config.FIELD=VALUE   overrides a field of the config, e.g. --config.seed=1
  --stages=NAME,...      stages to run, of {", ".join(STAGES)}; by default all.
                         Where the config has rounds, those of later ones are round2/label ...
  --replay=ROW,...       judges these rows of DIR/label/preferences.parquet again and compares; any:N draws N of them;
                         NAME/ROW,... those of a member of a panel, in DIR/label/panel/NAME; principles/ROW,... those
                         of an ensemble of principles, in DIR/label/principles
  --round=K              with --replay: of the labels in DIR/roundK/label
  --worker=I/N           with --stages=label (or round2/label ...): judges every N-th shard from the I-th on, beside
                         N - 1 other processes"""


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    return run_command(argv, f"{__doc__}\n\n{_USAGE}\n\n{_HELP}", _main)


def _main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_list("stages", None, "", flag_values=values)
    flags.DEFINE_string("replay", None, "", flag_values=values)
    flags.DEFINE_string("worker", None, "", flag_values=values)
    flags.DEFINE_integer("round", 1, "", lower_bound=1, flag_values=values)
    options = parse_flags(argv, _USAGE, values)
    folder = open_folder(options.workdir)
    run = open_run(with_seed(parse(options.config.to_dict()), folder), folder)
    rounds = run.config.rounds
    if options.round > rounds:
        raise UserError(f"--round={options.round}: the config has {rounds} round{'s' * (rounds > 1)}")
    if options.replay is not None:
        return _replay(run.in_round(options.round), options.replay)
    if options.round != 1:
        raise UserError("--round is for --replay alone")
    every = all_stages(run.config.stages, run.config.rounds)
    if options.worker is not None:
        if processes.count() > 1:
            raise UserError("--worker is for commands of one process: those of one command share the labelling anyway")
        labelling = [name for name in every if in_round(name)[0] == "label"]
        if options.stages not in [[name] for name in labelling]:
            raise UserError(f"--worker is for one stage alone: --stages={' or '.join(labelling) or 'label'}")
        run = dataclasses.replace(run, worker=_worker(options.worker))
    stages = plan(run, list(every) if options.stages is None else options.stages)
    given = flatten(run.config) | {"--stages": stages}
    with room_in(run.workdir), jax.set_mesh(run.placement.mesh), processes.heeding_sigterm():
        processes.check_alike(given, run.workdir)
        if run.worker.count == 1:
            remove_leftovers(run.workdir)
        write_json(run.workdir / "config.json", run_record(run.config))
        run_stages(run, stages)
    evaluated = [number for stage, number in map(in_round, stages) if stage == "eval"]
    if evaluated:
        print_summary(run.in_round(evaluated[-1]))
        print(f"report: {write_report(run.workdir)}")
    return 0


def _worker(text: str) -> store.Worker:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise UserError(f"--worker={text} must be I/N with I from 0 to N - 1")
    return store.Worker(int(found[1]), int(found[2]))


def _replay(run: Run, rows: str) -> int:
    """Judges label rows again; 0 where all labels are reproduced, 1 where one is not."""
    load, folder, rows = _replayed(run, rows)
    file = folder / "preferences.parquet"
    if not file.exists():
        raise UserError(f"{file} is missing: run --stages={name_in_round('label', run.round)} first")
    table = read_parquet(file)
    chosen = _rows(rows, table.num_rows)
    with jax.set_mesh(run.placement.mesh):
        judge = load()
        replayed = [store.replay(judge, table, row) for row in chosen]
    same = [store.same_label(stored, fresh) for stored, fresh in replayed]
    for (stored, fresh), equal in zip(replayed, same, strict=True):
        print_replay(judge, stored, fresh, equal)
    print(f"{sum(same)} of {len(same)} labels reproduced")
    return 0 if all(same) else 1


def _replayed(run: Run, text: str) -> tuple[Callable[[], Judge], epath.Path, str]:
    """What loads whose labels --replay asks for, their folder, and the rows.

    Raises UserError for no such member of a panel.
    """
    judges, folder = run.config.panel.judges, run.folder("label")
    name, _, rows = text.rpartition("/")
    alone = functools.partial(load_judge, run.config.judge, run.config.seed, run.judge_placement)
    if run.config.label.principles == "ensemble":
        if name != PRINCIPLES:
            raise UserError(
                f"--replay={text}: the principles of an ensemble made these labels out of those in label/{PRINCIPLES}, "
                f"so name rows of that: --replay={PRINCIPLES}/{rows}"
            )
        return alone, folder / PRINCIPLES, rows
    if not judges:
        return alone, folder, text
    if name not in judges:
        raise UserError(
            f"--replay={text}: a panel made these labels out of those in label/panel/NAME, so say whose to judge "
            f"again: --replay=NAME/{rows}, NAME being one of {', '.join(judges)}"
        )
    return functools.partial(member, run, name), folder / "panel" / name, rows


def _rows(text: str, count: int) -> list[int]:
    """The rows that --replay asks for. Raises UserError where there are no such rows."""
    if drawn := re.fullmatch(r"any:(\d+)", text):
        return processes.agree(lambda: sorted(random.sample(range(count), min(int(drawn[1]), count))))
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise UserError(f"--replay={text} must be row numbers with commas between them, or any:N")
    rows = [int(row) for row in text.split(",")]
    if missing := [row for row in rows if row >= count]:
        raise UserError(f"no label row {missing[0]}: the file has rows 0 to {count - 1}")
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv))
