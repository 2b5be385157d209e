import json
import os
import signal
import subprocess
import sys
import time

import pytest

from rlaif_jax.parallel.processes import Place, place_from
from tests.launch.conftest import PROBE, ROOT, check_probe, free_slurm_job, terminate_one

SCRIPT = "launch/slurm.sbatch"
# Writes down its environment and arguments, and ends with the next of its statuses.
TASK = """
import json, os, pathlib, sys
folder, task = pathlib.Path(sys.argv[1]), os.environ["SLURM_PROCID"]
(folder / f"{task}.json").write_text(json.dumps(dict(os.environ)))
(folder / f"arguments-{os.environ.get('SLURM_ARRAY_TASK_ID')}-{task}").write_text(" ".join(sys.argv[2:]))
left = json.loads((folder / f"statuses-{task}").read_text())
(folder / f"statuses-{task}").write_text(json.dumps(left[1:]))
if left[0] < 0:
    os.kill(os.getpid(), -left[0])
sys.exit(left[0])
"""


def sbatch(launcher, *arguments, job=4096, **variables):
    command = ["-c", 'exec sbatch "$@"', "-", *arguments]
    return launcher.run(*command, STAND_IN_JOB=job, **variables)


def submit(launcher, statuses, *options, command=(), **variables):
    """Submits a job of two nodes whose tasks end with `statuses`, start by start."""
    for task, each in enumerate(zip(*statuses, strict=True)):
        (launcher.state / f"statuses-{task}").write_text(json.dumps(each))
    task = [sys.executable, "-c", TASK, launcher.state, *command]
    return sbatch(launcher, "--nodes=2", *options, SCRIPT, *task, **variables)


def test_one_task_a_node_knows_its_place(launcher):
    assert submit(launcher, [(0, 0)], job=4099).returncode == 0
    envs = [json.loads((launcher.state / f"{task}.json").read_text()) for task in range(2)]
    assert [place_from({}, env) for env in envs] == [Place("localhost:61443", 2, task) for task in range(2)]
    assert all(env["PATH"].startswith(f"{ROOT}/.venv/bin:") for env in envs)
    [call] = launcher.calls("srun")
    assert {"--kill-on-bad-exit=0", "--wait=0"} <= set(call), "or who is done would end who is saving"


@pytest.mark.parametrize("statuses", [(75, 75), (75, -9), (-15, 75)])
def test_preempted_or_lost_is_queued_again(launcher, statuses):
    done = submit(launcher, [statuses, (75, 75), (0, 0)])
    assert done.returncode == 0, done.stderr
    assert launcher.calls("scontrol") == [["requeue", "4096"]] * 2
    assert len(launcher.calls("srun")) == 3


def test_an_error_is_not(launcher):
    assert submit(launcher, [(2, 2)]).returncode == 2
    assert not launcher.calls("scontrol")


def test_restarts_are_counted(launcher):
    done = submit(launcher, [(75, 75)] * 3, RESTARTS=2)
    assert done.returncode == 75
    assert "status 75 after 2 restarts: giving up" in done.stderr
    assert len(launcher.calls("srun")) == 3


def test_an_array_runs_a_seed_a_task(launcher):
    command = ["--config.seeds=%a", "--workdir=runs/%a"]
    assert submit(launcher, [(0, 0)] * 3, "--array=2-4", command=command).returncode == 0
    arguments = {path.name: path.read_text() for path in launcher.state.glob("arguments-*")}
    tasks = [(seed, task) for seed in (2, 3, 4) for task in range(2)]
    assert arguments == {f"arguments-{i}-{task}": f"--config.seeds={i} --workdir=runs/{i}" for i, task in tasks}


def test_what_ends_the_whole_job_ends_it(launcher):
    """scancel, of which this script is told, too."""
    (launcher.state / "wait").write_text('trap "exit 75" TERM\ntouch "$1"\nwhile true; do sleep 0.05; done\n')
    command = ["bash", SCRIPT, "bash", str(launcher.state / "wait"), str(launcher.state / "ready")]
    job = {"SLURM_JOB_ID": "4096", "SLURM_JOB_NUM_NODES": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=launcher.env | job, start_new_session=True)
    while not (launcher.state / "ready").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) != 0
    assert not launcher.calls("scontrol")


def test_dry_run_says_what_it_would_run(launcher):
    done = launcher.run(SCRIPT, "--dry-run", "touch", launcher.state / "a b")
    srun, _, scontrol = done.stdout.splitlines()
    assert srun.startswith("srun --ntasks-per-node=1 ")
    assert srun.endswith(f" touch {launcher.state}/a\\ b ")
    assert scontrol == "scontrol requeue JOB "
    assert not launcher.calls("srun")


def test_bad_usage_is_one_line(launcher):
    nothing = sbatch(launcher, "--nodes=2", SCRIPT)
    assert (nothing.returncode, nothing.stderr) == (2, "usage: sbatch [--nodes=N ...] launch/slurm.sbatch COMMAND...\n")
    flag = sbatch(launcher, "--nodes=2", SCRIPT, "--nodes=2", "true")
    message = "slurm: --nodes=2 is no command: options of sbatch come before launch/slurm.sbatch\n"
    assert (flag.returncode, flag.stderr) == (2, message)
    no_job = launcher.run(SCRIPT, "true")
    assert no_job.returncode == 2
    assert no_job.stderr.startswith("slurm: this is no job: submit with sbatch ") and no_job.stderr.count("\n") == 1
    assert not launcher.calls("srun")
    elsewhere = launcher.run(ROOT / SCRIPT, "true", SLURM_SUBMIT_DIR="/usr")
    assert elsewhere.returncode == 2
    assert elsewhere.stderr == "slurm: /usr is not the repository's folder: submit from there\n"


@pytest.mark.slow
def test_two_processes_stop_at_one_step_and_go_on(launcher):
    terminate_one(launcher.state)
    command = ["--nodes=2", SCRIPT, "python", PROBE, launcher.state]
    done = sbatch(launcher, *command, job=free_slurm_job())
    assert done.returncode == 0, done.stdout + done.stderr
    check_probe(launcher.state)
    assert len(launcher.calls("scontrol")) == 1
