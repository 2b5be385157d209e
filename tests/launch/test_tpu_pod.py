import json
import shlex
import shutil
import signal
import subprocess
import sys
import threading

import pytest

from rlaif_jax.parallel.processes import Place, place_from
from tests.launch.conftest import PROBE, ROOT, check_probe, free_port, terminate_one

SCRIPT = "launch/tpu_pod.sh"
ACTIVE = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
FLAGS = ["--zone=us-z", "--project=p", "--accelerator-type=v4-16", "--runtime-version=tpu-ubuntu2204-base"]
# A worker's environment, and the next of the statuses that this worker is to end with.
COMMAND = """
name=${STAND_IN_WORKER/\\//-}
env -0 > "$1/$name.env"
read -r status < "$1/$name.statuses"
sed -i 1d "$1/$name.statuses"
exit "$status"
"""


@pytest.fixture
def pod(launcher):
    """A launcher, and what a new TPU VM holds: a repository that has its environment already."""
    python = launcher.state / "vm" / "rlaif_jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    real = ROOT / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\n[ "$2" != pip ] || {{ echo "$*" >> ~/pip; exit; }}\nexec {real} "$@"\n')
    python.chmod(0o755)
    (launcher.state / "bin" / "python3.13").symlink_to(sys.executable)
    (launcher.state / "bin" / "sudo").symlink_to("/bin/false")  # nothing is to be installed here
    launcher.env["STAND_IN_VM"] = str(launcher.state / "vm")
    return launcher


def run(pod, *command, states=(ACTIVE,), slices="1x2", flags=(), **variables):
    arguments = ["run", "pod", *FLAGS, *flags, "--", *command]
    return pod.run(SCRIPT, *arguments, STAND_IN_STATES=json.dumps(states), STAND_IN_SLICES=slices, **variables)


def run_with(pod, statuses, **arguments):
    """The command whose workers end with `statuses`, run by run."""
    for worker, each in enumerate(zip(*statuses, strict=True)):
        (pod.state / f"0-{worker}.statuses").write_text("".join(f"{status}\n" for status in each))
    return run(pod, "bash", "-c", COMMAND, "-", pod.state, **arguments)


def verbs(pod):
    return [call[3] for call in pod.calls("gcloud") if call[3] != "describe"]


def place(pod, worker):
    pairs = (pod.state / f"{worker}.env").read_text().rstrip("\0").split("\0")
    return place_from({}, dict(pair.split("=", 1) for pair in pairs))


