"""Machines to plan for: what their devices can do, as published, and the devices themselves as the compiler knows them.

A program can be compiled for a TPU or a GPU that is not here: libtpu and the CUDA plug-in describe one.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator

import jax
from jax.experimental import topologies

from rlaif_jax.errors import UserError

# A folder of their own for them: where libtpu is installed, every program that starts JAX looks for a TPU, loudly.
_FOLDER, _REQUIREMENTS = ".plan", "requirements-plan.txt"
_ROOT = pathlib.Path(__file__).parents[2]
_GIB = 1 << 30
_TARGETS = pathlib.Path(__file__).parent / "gpu_targets"


@dataclasses.dataclass(frozen=True)
class Device:
    """What one device has and can do at most. Rates are a second's; those of links are of one direction."""

    memory: int  # bytes that programs may use
    flops: float  # of bfloat16 products
    memory_bandwidth: float  # bytes
    links: float  # bytes over all links to its neighbours together: a TPU's inter-chip links, a GPU's NVLink
    network: float  # bytes between slices of TPUs, or nodes of GPUs: the device's share of its host's network cards
    source: str


# Memory of TPUs is what the compiler says there is to have; of GPUs 92 % of what is built in, see docs/plan.md.
DEVICES = {
    "v5e": Device(int(15.75 * _GIB), 197e12, 819e9, 200e9, 3.125e9, "cloud.google.com/tpu/docs/v5e"),
    "v5p": Device(int(95.73 * _GIB), 459e12, 2765e9, 600e9, 6.25e9, "cloud.google.com/tpu/docs/v5p"),
    "v6e": Device(int(31.24 * _GIB), 918e12, 1640e9, 400e9, 12.5e9, "cloud.google.com/tpu/docs/v6e"),
    "h100": Device(int(0.92 * 80 * _GIB), 989e12, 3350e9, 450e9, 50e9, "nvidia.com: H100 SXM, DGX H100 data sheets"),
    "h200": Device(int(0.92 * 141e9), 989e12, 4800e9, 450e9, 50e9, "nvidia.com: H200 SXM, DGX H200 data sheets"),
}
_DIMENSIONS = {"v5e": 2, "v5p": 3, "v6e": 2}
_NAMES = "v5e:AxB, v5p:AxBxC, v6e:AxB (chips), gpu:h100:NODESxGPUS, gpu:h200:NODESxGPUS, cpu or cpu:N (this machine)"


@dataclasses.dataclass(frozen=True)
class Machine:
    """A machine to plan for."""

    name: str
    slices: int
    device: Device | None  # None for the CPU here, whose rates nobody publishes
    memory: int  # bytes of one device that programs may use
    open: Callable[[], list]  # its devices; takes the processes' only chance to say how many a CPU has


def find_machine(topology: str, slices: int) -> Machine:
    """The machine of a topology's name, so many slices of it.

    Raises UserError for a name or number that is none, and where what describes such a machine is not installed.
    """
    kind, _, rest = topology.partition(":")
    wrong = UserError(f"--topology={topology} is none of {_NAMES}")
    if slices < 1 or (slices > 1 and kind not in _DIMENSIONS):
        raise UserError(f"--slices={slices} must be 1 or more, and 1 for what is not a TPU")
    if kind == "cpu":
        if not re.fullmatch(r"(cpu|cpu:[1-9]\d*)", topology):
            raise wrong
        count = int(rest or 1)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // count
        return Machine(topology, 1, None, memory, lambda: _cpu_devices(count))
    if kind == "gpu":
        kind, _, rest = rest.partition(":")
        sizes = _sizes(rest)
        if kind not in ("h100", "h200") or len(sizes) != 2:
            raise wrong
        _need("jax_cuda12_plugin", topology)
        return Machine(topology, 1, DEVICES[kind], DEVICES[kind].memory, lambda: _gpu_devices(kind, sizes))
    sizes = _sizes(rest)
    if kind not in _DIMENSIONS or len(sizes) != _DIMENSIONS[kind]:
        raise wrong
    _need("libtpu", topology)
    return Machine(topology, slices, DEVICES[kind], DEVICES[kind].memory, lambda: _tpu_devices(topology, slices))


def island(device) -> int:
    """What a device's links reach: the number of its slice of TPUs, or of its node of GPUs."""
    return device.process_index if device.platform == "gpu" else getattr(device, "slice_index", None) or 0


def _sizes(text: str) -> tuple[int, ...]:
    """The numbers of "4x4x4"; none where that is not what it is like."""
    return tuple(map(int, text.split("x"))) if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text) else ()


def _need(module: str, topology: str) -> None:
    folder = str(_ROOT / _FOLDER)
    if folder not in sys.path:
        sys.path.append(folder)
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"--topology={topology} needs {module}, which is not installed: pip install --no-deps --target={_FOLDER} "
            f"-r {_REQUIREMENTS}"
        )


def _cpu_devices(count: int) -> list:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    return jax.devices()


def _tpu_devices(topology: str, slices: int) -> list:
    # No TPU is used, so that other processes may load libtpu at the same time; and nobody asks the network for one.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    several = {"num_slices": slices} if slices > 1 else {}
    return _described(topology, platform="tpu", topology_name=topology, **several)


def _gpu_devices(kind: str, sizes: tuple[int, ...]) -> list:
    nodes, gpus = sizes
    target = (_TARGETS / f"{kind}.txtpb").read_text()
    topology = f"1x{nodes}x{gpus}"
    return _described(topology, platform="cuda", topology_name=kind, target_config=target, topology=topology)


def _described(name: str, **topology) -> list:
    jax.config.update("jax_platforms", "cpu")  # the machine is described, not used
    try:
        with silent():
            return topologies.get_topology_desc(**topology).devices
    except Exception as error:  # whatever the plug-in raises for a shape that it does not know
        raise UserError(f"there is no machine of the shape {name}: {' '.join(str(error).split())[:200]}") from error


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Nothing that is written to stderr inside is seen: compilers for machines that are not here say so at length."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def devices_of(machine: Machine) -> list:
    """Its devices, as many as its name says. Raises UserError where the shape is none that is built."""
    devices = machine.open()
    numbers = _sizes(machine.name.split(":")[-1]) or (1,)
    expected = machine.slices * math.prod(numbers)
    if len(devices) != expected:
        raise UserError(f"{machine.name} has {len(devices)} devices, not {expected}")
    return devices
