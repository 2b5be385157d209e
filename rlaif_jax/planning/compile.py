"""Compiles a program as far as it has to be to know what it needs: its memory is assigned, no machine code is written.

Writing that is most of a compiler's work (minutes for a program on TPUs) and tells nothing more. No option stops a
compiler before, so a process of its own compiles, the compiler writes down what it has found, and then we end it.
"""

import dataclasses
import json
import multiprocessing
import pathlib
import re
import time
import warnings
from collections.abc import Mapping

import jax
from etils import epath

from rlaif_jax.config import Config
from rlaif_jax.errors import UserError
from rlaif_jax.planning.flops import product_flops
from rlaif_jax.planning.machines import devices_of, find_machine, silent
from rlaif_jax.planning.programs import Program, programs_of
from rlaif_jax.stages.run import open_run

_POLL = 0.2  # seconds
_SETTLE = 2  # seconds; what a compiler refuses after it has assigned memory, it refuses soon
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What is known of a compiled program."""

    flops: int  # of all devices together
    text: str  # the optimised program; "" where the compiler gave up for want of memory
    arguments: int  # bytes of each device, as are the following
    outputs: int  # that take no argument's place
    total: int  # with temporaries; where the compiler gave up, what it says that it lacked
    refused: str = ""  # why it gave up for another reason than want of memory


def compile_apart(
    config: Config, topology: str, slices: int, title: str, options: Mapping[str, str], folder: pathlib.Path
) -> Compiled:
    """Compiles a program of a run for a machine, in a process of its own; `folder` is empty and left full.

    options: of the compiler, by name.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_compile, args=(config, topology, slices, title, options, str(folder)))
    process.start()
    while process.is_alive() and not _written(folder):
        time.sleep(_POLL)
    process.kill()
    process.join()
    return read(folder)


def _compile(config: Config, topology: str, slices: int, title: str, options: Mapping[str, str], folder: str) -> None:
    warnings.simplefilter("ignore")
    with silent():
        run = open_run(config, epath.Path("."), devices_of(find_machine(topology, slices)))
        programs = programs_of(run, title.split("/")[:1])
        write_down(next(program for program in programs if program.title == title), pathlib.Path(folder), options)


def write_down(program: Program, folder: pathlib.Path, options: Mapping[str, str] | None = None) -> None:
    """Compiles a program; what the compiler finds goes to `folder`."""
    with jax.set_mesh(program.mesh):
        traced = program.function.trace(*program.arguments, **program.keywords)
        (folder / "flops.json").write_text(json.dumps(product_flops(traced.jaxpr, program.trips)))
        written = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
        try:
            traced.lower().compile(compiler_options=dict(options or {}) | written)
        except Exception as error:
            (folder / "error.txt").write_text(f"{type(error).__name__}: {error}")


def _written(folder: pathlib.Path) -> bool:
    """Whether all that `read` needs is there, and whole."""
    files = [next(folder.glob(pattern), None) for pattern in _FILES.values()]
    if None in files:
        return False
    sizes = [file.stat().st_size for file in files]
    time.sleep(_SETTLE)
    return all(sizes) and sizes == [file.stat().st_size for file in files]


_FILES = {
    "text": "*after_optimizations.txt",
    "allocations": "*after_optimizations-buffer-assignment.txt",
    "memory": "*after_optimizations-memory-usage-report.txt",
}


def read(folder: pathlib.Path) -> Compiled:
    """What `write_down` has written. Raises UserError where it never came to compile."""
    error, counted = folder / "error.txt", folder / "flops.json"
    if not counted.exists():
        raise UserError("the process that compiles has ended without a word: is there too little memory here?")
    flops, files = json.loads(counted.read_text()), [next(folder.glob(pattern), None) for pattern in _FILES.values()]
    if error.exists() or None in files:
        return _given_up(flops, error.read_text() if error.exists() else "the compiler has crashed")
    text, allocations, memory = (file.read_text() for file in files)
    sizes = re.findall(r"^allocation \d+: size (\d+),(.*)$", allocations, re.MULTILINE)
    arguments = sum(int(size) for size, rest in sizes if " parameter " in rest)
    outputs = sum(int(size) for size, rest in sizes if "maybe-live-out" in rest and " parameter " not in rest)
    return Compiled(flops, text, arguments, outputs, int(re.search(r"Total bytes: (\d+)", memory)[1]))


def _given_up(flops: int, message: str) -> Compiled:
    """With the bytes that the program would have needed, where they are why, as the compiler says them."""
    found = re.search(r"(?:memory required.*?\(|Used )([\d.]+)([KMGT])", message)
    if "RESOURCE_EXHAUSTED" in message and found:
        return Compiled(flops, "", 0, 0, int(float(found[1]) * _UNITS[found[2]]))
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    causes = [line for line in lines if re.match(r"\w*Error: ", line)]  # of an error in the middle of a traceback
    return Compiled(flops, "", 0, 0, 0, refused=(causes or lines)[-1 if causes else 0][:300])
