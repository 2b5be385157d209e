"""The text of a compiled program as instructions: what each reads, what it writes, and how often its loops run."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BYTES = {"pred": 1, "token": 0, "opaque": 0, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16}  # the others say their bits
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_NAME = re.compile(r"%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str  # as printed: of an array, or of a tuple of them
    opcode: str
    operands: tuple[str, ...]
    rest: str  # the attributes; of a parameter its number
    root: bool

    def called(self, attribute: str) -> list[str]:
        """The computations that an attribute names: one, or those of `branch_computations`."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.rest)
        return _NAME.findall(found[1]) if found else []

    def attribute(self, pattern: str) -> str | None:
        """What the first group of a pattern matches in the attributes."""
        found = re.search(pattern, self.rest)
        return found[1] if found else None


class Module:
    """A compiled program."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current = None
        for line in text.splitlines():
            if line.startswith((" ", "\t")):
                if current is not None and (instruction := _instruction(line)):
                    current[instruction.name] = instruction
            elif line.rstrip().endswith("{") and (head := _HEAD.match(line.rstrip())):
                current = self.computations.setdefault(head[2], {})
                self.entry = head[2] if head[1] else self.entry
            elif line == "}":  # other lines without indentation go on with what a kernel says of itself
                current = None

    def trips(self, loop: Instruction) -> int | None:
        """How often a `while` runs: what the compiler found, or the constant that its condition counts up to.

        None where the data decide.
        """
        if known := loop.attribute(r'known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        (condition,) = loop.called("condition")
        instructions = self.computations[condition]
        (root,) = (x for x in instructions.values() if x.root)
        while root.opcode == "fusion":  # a comparison by itself
            (inner,) = root.called("calls")
            given, instructions = [instructions[name] for name in root.operands], self.computations[inner]
            (root,) = (x for x in instructions.values() if x.root)
            instructions = {
                name: given[int(x.rest)] if x.opcode == "parameter" else x for name, x in instructions.items()
            }
        if root.opcode != "compare" or "direction=LT" not in root.rest:
            return None
        bound = instructions[root.operands[1]]
        return int(bound.rest) if bound.opcode == "constant" and bound.rest.isdigit() else None

    def shape_of(self, computation: str, name: str) -> str:
        """The shape of an operand."""
        return self.computations[computation][name].shape


def _instruction(line: str) -> Instruction | None:
    text = re.sub(r"/\*.*?\*/", "", line.strip())
    root, text = text.startswith("ROOT "), text.removeprefix("ROOT ")
    name, equals, text = text.partition(" = ")
    if not equals:
        return None
    end = _closing(text) + 1 if text.startswith("(") else text.index(" ")
    shape, text = text[:end], text[end:].strip()
    opcode, _, _ = text.partition("(")
    end = _closing(text[len(opcode) :]) + len(opcode)
    inside, rest = text[len(opcode) + 1 : end], text[end + 1 :].lstrip(", ")
    if opcode in ("parameter", "constant"):
        return Instruction(name.lstrip("%"), shape, opcode, (), inside, root)
    # Operands may be printed with their shapes before them.
    operands = tuple(part.split()[-1].lstrip("%") for part in _split(inside) if part.strip())
    return Instruction(name.lstrip("%"), shape, opcode, operands, rest, root)


def _closing(text: str) -> int:
    """Where the parenthesis at the start of a text is closed."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character in "({[") - (character in ")}]")
        if not depth:
            return i
    raise ValueError(f"an HLO line without its end: {text[:80]}")


def _split(text: str) -> Iterator[str]:
    """The parts between commas that stand in no brackets."""
    depth, start = 0, 0
    for i, character in enumerate(text):
        depth += (character in "({[") - (character in ")}]")
        if character == "," and not depth:
            yield text[start:i]
            start = i + 1
    yield text[start:]


@functools.lru_cache(maxsize=1 << 16)
def element_bytes(shape: str, main_memory: bool = False) -> tuple[int, ...]:
    """The bytes of each array of a shape; with `main_memory`, 0 for those that a TPU keeps in its on-chip memory."""
    sizes = []
    for dtype, dimensions, layout in _ARRAY.findall(shape):
        bits = re.search(r"\d+", dtype)
        width = _BYTES.get(dtype) or (int(bits[0]) / 8 if bits else 0)
        count = math.prod(int(size.lstrip("<=")) for size in dimensions.split(",") if size)
        on_chip = main_memory and re.search(r"S\([1-9]", layout)
        sizes.append(0 if on_chip else math.ceil(width * count))
    return tuple(sizes)
