import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch.conftest import PROBE, ROOT, check_probe, terminate_one
from tests.tiny_judge import tiny_run_flags, write_judge

LOCAL = "launch/local.sh"
SHOW = 'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS with ${CUDA_VISIBLE_DEVICES-all}"'
FOR_EVER = "while true; do sleep 0.05; done"


def test_each_process_is_told_which_it_is(launcher):
    done = launcher.run(LOCAL, 2, "bash", "-c", SHOW, f"--workdir={launcher.state}/run")
    assert done.returncode == 0, done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("["))
    port = lines[0].split(":")[1].split()[0]
    assert lines == [f"[{i}] {i} of 2 at 127.0.0.1:{port} with all" for i in range(2)]
    logs = [(launcher.state / "run" / "logs" / f"process{i}.log").read_text() for i in range(2)]
    assert logs == [line[4:] + "\n" for line in lines]


def test_python_is_that_of_the_repository(launcher):
    done = launcher.run(LOCAL, 1, "python", "-c", "import sys; print(sys.prefix)")
    assert f"[0] {ROOT / '.venv'}" in done.stdout.splitlines()


@pytest.mark.parametrize(("count", "shares"), [(1, ["0,1,2,3"]), (2, ["0,1", "2,3"]), (4, ["0", "1", "2", "3"])])
def test_processes_share_the_gpus(launcher, count, shares):
    (launcher.state / "bin" / "nvidia-smi").write_text("#!/bin/sh\nseq 0 3\n")
    (launcher.state / "bin" / "nvidia-smi").chmod(0o755)
    done = launcher.run(LOCAL, count, "bash", "-c", SHOW, JAX_PLATFORMS="")
    assert sorted(line.split()[-1] for line in done.stdout.splitlines() if line.startswith("[")) == shares


