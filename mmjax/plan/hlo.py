"""The text of compiled HLO, read: computations, instructions, shapes, loops and what they call."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

# Bytes of an element; those below one byte are packed on no machine that we plan for.
_BYTES = {
    "pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4,
    "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,<=]*)\](\{[^{}]*\})?")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_NAMES = re.compile(r"%([\w.\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")
_CALLED = re.compile(r"\b(calls|to_apply|called_computations)=\{?%?([\w.\-]+(?:, ?%[\w.\-]+)*)\}?")
_BRANCHES = re.compile(r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))")  # fmt: skip
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_PARTITIONS = re.compile(r"num_partitions=(\d+)")
_PARENTHESIS = re.compile(r"[()]")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
# Space 0 is the chip's main memory; others (VMEM, SMEM, semaphores) are on the chip itself.
_SPACE = re.compile(r"S\((\d+)\)")


@dataclass(frozen=True)
class Array:
    """An array's element type, dimensions and memory space (0: the chip's main memory)."""

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> int:
        """The size in bytes, without padding by a layout."""
        return math.prod(self.shape) * _BYTES.get(self.dtype, 1 if self.dtype[:2] == "f8" else 0)


@dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
      name, opcode: `fusion`, `convolution`, ...
      arrays: of the result; several if it is a tuple.
      operands: names, in order.
      text: what is between the parentheses, as a constant has it.
      attributes: what follows them.
      is_root: whether it is the result of its computation.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> int:
        return sum(a.bytes for a in self.arrays)

    @property
    def source(self) -> str:
        """The name of the JAX operation that it comes from, if it is known."""
        match = _OP_NAME.search(self.attributes)
        return match[1] if match else ""

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that run once when it does (not loops, conditionals or reducers)."""
        if self.opcode not in ("fusion", "call", "async-start", "custom-call"):
            return ()
        matches = (m[2] for m in _CALLED.finditer(self.attributes))
        return tuple(name.strip(" %") for names in matches for name in names.split(","))

    @property
    def branches(self) -> tuple[str, ...]:
        matches = _BRANCHES.finditer(self.attributes)
        return tuple(n.strip(" %") for m in matches for n in (m[1] or m[2]).split(","))

    def attribute(self, key: str) -> str:
        """Return the value of `key=value`, where it is one word or string; empty if it is not there."""
        match = re.search(rf"\b{key}=[%\"]?([\w.\-$]+)", self.attributes)
        return match[1] if match else ""


@dataclass(frozen=True)
class Computation:
    """Instructions in order, by name."""

    name: str
    instructions: Mapping[str, Instruction]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @cached_property
    def root(self) -> Instruction:
        return next(i for i in self if i.is_root)

    @cached_property
    def users(self) -> Mapping[str, Sequence[Instruction]]:
        """The instructions that read a result, by its name."""
        result: dict[str, list[Instruction]] = {}
        for instruction in self:
            for name in dict.fromkeys(instruction.operands):
                result.setdefault(name, []).append(instruction)
        return result

    @cached_property
    def parameters(self) -> Sequence[Instruction]:
        """The parameters in the order of their numbers."""
        return sorted((i for i in self if i.opcode == "parameter"), key=lambda i: int(i.text))


@dataclass(frozen=True)
class Module:
    """The computations of a module by name, which is its entry, and how many devices run it together."""

    computations: Mapping[str, Computation]
    entry: str
    partitions: int = 1

    def trips(self, loop: Instruction, within: Computation) -> int | None:
        """Return the number of iterations of a `while`; None if it is unknown.

        As the compiler states it, or from a condition that compares a counter with a constant: one that
        begins at a constant (0 where the text does not show it) and grows by what the body adds to it (1 where
        the text does not show that; collectives among products are in loops that the compiler unrolled by two).
        """
        stated = _TRIPS.search(loop.attributes)
        if stated:
            return int(stated[1])
        condition = self.computations[loop.attribute("condition")]
        compare, constants = self._compare(condition)
        if compare is None or len(constants) != 1:
            return None
        last = constants[0] + (compare.attribute("direction") == "LE")
        index = next(
            (i.attribute("index") for i in condition if i.opcode == "get-tuple-element"), ""
        )
        return max(0, -(-(last - self._first(loop, within, index)) // self._step(loop, index)))

    def _compare(self, condition: Computation) -> tuple[Instruction | None, list[int]]:
        """Return the comparison that a condition consists of, itself or in a fusion, and the constants there."""
        inner = [self.computations[name] for i in condition for name in i.called]
        every = [i for c in (condition, *inner) for i in c]
        compares = [i for i in every if i.opcode == "compare"]
        constants = [int(i.text) for i in every if i.opcode == "constant" and i.text.isdecimal()]
        if len(compares) != 1 or compares[0].attribute("direction") not in ("LT", "LE"):
            return None, constants
        return compares[0], constants

    def _step(self, loop: Instruction, index: str) -> int:
        body = self.computations[loop.attribute("body")]
        if body.root.opcode != "tuple" or not index.isdecimal():
            return 1
        value, total = body.instructions.get(body.root.operands[int(index)]), 0
        while value is not None and value.opcode in ("add", "copy", "bitcast"):
            read = [body.instructions[name] for name in value.operands]
            added = [int(i.text) for i in read if i.opcode == "constant" and i.text.isdecimal()]
            total += sum(added)
            value = next((i for i in read if i.opcode != "constant"), None)
        return max(total, 1)

    def _first(self, loop: Instruction, within: Computation, index: str) -> int:
        start = within.instructions.get(loop.operands[0]) if loop.operands else None
        if start is None or start.opcode != "tuple" or not index.isdecimal():
            return 0
        value = within.instructions.get(start.operands[int(index)])
        while value is not None and value.opcode in ("copy", "bitcast"):
            value = within.instructions.get(value.operands[0])
        is_known = value is not None and value.opcode == "constant" and value.text.isdecimal()
        return int(value.text) if value is not None and is_known else 0


def parse(text: str) -> Module:
    """Read the text that `compiled.as_text()` gives."""
    computations: dict[str, Computation] = {}
    entry, name, instructions = "", "", dict[str, Instruction]()
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            name, instructions = head[2], {}
            computations[name] = Computation(name, instructions)
            entry = name if head[1] else entry
        elif match := _LINE.match(line):
            instructions[match[2]] = _instruction(
                match[2], _COMMENT.sub("", match[3]), bool(match[1])
            )
    partitions = _PARTITIONS.search(text[: text.find("\n")])
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    start = text.index("(", end)
    close = _closing(text, start)
    inside = text[start + 1 : close]
    opcode = text[end:start].strip()
    operands = () if opcode in ("constant", "parameter") else tuple(_NAMES.findall(inside))
    return Instruction(
        name, opcode, arrays_of(text[:end]), operands, inside, text[close + 1 :], is_root
    )


def arrays_of(text: str) -> tuple[Array, ...]:
    """Return the arrays that a shape, or a tuple of them, names."""
    arrays = []
    for dtype, dims, layout in _SHAPE.findall(text):
        shape = tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)
        space = _SPACE.search(layout)
        arrays.append(Array(dtype, shape, int(space[1]) if space else 0))
    return tuple(arrays)


def _closing(text: str, start: int) -> int:
    """Return the place of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in _PARENTHESIS.finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"no closing parenthesis in {text[start : start + 80]!r}")
