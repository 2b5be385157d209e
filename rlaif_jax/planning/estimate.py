"""What a program needs of each device, and how fast the device could be at best."""

import dataclasses
import math

import jax

from rlaif_jax.planning.compile import Compiled
from rlaif_jax.planning.hlo import Module
from rlaif_jax.planning.machines import Machine, island
from rlaif_jax.planning.programs import Program
from rlaif_jax.planning.traffic import Traffic, traffic


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A program on a machine; of one call, and of one device."""

    program: Program
    arguments: int  # bytes, as are the following
    outputs: int  # that take no argument's place
    temporaries: int
    beside: int  # in memory at the same time, and not used by this program
    flops: float
    traffic: Traffic | None  # None where the compiler gave up for want of memory
    seconds: dict[str, float]  # what each of compute, memory, links and network takes; none for a CPU
    refused: str = ""  # why the compiler gave up, where it was not for want of memory

    @property
    def total(self) -> int:
        """All that has to fit into memory at a time."""
        return self.arguments + self.outputs + self.temporaries + self.beside

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=self.seconds.__getitem__) if self.seconds else ""

    @property
    def least_seconds(self) -> float:
        """The time of a call by the roofline: that of what takes longest, all else going on meanwhile."""
        return max(self.seconds.values(), default=0.0)


def estimate(program: Program, compiled: Compiled, machine: Machine) -> Estimate:
    """A program's needs from what it has been compiled to."""
    given, flops = bytes_of(program.arguments), compiled.flops / program.mesh.size
    unused = max(given - compiled.arguments, 0) if compiled.text else 0  # arguments that are not read stay in memory
    beside, shared = bytes_of(program.beside) + unused, bytes_of(program.shared)
    temporaries = compiled.total - compiled.arguments - compiled.outputs
    if not compiled.text:
        return Estimate(program, 0, 0, max(temporaries - shared, 0), beside, flops, None, {}, compiled.refused)
    islands = [island(device) for device in program.mesh.devices.flat]
    moved = traffic(Module(compiled.text), islands, program.trips)
    seconds, arguments = _seconds(flops, moved, machine), compiled.arguments - shared
    return Estimate(program, arguments, compiled.outputs, temporaries, beside, flops, moved, seconds)


def _seconds(flops: float, moved: Traffic, machine: Machine) -> dict[str, float]:
    device = machine.device
    if device is None:
        return {}
    return {
        "compute": flops / device.flops,
        "memory": moved.memory / device.memory_bandwidth,
        "links": moved.links / device.links,
        "network": moved.network / device.network,
    }


def bytes_of(tree) -> int:
    """What a tree of shapes with shardings takes of one device."""
    leaves = (x for x in jax.tree.leaves(tree) if isinstance(x, jax.ShapeDtypeStruct))
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
