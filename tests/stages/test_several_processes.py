"""Runs of several processes: the same results as one process, together in life and death, on any number of devices."""

import json
import shutil
import signal
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from rlaif_jax.errors import AGAIN
from tests.survival import Command, assert_same, ended, position
from tests.tiny_judge import tiny_run_flags, write_judge
from tests.twins import assert_alike

pytestmark = pytest.mark.slow
SHORTER = ("policy.max_response_length=48", "rl.steps=4", "rl.rollout_lag=1", "rl.kl.target=1.0", "rl.kl.horizon=64.0")
SCORES = ("prob_a_forward", "prob_a_reversed", "answer_mass")
ORDER = ("sft", "label", "reward_model", "rl", "eval")


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    flags = [flag for flag in tiny_run_flags(write_judge(folder / "judge.gguf"), folder) if "workdir" not in flag]
    flags += [*(f"--config.{change}" for change in SHORTER), "--config.rl.rewards.normalise=running"]
    return Command(flags, folder / "cache")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, command):
    """An undisturbed run of two processes with two devices each."""
    workdir = tmp_path_factory.mktemp("two")
    status, error = command.run(workdir, count=2, devices=2)
    assert status == 0, error
    return workdir


def test_two_processes_do_what_one_does(tmp_path, command, two_processes):
    status, error = command.run(tmp_path, devices=4)
    assert status == 0, error
    assert_alike(two_processes, tmp_path)


def end_one(processes, workdir, stage, events, victim, with_signal):
    """Signals one process in a stage. Returns exit status and stderr of each, and the seconds until the end."""
    began = time.time_ns()
    while position(workdir, began, ORDER) < (ORDER.index(stage), events):
        assert all(process.poll() is None for process in processes), ended(processes)
        time.sleep(0.01)
    processes[victim].send_signal(with_signal)
    sent = time.monotonic()
    return ended(processes, timeout=60), time.monotonic() - sent


def test_two_processes_end_together_and_go_on_to_the_same_result(tmp_path, command, two_processes):
    outcome, _ = end_one(command.start_several(tmp_path, 2, 2), tmp_path, "sft", 2, 1, signal.SIGTERM)
    assert [status for status, _ in outcome] == [AGAIN, AGAIN], outcome
    assert "SIGTERM to process 1 of 2" in outcome[0][1] and "SIGTERM" not in outcome[1][1]
    for stage, events, victim, says in (("label", 3, 0, "is gone"), ("rl", 2, 1, "does not answer any more")):
        outcome, seconds = end_one(
            command.start_several(tmp_path, 2, 2), tmp_path, stage, events, victim, signal.SIGKILL
        )
        status, error = outcome[1 - victim]
        assert status == AGAIN and seconds < 15, (stage, outcome)
        assert error.strip().splitlines()[-1].startswith(f"rlaif_jax: process {victim} of 2 (") and says in error
    status, error = command.run(tmp_path, count=2, devices=2)
    assert status == 0, error
    assert_same(tmp_path, two_processes)


def test_one_judge_of_all_processes_says_what_the_judge_of_each_does(tmp_path, command, two_processes):
    shutil.copytree(two_processes / "sft", tmp_path / "run" / "sft")
    together = "--config.mesh.judge.spans=all"
    status, error = command.run(tmp_path / "run", "--stages=label", together, count=2, devices=2)
    assert status == 0, error
    one, other = (pq.read_table(run / "label" / "preferences.parquet") for run in (tmp_path / "run", two_processes))
    np.testing.assert_allclose(one["prob_a"].to_numpy(), other["prob_a"].to_numpy(), atol=1e-5)
    assert one.drop(["prob_a", *SCORES]).equals(other.drop(["prob_a", *SCORES]))


def test_processes_that_were_given_different_things_end_with_one_line(tmp_path, command):
    def outcome(*own):
        processes = command.start_several(tmp_path, 2, 1, "--stages=sft", own=own)
        (status, error), (other, quiet) = ended(processes, timeout=120)
        assert status == other == 2 and "Traceback" not in error + quiet
        return error.strip().splitlines()[-1]

    assert "did you mean" in outcome(["--config.sft.stepz=3"], ["--config.sft.stepz=3"])
    line = outcome([], ["--config.sft.steps=5"])
    assert line == "rlaif_jax: process 1 was given sft.steps=5 and process 0 4: give all the same"
    line = outcome([f"--workdir={tmp_path / 'a'}"], [f"--workdir={tmp_path / 'b'}"])
    assert "process 1 does not see what process 0 writes" in line and "that all share" in line


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "sft" / "metrics.jsonl").read_text().splitlines()]


def test_a_run_goes_on_with_the_same_losses_on_other_devices(tmp_path, command, two_processes):
    begun = tmp_path / "four"
    outcome, _ = end_one(command.start_several(begun, 4, 2, "--stages=sft"), begun, "sft", 1, 3, signal.SIGTERM)
    assert [status for status, _ in outcome] == [AGAIN] * 4, outcome
    done = len(losses(begun))
    assert 0 < done < 4
    for count, devices in ((2, 2), (1, 1), (1, 8)):
        workdir = shutil.copytree(begun, tmp_path / f"{count}x{devices}")
        status, error = command.run(workdir, "--stages=sft", count=count, devices=devices)
        assert status == 0, error
        np.testing.assert_allclose(losses(workdir), losses(two_processes), rtol=1e-5)
        assert losses(workdir)[:done] == losses(begun)