def test_without_a_working_nvidia_smi_there_are_no_gpus(launcher):
    (launcher.state / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho failed >&2\nexit 127\n")
    (launcher.state / "bin" / "nvidia-smi").chmod(0o755)
    done = launcher.run(LOCAL, 1, "bash", "-c", SHOW, JAX_PLATFORMS="")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(" with all\n")


def test_gpus_that_can_not_be_shared_are_an_error(launcher):
    done = launcher.run(LOCAL, 2, "true", JAX_PLATFORMS="", CUDA_VISIBLE_DEVICES="0,1,2")
    assert done.returncode == 2
    assert "2 processes can't share 3 GPUs" in done.stderr


def test_an_error_ends_the_others_and_beats_their_status(launcher):
    fail_or_wait = f'[ "$JAX_PROCESS_ID" = 0 ] || exit 3; trap "exit 75" TERM; {FOR_EVER}'
    done = launcher.run(LOCAL, 2, "bash", "-c", fail_or_wait, RESTARTS=5)
    assert done.returncode == 3
    assert "starting again" not in done.stderr


def test_who_does_not_end_is_killed(launcher):
    deaf = f'[ "$JAX_PROCESS_ID" = 0 ] || exit 3; trap "" TERM; {FOR_EVER}'
    done = launcher.run(LOCAL, 2, "bash", "-c", deaf, GRACE=0)
    assert done.returncode == 3
    ended = [f"local: process {i} ended with status {status}" for i, status in ((0, 137), (1, 3))]
    assert sorted(done.stderr.splitlines()) == ended, "and nothing from bash"


def test_preempted_or_lost_is_started_again(launcher):
    end = "[ $JAX_PROCESS_ID = 1 ] || kill -KILL $$; exit 75"
    once = f'[ -e "$1$JAX_PROCESS_ID" ] || {{ touch "$1$JAX_PROCESS_ID"; {end}; }}'
    command = ["bash", "-c", once, "-", launcher.state / "been"]
    assert launcher.run(LOCAL, 2, *command).returncode == 75
    assert launcher.run(LOCAL, 2, *command).returncode == 0
    for i in range(2):
        (launcher.state / f"been{i}").unlink()
    assert launcher.run(LOCAL, 2, *command, RESTARTS=1).returncode == 0


def test_restarts_are_counted(launcher):
    done = launcher.run(LOCAL, 1, "bash", "-c", "exit 75", RESTARTS=2)
    assert done.returncode == 75
    assert done.stderr.count("starting again") == 2


def test_sigterm_reaches_all_and_is_no_reason_to_go_on(launcher):
    wait = f'trap "touch $1$JAX_PROCESS_ID; exit 75" TERM; touch $1ready$JAX_PROCESS_ID; {FOR_EVER}'
    command = ["bash", LOCAL, "2", "bash", "-c", wait, "-", str(launcher.state / "got")]
    process = subprocess.Popen(command, cwd=ROOT, env=launcher.env | {"RESTARTS": "5"})
    while not all((launcher.state / f"gotready{i}").exists() for i in range(2)):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert all((launcher.state / f"got{i}").exists() for i in range(2))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_comes_once_and_leaves_nothing_behind(launcher, number):
    """Ctrl-C sends one. What reads the processes' output and what waits between looks at them is in that group, too."""
    save = 'trap "echo told; told=1" TERM; me=$1$JAX_PROCESS_ID; echo $$ > $me.tmp; mv $me.tmp $me; '
    save += "until [ ${told-} ]; do sleep 0.05; done; for i in {1..10}; do sleep 0.05; done; echo saved; exit 75"
    command = ["bash", LOCAL, "2", "bash", "-c", save, "-", str(launcher.state / "pid")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Where the tests run in the background Ctrl-C is ignored, and bash can't trap what it has inherited as ignored.
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(command, cwd=ROOT, env=launcher.env, start_new_session=True, preexec_fn=heard, **pipes)
    files = [launcher.state / f"pid{i}" for i in range(2)]
    while not all(file.exists() for file in files):
        time.sleep(0.05)
    os.killpg(process.pid, number)
    assert process.wait(60) == 75
    assert not any(Path(f"/proc/{file.read_text().strip()}").exists() for file in files)
    output, errors = process.communicate(timeout=60)
    lines = sorted(line for line in output.splitlines() if line.startswith("["))
    assert lines == [f"[{i}] {word}" for i in range(2) for word in ("saved", "told")]
    assert sorted(errors.splitlines()) == [f"local: process {i} ended with status 75" for i in range(2)]


@pytest.mark.parametrize("variables", [{"GRACE": "1m"}, {"RESTARTS": "-1"}])
def test_variables_are_whole_numbers(launcher, variables):
    done = launcher.run(LOCAL, 1, "true", **variables)
    assert done.returncode == 2
    assert done.stderr.endswith(" must be whole numbers\n")


def test_a_command_is_no_flag(launcher):
    done = launcher.run(LOCAL, 2, "--dry-run", "true")
    assert (done.returncode, done.stderr) == (2, "local: --dry-run is no command: flags come before N\n")


@pytest.mark.parametrize("arguments", [[], ["2"], ["0", "true"], ["two", "true"]])
def test_usage(launcher, arguments):
    done = launcher.run(LOCAL, *arguments)
    assert (done.returncode, done.stderr) == (2, "usage: bash launch/local.sh [--dry-run] N COMMAND...\n")


def test_dry_run_says_what_it_would_run(launcher):
    done = launcher.run(LOCAL, "--dry-run", 2, "touch", launcher.state / "a b")
    assert not (launcher.state / "a b").exists()
    lines = done.stdout.splitlines()
    assert [line.split()[2:4] for line in lines] == [["JAX_NUM_PROCESSES=2", f"JAX_PROCESS_ID={i}"] for i in range(2)]
    subprocess.run(["bash", "-c", lines[1]], check=True, env=os.environ)
    assert (launcher.state / "a b").exists()


@pytest.mark.slow
def test_two_processes_stop_at_one_step_and_go_on(launcher):
    terminate_one(launcher.state)
    done = launcher.run(LOCAL, 2, "python", PROBE, launcher.state, RESTARTS=1)
    assert done.returncode == 0, done.stdout + done.stderr
    check_probe(launcher.state)


@pytest.mark.slow
def test_a_run_that_is_preempted_goes_on(launcher):
    flags = tiny_run_flags(write_judge(launcher.state / "judge.gguf"), launcher.state / "run")
    command = [*flags, "--stages=sft", "--config.sft.steps=20", "--config.sft.checkpoint_every=5"]
    env = launcher.env | {"RESTARTS": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # the second start finds what the first has compiled
    command = ["bash", LOCAL, "2", "python", "-m", "rlaif_jax.main", *command]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (launcher.state / "run" / "sft" / "checkpoints" / "5").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    os.kill(process_of(process.pid, 1), signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert all(f"local: process {i} ended with status 75" in output for i in range(2)), output
    assert "starting again (1 of 1)" in output, output
    lines = (launcher.state / "run" / "sft" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(20))


def process_of(launcher: int, index: int) -> int:
    """The process of a launcher that knows itself as number `index`."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    [found] = [pid for pid in children if f"\0JAX_PROCESS_ID={index}\0" in Path(f"/proc/{pid}/environ").read_text()]
    return int(found)
