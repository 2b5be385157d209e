import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from rlaif_jax.errors import AGAIN, UserError
from rlaif_jax.parallel import processes
from rlaif_jax.parallel.processes import Place, place_from, take_flags

SLURM = {"SLURM_JOB_ID": "70123", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}
TPU = {"TPU_WORKER_HOSTNAMES": "w-0.pod,w-1.pod", "TPU_WORKER_ID": "1"}
SLICES = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2", "MEGASCALE_COORDINATOR_ADDRESS": "first.pod:8080"}
VARIABLES = {"JAX_COORDINATOR_ADDRESS": "h:9", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}
PORT = 61440 + 70123 % 4096


@pytest.mark.parametrize(
    ("flags", "environment", "place"),
    [
        ({}, {}, None),
        ({"coordinator": "h:9", "processes": "2", "process": "1"}, VARIABLES, Place("h:9", 2, 1)),
        ({}, VARIABLES, Place("h:9", 3, 2)),
        ({"coordinator": "h:9", "processes": "1", "process": "0"}, {}, None),
        ({}, SLURM, None),  # a job's script, outside its steps
        ({}, SLURM | {"SLURM_STEP_NODELIST": "node[003-007,12],other"}, Place(f"node003:{PORT}", 4, 2)),
        ({}, SLURM | {"SLURM_STEP_NODELIST": "a1,b[2-3]"}, Place(f"a1:{PORT}", 4, 2)),
        ({}, SLURM | {"SLURM_STEP_NODELIST": "gpu-[7,9]"}, Place(f"gpu-7:{PORT}", 4, 2)),
        ({}, SLURM | {"SLURM_STEP_NODELIST": "rack[0-1]n[2-3]-ib,x"}, Place(f"rack0n2-ib:{PORT}", 4, 2)),
        ({}, SLURM | {"SLURM_STEP_NODELIST": "a", "SLURM_STEP_ID": "1"}, Place(f"a:{PORT + 97}", 4, 2)),
        ({}, SLURM | {"SLURM_STEP_NODELIST": "a1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({}, TPU, Place("w-0.pod:8476", 2, 1)),
        ({}, {**TPU, "JAX_COORDINATOR_PORT": "99"}, Place("w-0.pod:99", 2, 1)),
        ({}, {**TPU, **SLICES}, Place("first.pod:8476", 6, 5)),
        ({}, {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
    ],
)
def test_a_process_finds_its_place(flags, environment, place):
    assert place_from(flags, environment) == place


@pytest.mark.parametrize(
    ("flags", "environment", "words"),
    [
        ({"coordinator": "h:9", "process": "0"}, {}, "--processes missing"),
        ({}, {"JAX_PROCESS_ID": "1", "JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS missing"),
        ({"coordinator": "h", "processes": "2", "process": "0"}, {}, "'h' must be HOST:PORT"),
        ({"coordinator": "h:9", "processes": "2", "process": "2"}, {}, "process '2' of '2' processes"),
        ({"coordinator": "h:9", "processes": "two", "process": "0"}, {}, "of 'two' processes"),
    ],
)
def test_half_a_place_is_one_clear_line(flags, environment, words):
    with pytest.raises(UserError, match=re.escape(words)):
        place_from(flags, environment)


def test_the_flags_of_processes_are_taken_out_of_a_command():
    rest, found = take_flags(["main", "--process=1", "--seed", "--processes=2", "--coordinator=h:9", "--processor=3"])
    assert rest == ["main", "--seed", "--processor=3"]
    assert found == {"process": "1", "processes": "2", "coordinator": "h:9"}


def test_one_process_alone_is_the_special_case():
    assert processes.count() == 1 and processes.first()
    assert processes.gather(3) == [3] and processes.agree(lambda: "x") == "x" == processes.by_first(lambda: "x")
    assert processes.parted([1, 2], lambda x, y: np.add(x, y), [3, 4]) == [4, 6]
    with processes.heeding_sigterm():
        assert not processes.stop_point() and not processes.stop_wanted()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        assert processes.stop_point() and processes.stop_wanted()
    assert not processes.stop_point()


class Pair:
    """Two processes at work."""

    def __init__(self, folder, *arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.logs = [folder / f"{i}.log" for i in (0, 1)]
        command = [sys.executable, "-m", "tests.parallel.peer", f"--coordinator={address}", "--processes=2", *arguments]
        env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
        self.processes = [
            subprocess.Popen([*command, f"--process={i}"], env=env, stdout=subprocess.DEVNULL, stderr=log.open("w"))
            for i, log in enumerate(self.logs)
        ]

    def wait_for_work(self):
        while not all("step 5" in log.read_text() for log in self.logs):
            assert all(process.poll() in (None, 2) for process in self.processes), self.logs[0].read_text()
            time.sleep(0.05)

    def signal(self, victim, number):
        self.processes[victim].send_signal(number)
        return time.monotonic()

    def end(self, survivor):
        """Exit status and last line of a process."""
        status = self.processes[survivor].wait(timeout=40)
        return status, self.logs[survivor].read_text().strip().splitlines()[-1]


@pytest.mark.slow
def test_a_process_that_fails_dies_hangs_or_is_stopped_ends_the_other_with_a_line(tmp_path):
    cases = {
        (0, signal.SIGKILL): "rlaif_jax: process 0 of 2 \\(.+\\) is gone; the same command goes on",
        (1, signal.SIGKILL): "rlaif_jax: process 1 of 2 \\(.+\\) does not answer any more: it died or hangs; the same",
        (0, signal.SIGSTOP): "rlaif_jax: process 0 of 2 \\(.+\\) does not answer any more: it died or hangs; the same",
        (1, signal.SIGSTOP): "rlaif_jax: process 1 of 2 \\(.+\\) does not answer any more: it died or hangs; the same",
    }
    pairs = {}
    for case in [*cases, (1, signal.SIGTERM), "bad"]:
        folder = tmp_path / str(case)
        folder.mkdir()
        pairs[case] = Pair(folder, *(["--bad=1"] if case == "bad" else []))
    for pair in pairs.values():
        pair.wait_for_work()
    sent = {case: pairs[case].signal(*case) for case in [*cases, (1, signal.SIGTERM)]}
    for case, line in cases.items():
        status, last = pairs[case].end(1 - case[0])
        assert status == AGAIN and re.match(line, last), (case, last)
        assert time.monotonic() - sent[case] < 15
        pairs[case].processes[case[0]].kill()
    together, bad = pairs[1, signal.SIGTERM], pairs["bad"]
    assert [together.end(i)[0] for i in (0, 1)] == [AGAIN, AGAIN]
    stops = [re.search(r"stops at (\d+)", log.read_text())[1] for log in together.logs]
    assert stops[0] == stops[1]  # the same step
    assert "SIGTERM to process 1 of 2" in together.end(0)[1] and "stops at" in together.end(1)[1]
    assert [bad.end(i)[0] for i in (0, 1)] == [2, 2]
    assert re.match("rlaif_jax: process 1 of 2 \\(.+\\) has stopped: a bad value", bad.end(0)[1])
