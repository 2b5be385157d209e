"""A run's model for transformers, or its labels as a data set: python -m rlaif_jax.export --workdir=RUN --stage=rl
--out=DIR
"""

import dataclasses
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
from rlaif_jax.models.huggingface_export import DTYPES
from rlaif_jax.models.parameters import Placement
from rlaif_jax.parallel.mesh import RULES, AxesConfig, make_mesh
from rlaif_jax.stages.export import check_stage, export_model
from rlaif_jax.stages.export_adapter import check_adapter, export_adapter
from rlaif_jax.stages.folders import stage_folder
from rlaif_jax.stages.run import reopen_run

_USAGE = "usage: python -m rlaif_jax.export --workdir=RUN --stage=STAGE --out=DIR [--license=ID] [--name=NAME]"
_HELP = """\
  --stage=STAGE        label, or one that trains a model: sft, sl_cai, reward_model, best_of_n, preference, rl; in a
                       run with rounds, those of later ones are round2/rl, round2/label ...
  --license=ID         the licence of the model, or of prompts and responses, by its Hugging Face id; by default
                       "unknown"
  --name=NAME          what the card calls it; by default the run's name
  --dtype=DTYPE        of a model's weights: float32, as they were trained (the default), bfloat16 or float16
  --adapter            of a policy whose stage has trained an adapter (config.lora): that alone, in the format of PEFT
  --member=I           of a reward model with several members: which one, from 0 on
  --judge-license=ID   for labels: the licence of the judge, whose terms may bind what is made with them

Of a model, DIR is then what AutoModelForCausalLM.from_pretrained("DIR") loads or, of a reward model,
AutoModelForSequenceClassification, and AutoTokenizer with it; DIR must not be there yet.

Of labels, DIR is what datasets.load_dataset("DIR") and TRL's preference trainers read: prompt, chosen, rejected
(texts), the probability that the chosen one is better, and where each label comes from. Pairs without a preference are
left out."""
_ONLY_LABELS, _ONLY_MODELS = ("judge-license",), ("dtype", "member", "adapter")  # flags
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
    for name in ("workdir", "stage", "out", "name", *_ONLY_LABELS):
        flags.DEFINE_string(name, None, "", flag_values=values)
    flags.DEFINE_string("license", "unknown", "", flag_values=values)
    flags.DEFINE_enum("dtype", None, [*DTYPES], "", flag_values=values)
    flags.DEFINE_boolean("adapter", None, "", flag_values=values)
    flags.DEFINE_integer("member", None, "", lower_bound=0, flag_values=values)
    options = parse_plain(argv, _USAGE, values)
    if not options.workdir or not options.stage or not options.out:
        raise UserError(_USAGE)
    run, out = epath.Path(options.workdir), open_folder(options.out)
    labels = re.fullmatch(r"(round([2-9]|[1-9]\d+)/)?label", options.stage)
    for name in _ONLY_MODELS if labels else _ONLY_LABELS:
        if values[name].value is not None:
            raise UserError(f"--{name} is for {'models' if labels else 'labels'}, and --stage={options.stage} is none")
    if labels:
        _labels(run, out, options)
    else:
        _model(run, out, options)
    print(out)
    return 0


def _labels(run: epath.Path, out: epath.Path, options: flags.FlagValues) -> None:
    folder = stage_folder(run, options.stage)
    if not (folder / "preferences.parquet").exists():
        raise UserError(f"{folder / 'preferences.parquet'} is missing: run --stages={options.stage} first")
    licenses = {"license": options.license, "judge_license": options["judge-license"].value or "unknown"}
    export_labels(folder, out, options.name or run.name, licenses)


def _model(workdir: epath.Path, out: epath.Path, options: flags.FlagValues) -> None:
    # Whatever the run's mesh was: over all devices that are here, what they do not divide whole.
    placement = Placement(make_mesh(AxesConfig(data=1, fsdp=-1, tensor=1, sequence=1, replicated=())), tuple(RULES))
    run = dataclasses.replace(reopen_run(workdir, placement.mesh), placement=placement)
    check_stage(run, options.stage, options.member)
    title = options.name or f"{workdir.name} {options.stage}"
    if options.adapter:
        if options.dtype:
            raise UserError("--dtype is for whole models: an adapter is written as it was trained, in float32")
        check_adapter(run, options.stage)
        return export_adapter(run, options.stage, out, options.license, title)
    export_model(run, options.stage, out, options.dtype or "float32", options.member, options.license, title)


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