def test_asks_installs_and_runs_on_all_workers(pod):
    done = run_with(pod, [(0, 0)], flags=["--spot"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert verbs(pod) == ["create", "scp", "ssh", "ssh"]
    [create] = [call for call in pod.calls("gcloud") if call[3] == "create"]
    assert create[4:] == ["pod", "--node-id=pod", *FLAGS[2:], "--spot", "--quiet", *FLAGS[:2]]
    assert [place(pod, f"0-{i}") for i in range(2)] == [Place("127.0.0.1:8476", 2, i) for i in range(2)]
    for i in range(2):
        first, _ = (pod.state / f"0-{i}" / "pip").read_text().splitlines()
        assert " jax[tpu]==" in first and first.endswith("-rrequirements-cloud.txt")
        copied = pod.state / f"0-{i}" / "rlaif_jax"
        assert (copied / "rlaif_jax" / "main.py").exists()
        assert not {path.name for path in copied.iterdir()} & {".plan", ".peer", ".pytest_cache", ".ruff_cache", "runs"}
    assert "pod is PROVISIONING" in done.stderr


def test_several_slices_are_one_program(pod):
    names = [f"{s}-{w}" for s in range(2) for w in range(2)]
    for name in names:
        (pod.state / f"{name}.statuses").write_text("0\n")
    done = run(pod, "bash", "-c", COMMAND, "-", pod.state, slices="2x2", flags=["--node-count=2"])
    assert done.returncode == 0, done.stdout + done.stderr
    [create] = [call for call in pod.calls("gcloud") if call[3] == "create"]
    assert create[4:6] == ["pod", "--node-count=2"]
    assert [place(pod, name) for name in names] == [Place("127.0.0.1:8476", 4, i) for i in range(4)]


def test_an_error_of_one_worker_ends_the_run(pod):
    done = run_with(pod, [(75, 3)])
    assert done.returncode == 3
    assert verbs(pod) == ["create", "scp", "ssh", "ssh"]


def test_the_command_goes_on_where_a_process_was_lost(pod):
    done = run_with(pod, [(75, 137), (0, 0)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert verbs(pod) == ["create", "scp", "ssh", "ssh", "scp", "ssh", "ssh"]


def test_a_resource_that_was_taken_away_is_asked_for_anew(pod):
    taken = ["ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDING", "SUSPENDED"]
    done = run_with(pod, [(75, 75), (0, 0)], states=[taken, ACTIVE])
    assert done.returncode == 0, done.stdout + done.stderr
    assert verbs(pod) == ["create", "scp", "ssh", "ssh", "delete", "create", "scp", "ssh", "ssh"]


def test_a_broken_connection_is_no_error_of_the_command(pod):
    broken = 'test -e "$0" || { touch "$0"; kill -KILL $PPID; }'
    done = run(pod, "bash", "-c", broken, pod.state / "been", slices="1x1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert verbs(pod).count("ssh") == 4


def test_restarts_are_counted(pod):
    done = run_with(pod, [(75, 75)], RESTARTS=0)
    assert done.returncode == 75
    assert "0 restarts: giving up" in done.stderr


def test_a_request_that_fails_is_not_repeated(pod):
    done = run_with(pod, [(0, 0)], states=[["WAITING_FOR_RESOURCES", "FAILED"]])
    assert done.returncode == 1
    assert "pod is FAILED: see gcloud compute tpus queued-resources describe pod" in done.stderr
    assert verbs(pod) == ["create"]


def test_delete(pod):
    (pod.state / "resources.json").write_text(json.dumps({"now": ["SUSPENDED"], "to come": []}))
    done = pod.run(SCRIPT, "delete", "pod", "--zone=us-z")
    assert done.returncode == 0, done.stderr
    assert pod.calls("gcloud")[-1][3:] == ["delete", "pod", "--force", "--quiet", "--zone=us-z"]


def test_dry_run_says_what_it_would_run(pod):
    done = pod.run(SCRIPT, "--dry-run", "run", "pod", *FLAGS, "--", "python", "-m", "x", "--text=a b")
    commands = [shlex.split(line) for line in done.stdout.replace("\\\n", "").splitlines()]
    assert [command[4] for command in commands] == ["create", "describe", "scp", "ssh", "ssh"]
    assert [command[0] for command in commands] == ["gcloud"] * 5
    [last] = [each.removeprefix("--command=") for each in commands[-1] if each.startswith("--command=")]
    assert shlex.split(last) == ["bash", "rlaif_jax/launch/tpu_worker.sh", "python", "-m", "x", "--text=a b"]
    assert not pod.calls("gcloud")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--dry-run", "pod", *FLAGS, "--", "x", "--workdir=gs://bucket/r"],
        ["run", "pod", *FLAGS, "--dry-run", "--", "x", "--workdir=/mnt/r"],
        ["delete", "pod", FLAGS[0], "--dry-run"],
    ],
)
def test_dry_run_may_stand_anywhere_before_the_command(pod, arguments):
    done = pod.run(SCRIPT, *arguments)
    assert done.returncode == 0, done.stderr
    assert "--dry-run" not in done.stdout and done.stdout.startswith("gcloud ")
    assert not pod.calls("gcloud")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "pod", "--accelerator-type=v4-8", "--", "true"], "tpu_pod: --zone is missing"),
        (["run", "pod", "--zone=z", "v4-8", "--", "true"], "tpu_pod: unexpected argument v4-8"),
        (["run", "pod", "--zone=z"], "tpu_pod: no command after --"),
        (["run", "pod", FLAGS[0], FLAGS[3], "--", "true"], "tpu_pod: --accelerator-type is missing"),
        (["run", "pod", FLAGS[0], FLAGS[2], "--", "true"], "tpu_pod: --runtime-version is missing"),
        (["run", "pod", *FLAGS, "--node-count=0", "--", "true"], "tpu_pod: --node-count=0 must be a positive"),
        (["run", "pod", *FLAGS, "--node-count=two", "--", "true"], "tpu_pod: --node-count=two must be a positive"),
        (["run", "pod", *FLAGS, "--", "x", "--workdir=runs/a"], "tpu_pod: --workdir=runs/a is on no disk that"),
        (["run", "pod", *FLAGS, "--", "x", "--workdir", "/tmp/a"], "tpu_pod: --workdir=/tmp/a is on no disk that"),
        (["start", "pod"], "bash launch/tpu_pod.sh run NAME --zone=ZONE"),
    ],
)
def test_usage(pod, arguments, message):
    done = pod.run(SCRIPT, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(message)


def test_a_worker_takes_over_from_a_process_of_before(pod):
    """Whose connection was lost. Here the metadata has the other form, of hosts alone."""
    worker = pod.state / "vm" / "rlaif_jax"
    (worker / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "tpu_worker.sh", worker / "launch")
    before = subprocess.Popen(["sleep", "1000"], cwd=worker)
    threading.Thread(target=before.wait, daemon=True).start()  # or it would stay, ended, in the table of processes
    (worker / "process.pid").write_text(str(before.pid))
    command = [worker / "launch" / "tpu_worker.sh", "bash", "-c", COMMAND, "-", pod.state]
    (pod.state / "0-1.statuses").write_text("0\n")
    metadata = {"STAND_IN_WORKER": "0/1", "STAND_IN_SLICES": "1x2", "STAND_IN_ENDPOINTS": "10.0.0.1,10.0.0.2"}
    done = pod.run(*command, **metadata)
    assert done.returncode == 0, done.stderr
    assert before.wait(60) == -signal.SIGTERM
    assert place(pod, "0-1") == Place("10.0.0.1:8476", 2, 1)


@pytest.mark.slow
def test_two_processes_stop_at_one_step_and_go_on(pod):
    terminate_one(pod.state)
    done = run(pod, "python", PROBE, pod.state, JAX_COORDINATOR_PORT=free_port())
    assert done.returncode == 0, done.stdout + done.stderr
    check_probe(pod.state)
