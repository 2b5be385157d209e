"""What the label store costs beside the judge: 100,000 synthetic labels, and again with all of them committed.

    python benchmarks/label_store.py

Prints milliseconds a label and the largest memory of tables (Arrow) and objects (Python) beyond the pairs themselves.
"""

import argparse
import dataclasses
import json
import tempfile
import time
import tracemalloc
from types import SimpleNamespace

import harness  # noqa: F401  (finds the package)
import pyarrow as pa
from etils import epath

from configs import quickstart
from rlaif_jax.config import parse
from rlaif_jax.judge import store
from rlaif_jax.judge.prompts import Pair, load_template
from rlaif_jax.judge.score import Judge, Judgement
from rlaif_jax.judge.verdict import Verdict


def main() -> None:
    """Prints the JSON line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--labels", type=int, default=100_000)
    flags.add_argument("--shard-size", type=int, default=512)
    flags.add_argument("--characters", type=int, default=2_000, help="of a prompt with its responses")
    options = flags.parse_args()
    config = dataclasses.replace(parse(quickstart.get_config().to_dict()).judge, shard_size=options.shard_size)
    judge = Judge(config, load_template(config.prompt), None, None, (), (), "0", 0, None)
    text = "x" * (options.characters - 200)
    pairs = [Pair(f"{i} {text}", f"{i} " + "a" * 90, f"{i} " + "b" * 90) for i in range(options.labels)]
    verdict = Verdict(0.6, 0.6, 0.6, None, None, None, 1.0)
    peak = SimpleNamespace(arrow=0)

    def judge_pairs(judge, pairs, plan, ids, on_prompts):
        peak.arrow = max(peak.arrow, pa.total_allocated_bytes())
        hashes = (store.pair_hashes(judge, pair) for pair in pairs)
        return [Judgement("ok", verdict, None, None, 500, 500, *both) for both in hashes]

    store.judge_pairs, store.plan_judging = judge_pairs, lambda judge, pairs: None
    with tempfile.TemporaryDirectory() as folder:
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            assert store.label(judge, pairs, epath.Path(folder), "labels")
            seconds.append(time.perf_counter() - began)
        tracemalloc.start()
        assert store.label(judge, pairs, epath.Path(folder) / "again", "with memory traced")
        python = tracemalloc.get_traced_memory()[1]
    line = {
        "task": f"{options.labels} synthetic labels, shards of {options.shard_size}",
        "milliseconds_per_label": 1e3 * seconds[0] / options.labels,
        "milliseconds_per_committed_label": 1e3 * seconds[1] / options.labels,
        "peak_table_megabytes": peak.arrow / 2**20,
        "peak_object_megabytes": python / 2**20,
        "megabytes_of_all_texts": options.labels * options.characters / 2**20,
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
