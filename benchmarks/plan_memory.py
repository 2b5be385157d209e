"""What `python -m rlaif_jax.plan` says of a training step's memory, against what the step takes.

    python benchmarks/plan_memory.py
    python benchmarks/plan_memory.py --config=configs/smollm2.py --program=rl/update --config.rl.batch_size=16

The step runs on this machine: on an accelerator its peak is what the device says; on a CPU it is by how much the
process grows, from before the step's arguments are made. Steps with little to do are lost in that: take 2 GiB or more.
"""

import ctypes
import gc
import json
import multiprocessing
import pathlib
import re
import sys
import tempfile

import harness  # noqa: F401  (finds the package)
import jax
import jax.numpy as jnp
from absl import flags
from etils import epath

from rlaif_jax.commands import parse_flags
from rlaif_jax.config import Config, parse
from rlaif_jax.planning.compile import compile_apart
from rlaif_jax.planning.estimate import estimate
from rlaif_jax.planning.machines import devices_of, find_machine
from rlaif_jax.planning.programs import Program, programs_of
from rlaif_jax.stages.run import open_run

_SMALL = ["--config.sft.batch_size=4", "--config.mesh.fsdp=1"]


def main() -> None:
    """Prints the JSON line."""
    values = flags.FlagValues()
    flags.DEFINE_string("program", "sft/step", "", flag_values=values)
    flags.DEFINE_string("topology", "cpu", "what describes this machine", flag_values=values)
    arguments = sys.argv if len(sys.argv) > 1 else [*sys.argv, *_SMALL]
    options = parse_flags(arguments, __doc__, values, default_config="configs/smollm2.py")
    config = parse(options.config.to_dict())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        measured, how = pool.apply(_measured, (config, options.program, options.topology))
    machine = find_machine(options.topology, 1)
    run = open_run(config, epath.Path("."), devices_of(machine))
    with tempfile.TemporaryDirectory() as folder:
        compiled = compile_apart(config, options.topology, 1, options.program, {}, pathlib.Path(folder))
    planned = estimate(_program(run, options.program), compiled, machine)
    ours = planned.total - planned.beside
    line = {"task": f"memory of {options.program}, planned and {how}", "unit": "MiB", "ours": ours / 2**20}
    print(json.dumps(line | {"peer": measured / 2**20, "ratio": ours / measured}), flush=True)


def _program(run, title: str) -> Program:
    return next(program for program in programs_of(run, title.split("/")[:1]) if program.title == title)


def _measured(config: Config, title: str, topology: str) -> tuple[int, str]:
    """The peak of a step on this machine, in bytes, and where that is from."""
    devices = devices_of(find_machine(topology, 1)) if topology.startswith("cpu") else jax.devices()
    program = _program(open_run(config, epath.Path("."), devices), title)
    with jax.set_mesh(program.mesh):
        step = program.function.trace(*program.arguments, **program.keywords).lower().compile()
        gc.collect()
        if devices[0].platform == "cpu":
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the compiler has given back is not taken for new memory
            pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak so far
        before = _resident("VmRSS")
        jax.block_until_ready(step(*_arguments(program)))
    if stats := devices[0].memory_stats():
        return stats["peak_bytes_in_use"], "as the device says"
    return _resident("VmHWM") - before, "by the growth of the process"


def _arguments(program: Program):
    """Arrays of ones where the program takes shapes."""

    def ones(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return jnp.ones(x.shape, x.dtype)

    shardings = jax.tree.map(lambda x: x.sharding, program.arguments)
    return jax.jit(lambda: jax.tree.map(ones, program.arguments), out_shardings=shardings)()


def _resident(field: str) -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status)[1])


if __name__ == "__main__":
    main()
