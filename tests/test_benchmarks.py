"""Each benchmark runs, at a small size and without its peer."""

import gzip
import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

TINY = ["--shape=tiny", "--runs=1", "--no-peer"]
COMMANDS = {
    "scoring": [*TINY, "--batch=2", "--length=16"],
    "sampling": [*TINY, "--batch=2", "--prompt=4", "--new=4"],
    "sft_step": [*TINY, "--batch=2", "--length=16"],
    "ppo_iteration": [*TINY, "--batch=2", "--prompt=4", "--new=4", "--epochs=1"],
    "continuous_batching": [*TINY, "--replies=8", "--slots=4", "--prompt=4", "--mean=4", "--limit=12"],
    "vocabulary_memory": ["--length=64", "--width=16", "--vocab=20000"],
}


def run(name, arguments):
    command = [sys.executable, f"benchmarks/{name}.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_prints_its_line(name):
    (line,) = run(name, COMMANDS[name])
    assert line["task"]
    figures = [value for key, value in line.items() if isinstance(value, float)]
    assert figures and all(value >= 0 for value in figures)


def test_the_labelling_job_counts_what_it_computes(tmp_path):
    rows = [
        {"id": str(i), "post": f"Post {i}. " * 8, "summary_0": f"Sum {i}", "summary_1": f"Another {i}", "choice": i % 2}
        for i in range(9)
    ]
    data = tmp_path / "rows.jsonl.gz"
    with gzip.open(data, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    (line,) = run("judge_labelling", [f"--data={data}", "--pairs=2", "--runs=1", "--no-peer", "--batch-tokens=128"])
    assert line["prompt_tokens"] == 4 * line["prefix_tokens"] + line["suffix_tokens"]
    assert line["computed_tokens"] < line["prefix_tokens"] + line["suffix_tokens"]


def test_loading_a_folder_takes_little_more_memory_than_its_parameters():
    lines = run("load_memory", ["--shape=small", "--no-peer"])
    assert len(lines) == 2  # on one device and on eight
    for line in lines:
        # Less than the 310 MiB of the folder, of which the largest tensor has 64.
        assert line["ours"] - line["before_loading"] < 250
        assert line["holds"]
