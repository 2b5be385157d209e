"""A process that works with others in steps until it is stopped, for the tests: python -m tests.parallel.peer"""

import os
import sys
import time

import numpy as np
from jax.experimental import multihost_utils

from rlaif_jax.commands import run_command
from rlaif_jax.errors import Stopped, UserError
from rlaif_jax.parallel import processes


def work(argv: list[str]) -> int:
    """Steps that need all processes; in process `--bad` one of them fails."""
    everybody = processes.gather("x" * processes.index())
    assert everybody == ["x" * i for i in range(processes.count())]
    assert processes.agree(processes.index()) == 0
    assert processes.parted(list("abcde"), lambda letters: [letter.upper() for letter in letters]) == list("ABCDE")
    for step in range(10_000):
        multihost_utils.process_allgather(np.arange(2) + processes.index())
        print("step", step, file=sys.stderr, flush=True)
        if step == 5 and argv[1:] == [f"--bad={processes.index()}"]:
            raise UserError("a bad value")
        if processes.stop_point():
            print("stops at", step, file=sys.stderr, flush=True)
            raise Stopped
        time.sleep(0.02)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(run_command(sys.argv, "", work))
