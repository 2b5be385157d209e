"""What a compiled program moves on each device: bytes to and from its memory, and to and from other devices."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence

from rlaif_jax.planning.hlo import Instruction, Module, element_bytes

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
         "opt-barrier", "add-dependency"}  # fmt: skip
_SLICES = {"dynamic-slice", "slice", "gather"}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes of one device. Of links and network, those that it receives if each collective is as good as can be."""

    memory: float = 0.0
    links: float = 0.0  # from devices of its own slice of TPUs or node of GPUs
    network: float = 0.0  # from others
    by_kind: tuple[tuple[str, float], ...] = ()  # links and network together, by the kind of collective

    def __add__(self, other: "Traffic") -> "Traffic":
        kinds = dict(self.by_kind)
        for kind, size in other.by_kind:
            kinds[kind] = kinds.get(kind, 0.0) + size
        return Traffic(
            self.memory + other.memory, self.links + other.links, self.network + other.network, tuple(kinds.items())
        )

    def times(self, count: float) -> "Traffic":
        """The traffic of so many passes."""
        kinds = tuple((kind, count * size) for kind, size in self.by_kind)
        return Traffic(count * self.memory, count * self.links, count * self.network, kinds)


def traffic(module: Module, islands: Sequence[int], trips: int) -> Traffic:
    """All that a program moves.

    Memory: what each instruction outside a fusion reads and writes; a slice of an array counts as its own size.
    A loop counts as often as it runs; one whose length data decides, `trips` times, and once inside such a one.

    islands: of each device, in the order of the mesh, the slice or node that it is in.
    """
    return _Counter(module, islands).of(module.entry, trips)


