"""A run's labels as a preference data set: python -m rlaif_jax.export --workdir=RUN --stage=label --out=DIR"""

import math
import re
import sys
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from absl import flags
from etils import epath

from rlaif_jax.commands import open_folder, parse_plain, run_command
from rlaif_jax.errors import UserError
from rlaif_jax.evaluation.statistics import show_figure
from rlaif_jax.files import read_json, read_parquet, replacing, write_text
from rlaif_jax.stages.folders import stage_folder

_USAGE = "usage: python -m rlaif_jax.export --workdir=RUN --stage=label --out=DIR [--license=ID] [--name=NAME]"
_HELP = """  --stage=label        the labels to export; in a run with rounds, those of later ones are round2/label ...
  --license=ID         the licence of prompts and responses, by its Hugging Face id; "unknown" by default
  --judge-license=ID   that of the judge, whose terms may bind what is made with its labels
  --name=NAME          what the card calls the data set; by default the run's name

DIR is then what datasets.load_dataset("DIR") and TRL's preference trainers read: prompt, chosen, rejected (texts), the
probability that the chosen one is better, and where each label comes from. Pairs without a preference are left out."""
_CARD = """# {name}

{rows} preferences between two responses to a prompt, labelled by {labelled}.

- Judge: `{judge}` (weights {judge_hash})
- Prompt template: `{template}` ({template_hash})
- Left out: {left_out}
- Licence of prompts and responses: {license}; of the judge: {judge_license}

| column | |
|---|---|
| `prompt`, `chosen`, `rejected` | texts, in the layout of TRL's preference trainers |
| `chosen_probability` | how likely the chosen response is the better one |
| `margin` | the log-odds of that |
| `row`, `hash_forward`, `hash_reversed` | the label's row in the run, and hashes of the exact prompts of both orders |

## Audit of the judge

{audit}
"""


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    return run_command(argv, f"{__doc__}\n\n{_USAGE}\n\n{_HELP}", _main)


def _main(argv: list[str]) -> int:
    values = flags.FlagValues()
    for name, default in {"workdir": None, "stage": None, "out": None, "license": "unknown", "name": None}.items():
        flags.DEFINE_string(name, default, "", flag_values=values)
    flags.DEFINE_string("judge-license", "unknown", "", flag_values=values)
    options = parse_plain(argv, _USAGE, values)
    if not options.workdir or not options.out:
        raise UserError(_USAGE)
    if not re.fullmatch(r"(round([2-9]|[1-9]\d+)/)?label", options.stage or ""):
        raise UserError(f"--stage={options.stage}: only label can be exported, or that of a later round, round2/label")
    run, out = epath.Path(options.workdir), open_folder(options.out)
    folder = stage_folder(run, options.stage)
    if not (folder / "preferences.parquet").exists():
        raise UserError(f"{folder / 'preferences.parquet'} is missing: run --stages={options.stage} first")
    licenses = {"license": options.license, "judge_license": values["judge-license"].value}
    export_labels(folder, out, options.name or run.name, licenses)
    print(out)
    return 0


def export_labels(folder: epath.Path, out: epath.Path, name: str, licenses: dict[str, str]) -> None:
    """Writes the labels in `folder` to `out`/data/train.parquet with a card. Raises UserError where none decides."""
    file = folder / "preferences.parquet"
    table, manifest = read_parquet(file), read_json(folder / "manifest.json")
    rows = list(_preferences(table))
    if not rows:
        raise UserError(f"{file} has no pair of which one response is preferred")
    with replacing(out / "data" / "train.parquet") as temporary, temporary.open("wb") as data:
        pq.write_table(pa.Table.from_pylist(rows), data)
    left_out = {status: n for status, n in manifest["status"].items() if status != "ok"}
    undecided = manifest["status"].get("ok", 0) - len(rows)
    facts = {name: manifest.get(name, "-") for name in ("judge", "judge_hash", "template", "template_hash")}
    front = {
        "license": licenses["license"],
        "task_categories": ["text-generation"],
        "tags": ["preference", "rlaif", "trl"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train.parquet"}]}],
    }
    labelled = "people" if facts["judge"] == "human" else "an AI judge"
    labelled = "a panel of AI judges" if "members" in manifest else labelled
    if "constitution" in manifest:
        how = {"draw": "one principle a pair (column `principle`)", "ensemble": "all principles"}
        labelled += f" under {how[manifest['principles']]} of the constitution {manifest['constitution']}"
    unused = _counts(left_out | {"undecided": undecided})
    facts |= {"name": name, "rows": len(rows), "labelled": labelled, "left_out": unused, "audit": _audit(folder)}
    card = _CARD.format(**facts, **licenses)
    write_text(out / "README.md", f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{card}")


def _preferences(table: pa.Table) -> Iterator[dict]:
    """A row for every pair of which one response is preferred."""
    for row in table.to_pylist():
        if row["status"] != "ok" or row["prob_a"] == 0.5:
            continue
        a_first, prob = row["prob_a"] > 0.5, max(row["prob_a"], 1 - row["prob_a"])
        chosen, rejected = ("response_a", "response_b") if a_first else ("response_b", "response_a")
        odds = prob / max(1 - prob, 1e-12)  # people's labels are certain
        yield {
            "prompt": row["prompt"],
            "chosen": row[chosen],
            "rejected": row[rejected],
            "chosen_probability": prob,
            "margin": math.log(odds),
            "judge": row["judge"],
            **{name: row[name] for name in ("row", "hash_forward", "hash_reversed")},
            **({"principle": row["principle"]} if row.get("principle") else {}),
        }


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {status}" for status, n in counts.items() if n) or "none"


def _audit(folder: epath.Path) -> str:
    """The audit as a Markdown table."""
    file = folder / "audit.json"
    if not file.exists():
        return "There is none: people made these labels."
    rows = ["| | mean [95 % interval] | n |", "|---|---|---|"]
    for name, figure in read_json(file).items():
        if isinstance(figure, dict):
            rows.append(f"| `{name}` | {show_figure(figure)} | {figure['n']} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
