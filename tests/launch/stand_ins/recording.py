"""What the stand-ins share: each writes down how it was called, and runs what its scheduler would."""

import json
import os
import subprocess
import sys
from pathlib import Path

# The folder of a test, in which stand-ins keep what they were called with and what they remember.
STATE = Path(os.environ["STAND_IN_STATE"])


def record(name: str) -> list[str]:
    """Appends this call to calls.jsonl; returns its arguments."""
    with open(STATE / "calls.jsonl", "a") as file:
        print(json.dumps([name, *sys.argv[1:]]), file=file)
    return sys.argv[1:]


def option(arguments: list[str], name: str) -> str | None:
    """The value of --name=VALUE."""
    return next((each.split("=", 1)[1] for each in arguments if each.startswith(f"--{name}=")), None)


def run_all(commands: list[tuple[list[str], dict[str, str], Path]]) -> list[int]:
    """Runs commands, each with its environment and in its folder, side by side; their exit statuses."""
    processes = [subprocess.Popen(command, env=env, cwd=cwd) for command, env, cwd in commands]
    return [process.wait() for process in processes]


def as_shell(status: int) -> int:
    """An exit status as a shell and a container runtime give it: 128 + the number of the signal that killed."""
    return 128 - status if status < 0 else status
