"""A process that works with others in steps until it is stopped, for the tests: python -m tests.parallel.peer"""

import sys
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from rlaif_jax.commands import run_command
from rlaif_jax.errors import Stopped, UserError
from rlaif_jax.models.parameters import Placement, move_parameters, parameters_hash, place_parameters
from rlaif_jax.models.transformer import LanguageModel
from rlaif_jax.parallel import processes
from rlaif_jax.parallel.mesh import AxesConfig, make_mesh, shard_rows
from tests.helpers import random_params, tiny


def work(argv: list[str]) -> int:
    """Steps that need all processes; in process `--bad` one of them fails."""
    everybody = processes.gather("x" * processes.index())
    assert everybody == ["x" * i for i in range(processes.count())]
    assert processes.agree(lambda: [processes.count(), "only the first"]) == [1, "only the first"]
    for failing in (lambda: processes.agree(fail), lambda: processes.parted([1, 2], fail_in_the_second)):
        try:
            failing()
        except UserError as error:
            assert str(error) == "of one"
        else:
            raise AssertionError("no error")
    assert processes.parted(list("abcde"), lambda letters: [letter.upper() for letter in letters]) == list("ABCDE")
    read_rows()
    move_a_judge()
    with processes.heeding_sigterm():
        step_by_step(argv)
    return 0


def step_by_step(argv: list[str]) -> None:
    """Until it is told to stop."""
    for step in range(10_000):
        multihost_utils.process_allgather(np.arange(2) + processes.index())
        print("step", step, file=sys.stderr, flush=True)
        if step == 5 and argv[1:] == [f"--bad={processes.index()}"]:
            raise UserError("a bad value")
        if processes.stop_point():
            print("stops at", step, file=sys.stderr, flush=True)
            raise Stopped
        time.sleep(0.02)


def fail(*_) -> None:
    """Whatever one process refuses, all do."""
    raise UserError("of one")


def fail_in_the_second(items: list[int]) -> list[int]:
    """As `fail`, in the process that has the second item."""
    return fail() if items == [2] else items


def read_rows() -> None:
    """Each process reads the rows that its devices hold alone, and the batch is whole."""
    mesh, read = make_mesh(AxesConfig(1, -1, 1, 1, ())), []

    def rows(numbers: list[int]) -> np.ndarray:
        read.extend(numbers)
        return np.array([[number, number**2] for number in numbers])

    batch = shard_rows([7, 5, 3, 1], rows, mesh)
    assert read == ([7, 5], [3, 1])[processes.index()]
    np.testing.assert_array_equal(processes.to_host(batch), [[7, 49], [5, 25], [3, 9], [1, 1]])


def move_a_judge() -> None:
    """A model on the devices of all processes comes whole to those of each, and has one hash everywhere."""
    everywhere = Placement(make_mesh(AxesConfig(1, -1, 1, 1, ())))
    here = Placement(make_mesh(AxesConfig(1, 2, 1, 1, ()), jax.local_devices()))
    model = LanguageModel(tiny())
    params = random_params(model)
    spread = place_parameters(model, params, everywhere)
    assert not spread["decoder"]["embedding"].is_fully_addressable
    assert parameters_hash(spread) == parameters_hash(params)
    moved = move_parameters(model, spread, here)
    assert moved["decoder"]["embedding"].is_fully_addressable and len(moved["decoder"]["embedding"].devices()) == 2
    jax.tree.map(np.testing.assert_array_equal, processes.to_host(moved), params)


if __name__ == "__main__":
    sys.exit(run_command(sys.argv, "", work))
