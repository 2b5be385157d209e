"""kill -9 at chosen moments, then the same command: the same result, and nothing committed is done again."""

import json
import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from tests.tiny_judge import tiny_run_flags, write_judge

pytestmark = pytest.mark.slow


def start(flags):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-m", "rlaif_jax.main", *flags]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run(flags):
    process = start(flags)
    output = process.communicate()[0].decode()
    assert process.returncode == 0, output


def kill_once(flags, happened):
    """Starts the run and kills it as soon as `happened()`."""
    process = start(flags)
    while not happened():
        assert process.poll() is None, process.communicate()[0].decode()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def result_files(workdir):
    names = [f"{stage}/metrics.jsonl" for stage in ("sft", "reward_model", "rl")] + ["eval/results.json"]
    return {name: (workdir / name).read_text() for name in names}


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return write_judge(tmp_path_factory.mktemp("judge") / "judge.gguf")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, judge):
    workdir = tmp_path_factory.mktemp("undisturbed")
    run(tiny_run_flags(judge, workdir))
    return workdir


def test_a_run_killed_in_labelling_and_in_rl_ends_as_an_undisturbed_one(tmp_path, judge, undisturbed):
    flags = tiny_run_flags(judge, tmp_path)
    shards = tmp_path / "label" / "shards"
    kill_once(flags, lambda: shards.exists() and len(list(shards.glob("*.parquet"))) >= 2)
    committed = {shard: shard.stat().st_mtime_ns for shard in shards.glob("*.parquet")}
    assert not (tmp_path / "label" / "preferences.parquet").exists()

    checkpoints, metrics = tmp_path / "rl" / "checkpoints", tmp_path / "rl" / "metrics.jsonl"

    def in_the_middle_of_rl():
        return (checkpoints / "2").exists() and len(metrics.read_text().splitlines()) >= 3

    kill_once(flags, in_the_middle_of_rl)
    assert {shard: shard.stat().st_mtime_ns for shard in committed} == committed
    assert not (checkpoints / "6").exists()
    seconds = [json.loads(line) for line in (tmp_path / "rl" / "timing.jsonl").read_text().splitlines()][:2]
    run(flags)
    # The first two steps stand as the killed process timed them: they were not done again.
    assert [json.loads(line) for line in (tmp_path / "rl" / "timing.jsonl").read_text().splitlines()][:2] == seconds

    assert result_files(tmp_path) == result_files(undisturbed)
    labels = [pq.read_table(folder / "label" / "preferences.parquet") for folder in (tmp_path, undisturbed)]
    assert labels[0].equals(labels[1])
