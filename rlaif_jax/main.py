"""Runs the stages of a config: python -m rlaif_jax.main --config=configs/quickstart.py --workdir=runs/quickstart"""

import sys

import jax
from absl import flags

from rlaif_jax.commands import open_folder, parse_flags, run_command
from rlaif_jax.config import parse
from rlaif_jax.errors import UserError, room_in
from rlaif_jax.files import read_parquet, write_json
from rlaif_jax.judge import store
from rlaif_jax.judge.score import load_judge
from rlaif_jax.report import write_report
from rlaif_jax.stages.pipeline import STAGES, plan, run_stages
from rlaif_jax.stages.run import Run, open_run, run_record, with_seed
from rlaif_jax.summary import print_replay, print_summary

_USAGE = "usage: python -m rlaif_jax.main --config=configs/NAME.py[:ARM] --workdir=DIR"
_HELP = f"""  --config.FIELD=VALUE   overrides a field of the config, e.g. --config.seed=1
  --stages=NAME,...      stages to run, of {", ".join(STAGES)}; by default all
  --replay=ROW           judges row ROW of DIR/label/preferences.parquet again and compares"""


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    return run_command(argv, f"{__doc__}\n\n{_USAGE}\n\n{_HELP}", _main)


def _main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_list("stages", None, "", flag_values=values)
    flags.DEFINE_integer("replay", None, "", flag_values=values)
    options = parse_flags(argv, _USAGE, values)
    folder = open_folder(options.workdir)
    run = open_run(with_seed(parse(options.config.to_dict()), folder), folder)
    if options.replay is not None:
        return _replay(run, options.replay)
    stages = plan(run, list(STAGES) if options.stages is None else options.stages)
    with room_in(run.workdir), jax.set_mesh(run.placement.mesh):
        write_json(run.workdir / "config.json", run_record(run.config))
        run_stages(run, stages)
    if "eval" in stages:
        print_summary(run)
        print(f"report: {write_report(run.workdir)}")
    return 0


def _replay(run: Run, row: int) -> int:
    """Judges one label row again; 0 where the label is reproduced, 1 where it is not."""
    file = run.folder("label") / "preferences.parquet"
    if not file.exists():
        raise UserError(f"{file} is missing: run --stages=label first")
    table = store.check_row(read_parquet(file), row)
    with jax.set_mesh(run.placement.mesh):
        judge = load_judge(run.config.judge, run.config.seed, run.placement)
        stored, fresh = store.replay(judge, table, row)
    same = store.same_label(stored, fresh)
    print_replay(judge, stored, fresh, same)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
