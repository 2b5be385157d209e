import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAND_INS = Path(__file__).parent / "stand_ins"
PROBE = Path(__file__).parent / "probe.py"


@dataclasses.dataclass(frozen=True)
class Launcher:
    """Runs launch/ with stand-ins for the tools of schedulers before everything else on PATH."""

    state: Path
    env: dict

    def run(self, *command, **variables) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", *map(str, command)],
            cwd=ROOT,
            env=self.env | {name: str(value) for name, value in variables.items()},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def calls(self, name: str) -> list[list[str]]:
        """What a tool was called with, call by call."""
        file = self.state / "calls.jsonl"
        calls = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [call[1:] for call in calls if call[0] == name]


@pytest.fixture
def launcher(tmp_path):
    path = tmp_path / "bin"
    path.mkdir()
    for script in STAND_INS.glob("*.py"):
        executable = path / script.stem
        executable.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
        executable.chmod(0o755)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "TPU", "JAX_", "CUDA"))}
    env |= {
        "PATH": f"{path}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "STAND_IN_STATE": str(tmp_path),
        "POLL": "0",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
    }
    return Launcher(tmp_path, env)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def free_slurm_job() -> int:
    """The number of a job whose coordinator's port, which follows from it, is free."""
    while True:
        with socket.socket() as listener:
            job = int.from_bytes(os.urandom(2)) % 4096
            try:
                listener.bind(("", 61440 + job))
            except OSError:
                continue
            return 4096 + job


def probe_reports(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("process*.json"))]


def terminate_one(folder: Path) -> threading.Thread:
    """Sends SIGTERM to process 1 of a probe once it is at work, as a scheduler does that wants its machine back."""

    def work():
        while not (folder / "process1.json").exists():
            time.sleep(0.05)
        os.kill(json.loads((folder / "process1.json").read_text())["pid"], signal.SIGTERM)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def check_probe(folder: Path) -> None:
    """Both processes found each other and added up, stopped at one step, and went on from it to the end."""
    first, second = probe_reports(folder)
    assert [(each["index"], each["count"], each["devices"]) for each in (first, second)] == [(0, 2, 2), (1, 2, 2)]
    assert first["sum"] == second["sum"] == 0 + 1
    assert first["began_at"] == second["began_at"] > 0
    assert (folder / "saved").read_text() == str(first["began_at"] + 3)
