"""What a judge leans to and how far people agree with it: python -m rlaif_jax.audit --workdir=RUN | --labels=FILE"""

import functools
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
from absl import flags
from etils import epath

from rlaif_jax.commands import parse_plain, run_command
from rlaif_jax.errors import UserError
from rlaif_jax.evaluation.audit import audit
from rlaif_jax.evaluation.budget import label_next
from rlaif_jax.evaluation.panel import RULES, panel_audit
from rlaif_jax.evaluation.principles import comparable, principle_audit, principle_columns
from rlaif_jax.files import write_json, write_text
from rlaif_jax.reporting.audit_page import render_audit
from rlaif_jax.stages.folders import last_round, name_in_round, stage_folder
from rlaif_jax.summary import print_audit

_USAGE = (
    "usage: python -m rlaif_jax.audit --workdir=RUN [--round=K] | --labels=FILE [--by=COLUMN] [--out=DIR] [--next=N]"
)
_HELP = """  --workdir=RUN     a run: the comparisons of people that its judge was tried on, else its label file
  --labels=FILE     a Parquet file with the columns of label/preferences.parquet, and where known `human` (what people
                    say of response_a: 1 better, 0 worse, null nothing), `generator_a` and `generator_b` (who wrote it)
  --round=K         with --workdir: of the labels in RUN/roundK/label; 1 by default
  --by=COLUMN,...   splits the agreement with people by the values of these columns
  --out=DIR         writes NAME.audit.json and NAME.audit.html there, not beside NAME.parquet
  --next=N          also writes next.jsonl: the N pairs that people should label next
  --resamples=N     of the bootstrap behind each interval; 1000 by default"""
_NEEDED = ("prompt", "response_a", "response_b", "status", "prob_a", "prob_a_forward", "prob_a_reversed", "judge")
_NUMBERS = {"prob_a", "prob_a_forward", "prob_a_reversed", "human"}


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    return run_command(argv, f"{__doc__}\n\n{_USAGE}\n\n{_HELP}", _main)


def _main(argv: list[str]) -> int:
    values = flags.FlagValues()
    for name in ("workdir", "labels", "out"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    flags.DEFINE_list("by", [], "", flag_values=values)
    flags.DEFINE_integer("next", 0, "", lower_bound=0, flag_values=values)
    flags.DEFINE_integer("resamples", 1000, "", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("round", None, "", lower_bound=1, flag_values=values)
    options = parse_plain(argv, _USAGE, values)
    if (options.workdir is None) == (options.labels is None):
        raise UserError(_USAGE)
    if options.labels and options.round:
        raise UserError("--round is for --workdir alone")
    file = epath.Path(options.labels) if options.labels else _of_run(epath.Path(options.workdir), options.round)
    columns = _read(file, options.by)
    folder = epath.Path(options.out) if options.out else file.parent
    figures = audit(columns, options.resamples, 0, options.by) | panel_audit(columns, options.resamples, 0)
    by_principle = principle_columns(file, columns)
    figures |= principle_audit(by_principle, options.resamples, 0, comparable(file))
    print_audit(str(file), figures)
    pages = [folder / f"{file.stem}.audit.html", folder / f"{file.stem}.audit.json"]
    write_text(pages[0], render_audit(str(file), columns, figures, by_principle))
    write_json(pages[1], figures)
    if options.next:
        pages.append(folder / "next.jsonl")
        names, rows = ("prompt", "response_a", "response_b", "prob_a"), label_next(columns, options.next)
        rows = [{"row": row} | {name: columns[name][row] for name in names} for row in rows]
        write_text(pages[-1], "".join(json.dumps(row) + "\n" for row in rows))
    print(", ".join(map(str, pages)))
    return 0


def _of_run(run: epath.Path, number: int | None) -> epath.Path:
    """The label file of a round of a run to audit: of the first, and that is said, where there are more to choose from.

    Raises UserError where there is none.
    """
    last = last_round(functools.partial(stage_folder, run), "label", "preferences.parquet")
    if number is None and last > 1:
        print(f"round 1 of {last} that have labels; --round=K audits another")
    stage = name_in_round("label", number or 1)
    folder = stage_folder(run, stage)
    for file in (folder / "audit" / "audited.parquet", folder / "preferences.parquet"):
        if file.exists():
            return file
    raise UserError(f"{folder / 'preferences.parquet'} is missing: run --stages={stage} first")


def _read(file: epath.Path, by: list[str]) -> dict[str, list]:
    """The columns of a label file. Raises UserError where it is missing, damaged or lacks some."""
    if not file.exists() or file.is_dir():
        raise UserError(f"--labels={file} {'is a folder: name a file' if file.is_dir() else 'does not exist'}")
    try:
        columns = pq.read_table(str(file)).to_pydict()
    except pa.ArrowException as error:
        raise UserError(f"--labels={file} is no Parquet file: {str(error).splitlines()[0]}") from error
    if missing := [name for name in (*_NEEDED, *by) if name not in columns]:
        raise UserError(f"{file} has no column {missing[0]!r}; it has {', '.join(columns)}")
    if not columns["status"]:
        raise UserError(f"{file} has no rows")
    columns |= {name: [None if value != value else value for value in columns[name]] for name in _NUMBERS & {*columns}}
    _check(file, columns)
    return {"template": [""] * len(columns["status"])} | columns


def _check(file: epath.Path, columns: dict[str, list]) -> None:
    """Raises UserError for a row that is no label."""
    if ("generator_a" in columns) != ("generator_b" in columns):
        raise UserError(f"{file} must have both generator_a and generator_b, or none")
    for row, said in enumerate(columns.get("prob_a_members", ())):
        shares = said.values() if isinstance(said, dict) else ["none"]
        if columns.get("combine", [""])[0] not in RULES or not all(x is None or _is_share(x) for x in shares):
            raise UserError(f"{file}, row {row}: prob_a_members and combine must be as a panel writes them")
    for row, status in enumerate(columns["status"]):
        for name in ("prompt", "response_a", "response_b"):
            if not isinstance(columns[name][row], str):
                raise UserError(f"{file}, row {row}: {name} must be a text")
        if "principle" in columns and not isinstance(columns["principle"][row], str | None):
            raise UserError(f"{file}, row {row}: principle must be a text, or null for none")
        for name in _NUMBERS & {*columns}:
            value, needed = columns[name][row], name == "prob_a" and status == "ok"
            if (value is None and needed) or (value is not None and not _is_share(value)):
                raise UserError(f"{file}, row {row}: {name} must be from 0 to 1, not {value!r}")


def _is_share(value) -> bool:
    return isinstance(value, (int, float)) and 0 <= value <= 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
