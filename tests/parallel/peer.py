"""A process that works with others in steps until it is stopped, for the tests: python -m tests.parallel.peer"""

import os
import sys
import time

import numpy as np
from jax.experimental import multihost_utils

from rlaif_jax.commands import run_command
from rlaif_jax.errors import Stopped, UserError
from rlaif_jax.parallel import processes
from rlaif_jax.parallel.mesh import AxesConfig, make_mesh, shard_rows


def work(argv: list[str]) -> int:
    """Steps that need all processes; in process `--bad` one of them fails."""
    everybody = processes.gather("x" * processes.index())
    assert everybody == ["x" * i for i in range(processes.count())]
    assert processes.agree(processes.index()) == 0
    assert processes.parted(list("abcde"), lambda letters: [letter.upper() for letter in letters]) == list("ABCDE")
    read_rows()
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


def read_rows() -> None:
    """Each process reads the rows that its devices hold alone, and the batch is whole."""
    mesh, read = make_mesh(AxesConfig(1, -1, 1, 1, ())), []

    def rows(numbers: list[int]) -> np.ndarray:
        read.extend(numbers)
        return np.array([[number, number**2] for number in numbers])

    batch = shard_rows([7, 5, 3, 1], rows, mesh)
    assert read == ([7, 5], [3, 1])[processes.index()]
    np.testing.assert_array_equal(processes.to_host(batch), [[7, 49], [5, 25], [3, 9], [1, 1]])


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["JAX_NUM_CPU_DEVICES"] = "2"
    sys.exit(run_command(sys.argv, "", work))