class _Counter:
    def __init__(self, module: Module, islands: Sequence[int]):
        self._module, self._islands = module, islands

    @functools.cache  # noqa: B019  (it lives as long as one call of `traffic`)
    def of(self, computation: str, trips: int) -> Traffic:
        """The traffic of one pass through a computation."""
        total, seen = Traffic(), set()
        for instruction in self._module.computations[computation].values():
            if instruction.opcode == "while":
                known = self._module.trips(instruction)
                for part in ("body", "condition"):
                    inner = self.of(*instruction.called(part), 1 if known is None else trips)
                    total += inner.times(trips if known is None else known)
            elif instruction.opcode == "conditional":
                branches = instruction.called("branch_computations")
                branches = branches or instruction.called("true_computation") + instruction.called("false_computation")
                total += max((self.of(name, trips) for name in branches), key=lambda x: x.memory + x.links)
            elif instruction.opcode == "call":
                total += self.of(*instruction.called("to_apply"), trips)
            else:
                total += Traffic(self._memory(computation, instruction)) + self._from_slices(instruction)
                for where, collective in self._collectives(computation, instruction):
                    # One that is begun, helped along and ended in several fusions is printed in each of them.
                    channel = collective.attribute(r"channel_id=(\d+)") or collective.name
                    if channel not in seen:
                        seen.add(channel)
                        total += self._moved(where, collective)
        return total

    def _collectives(self, computation: str, instruction: Instruction) -> Iterator[tuple[str, Instruction]]:
        """The collectives that an instruction is, or is made of, each with its computation."""
        if instruction.opcode.removesuffix("-start") in COLLECTIVES:
            yield computation, instruction
        if instruction.opcode in ("fusion", "async-start"):
            for name in instruction.called("calls"):
                for inner in self._module.computations[name].values():
                    yield from self._collectives(name, inner)

    def _from_slices(self, instruction: Instruction) -> Traffic:
        """What the runtime of several slices of TPUs brings: collectives between them are transfers of the hosts."""
        kind = instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"')
        if instruction.opcode != "recv" or kind is None:
            return Traffic()
        size, slices = element_bytes(instruction.shape)[0], len(set(self._islands))
        received = size * (2 * (slices - 1) / slices if kind == "ALL_REDUCE" else 1)
        return Traffic(network=received, by_kind=((kind.lower().replace("_", "-"), received),))

    def _moved(self, computation: str, instruction: Instruction) -> Traffic:
        """What a device receives. F being the whole of what a group of n devices gathers or reduces, in m islands of k:
        F (n - 1) / n of it in all, and F (m - 1) / m from other islands, of which each of the k takes its part.
        """
        kind = instruction.opcode.removesuffix("-start")
        shapes = (self._module.shape_of(computation, name) for name in instruction.operands)
        size = sum(sum(element_bytes(shape)) for shape in shapes)
        if kind == "collective-permute":
            pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.attribute(r"source_target_pairs=(\{.*?\}\})") or "")
            crosses = any(self._islands[int(a)] != self._islands[int(b)] for a, b in pairs)
            return Traffic(0.0, 0.0 if crosses else size, size if crosses else 0.0, ((kind, float(size)),))
        group = _largest_group(instruction.rest, len(self._islands))
        count, islands = len(group), len({self._islands[i] for i in group})
        whole = size * count if kind == "all-gather" else size
        passes = 2 if kind == "all-reduce" else 1
        received = passes * whole * (count - 1) / count
        together = 1 if kind == "all-to-all" else count // islands
        network = passes * whole * (islands - 1) / islands / together
        return Traffic(0.0, received - network, network, ((kind, received),))

    def _memory(self, computation: str, instruction: Instruction) -> float:
        """The bytes that an instruction reads and writes."""
        opcode, shapes = instruction.opcode, self._module.computations[computation]
        if opcode in _FREE or opcode.endswith("-done") or "AllocateBuffer" in instruction.rest:
            return 0.0
        written = element_bytes(instruction.shape, main_memory=True)
        read = [sum(element_bytes(shapes[name].shape, main_memory=True)) for name in instruction.operands]
        if opcode in _SLICES:
            return 2 * sum(written)
        if opcode in ("dynamic-update-slice", "scatter"):
            return 2 * read[1 if opcode == "dynamic-update-slice" else -1]
        if opcode.endswith("-start"):  # its result is a tuple that has the operands in it
            return sum(read) + max(sum(written) - sum(read), 0)
        if opcode != "fusion":
            return sum(read) + sum(written)
        (inner,) = instruction.called("calls")
        used = (min(full, part) for full, part in zip(read, self._read(inner), strict=True))
        outputs = self._written(inner)
        changed = (min(full, part) for full, part in zip(written, outputs, strict=True)) if outputs else written
        return sum(used) + sum(changed)

    @functools.cache  # noqa: B019
    def _read(self, computation: str) -> tuple[float, ...]:
        """Of each parameter of a fusion, the bytes that it needs: a slice where it takes no more."""
        instructions = self._module.computations[computation]
        parameters = [x for x in instructions.values() if x.opcode == "parameter"]
        return tuple(self._used(computation, x.name) for x in sorted(parameters, key=lambda x: int(x.rest)))

    def _used(self, computation: str, name: str) -> float:
        instructions, total = self._module.computations[computation], 0.0
        if instructions[name].root:  # who uses it is outside
            return math.inf
        for user in instructions.values():
            for position in (i for i, operand in enumerate(user.operands) if operand == name):
                if user.opcode in _SLICES and position == 0:
                    total += sum(element_bytes(user.shape))
                elif user.opcode == "dynamic-update-slice" and position == 0:
                    continue  # it stays where it is
                elif user.opcode == "bitcast":
                    total += self._used(computation, user.name)
                elif user.opcode == "fusion":
                    total += self._read(*user.called("calls"))[position]
                else:
                    return math.inf
        return total

    @functools.cache  # noqa: B019
    def _written(self, computation: str) -> tuple[float, ...]:
        """Of each output of a fusion, the bytes that it writes: those of the update where it updates in place."""
        instructions = self._module.computations[computation]
        (root,) = (x for x in instructions.values() if x.root)
        roots = [instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
        return tuple(itertools.chain.from_iterable(self._changed(computation, x) for x in roots))

    def _changed(self, computation: str, root: Instruction) -> tuple[float, ...]:
        instructions = self._module.computations[computation]
        while root.opcode in ("bitcast", "convert", "copy") and root.operands[0] in instructions:
            root = instructions[root.operands[0]]
        if root.opcode == "dynamic-update-slice":
            return (float(sum(element_bytes(instructions[root.operands[1]].shape))),)
        if root.opcode == "fusion":
            return self._written(*root.called("calls"))
        return (math.inf,) * len(element_bytes(root.shape))


def _largest_group(attributes: str, devices: int) -> list[int]:
    """The devices of a collective's first group, by their places in the mesh.

    Groups are printed in three ways: listed, as a reshaped range, and as axes of a mesh.
    """
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        return _mesh_group(found[1], found[2])
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        return _range_group(int(found[2]), found[3], found[4])
    found = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    return [int(number) for number in found[1].split(",")] if found else list(range(devices))


def _range_group(size: int, dimensions: str, order: str | None) -> list[int]:
    """The first of the groups [groups, size] that a range gives, reshaped to `dimensions` and transposed."""
    sizes = [int(x) for x in dimensions.split(",")]
    axes = [int(x) for x in order.split(",")] if order else list(range(len(sizes)))
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    places = itertools.product(*(range(sizes[axis]) for axis in axes))
    numbers = (sum(i * strides[axis] for i, axis in zip(place, axes, strict=True)) for place in places)
    return list(itertools.islice(numbers, size))


def _mesh_group(mesh: str, axes: str) -> list[int]:
    """The group of device 0 along some axes of a mesh: "'a'=2,'b'=4" and "'b'" or, for a part of one, "'b':(1)2"."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    strides, stride = {}, 1
    for name in reversed(sizes):
        strides[name] = stride
        stride *= sizes[name]
    steps = []
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        size = int(part) if part else sizes[name]
        inner = sizes[name] // (int(before) * size) if part else 1
        steps.append([i * inner * strides[name] for i in range(size)])
    return [sum(place) for place in itertools.product(*steps)]
