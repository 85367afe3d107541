"""Cost of a compiled program on one device: FLOPs, bytes of main memory, bytes over the wires.

Unlike XLA's own count, loops count as often as they run. All of it is read from the compiled text:

- FLOPs of dot products and convolutions, rematerialisation and all (TPUs do every product as a
  convolution), as `mmjax.analysis.flops` counts them in the jaxpr;
- bytes between main memory and the chip: operands and results of every instruction outside of fusions,
  without what stays in on-chip memory; a slice of a stacked array counts as the slice;
- bytes that a device sends in collectives, by kind, mesh axes and wire. N devices in a ring, of S
  bytes: an all-gather S(N-1)/N of its result, a reduce-scatter of its operand, an all-reduce twice
  that, an all-to-all S(N-1)/N, a permute S.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from mmjax.analysis.flops import meeting
from mmjax.plan.groups import Layout, groups_of
from mmjax.plan.hlo import Array, Computation, Instruction, Module

ICI, DCN = "ici", "dcn"
KINDS = frozenset(
    "all-gather all-reduce reduce-scatter all-to-all ragged-all-to-all collective-permute".split()
)
# They move nothing through main memory, or what they do is counted inside them.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all iota partition-id replica-id while call"
    " conditional async-start async-update async-done opt-barrier send send-done recv recv-done".split()
)
_SLICING = ("dynamic-slice", "slice", "gather")
# For a dot, and for the library call that takes its place on GPUs.
_CONTRACTED = re.compile(
    r"lhs_contracting_dims=\{([\d,]*)\}|\"lhs_contracting_dimensions\":\[([\d,\"]*)\]"
)
_BLAS = "__cublas"
_KERNELS = ("tpu_custom_call", "__cudnn", "mosaic_gpu", "triton_kernel_call", "__triton")
_STATED = re.compile(r'"cost_estimate":\{[^{}]*"flops":"?(\d+)')
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_ASYNC_STEP = re.compile(r'"async_collective_fusion_config":\{"flag_start":"(-?\d+)"')
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


@dataclass
class Cost:
    """The cost of one call of a program on one device.

    Attributes:
      products: FLOPs by the name of the JAX operation that they come from.
      memory: bytes to and from main memory.
      wires: (wire, kind, axes) -> bytes that the device sends.
      seconds: sum over instructions of the longer of their FLOPs and their bytes at given rates.
      unknown: loops whose number of turns could not be read (they count once), and kernels without FLOPs.
    """

    products: Counter[str] = field(default_factory=Counter)
    memory: int = 0
    wires: dict[tuple[str, str, str], float] = field(default_factory=lambda: defaultdict(float))
    seconds: float = 0.0
    unknown: set[str] = field(default_factory=set)

    @property
    def flops(self) -> int:
        return self.products.total()

    def sent(self, wire: str) -> float:
        """Return the bytes that the device sends over one kind of wire."""
        return sum(n for (w, _, _), n in self.wires.items() if w == wire)

    def add(self, other: Cost) -> None:
        self.products += other.products
        self.memory += other.memory
        self.seconds += other.seconds
        self.unknown |= other.unknown
        for key, n in other.wires.items():
            self.wires[key] += n


def cost(module: Module, layout: Layout, flop_rate: float, byte_rate: float) -> Cost:
    """Read the cost of a module's entry.

    Args:
      flop_rate, byte_rate: FLOP/s, and bytes a second of main memory, for `Cost.seconds`.
    """
    reader = _Reader(module, layout, lambda f, b: max(f / flop_rate, b / byte_rate))
    reader.computation(module.computations[module.entry], 1)
    return reader.cost


class _Reader:
    def __init__(self, module: Module, layout: Layout, seconds: Callable[[int, int], float]):
        self.module, self.layout, self.cost = module, layout, Cost()
        self._seconds = seconds

    def computation(self, where: Computation, times: int) -> None:
        """Add everything that runs when a computation outside of fusions runs `times` times."""
        for instruction in where:
            if instruction.opcode == "while":
                self._loop(instruction, where, times)
            elif instruction.opcode == "conditional":
                self._conditional(instruction, times)
            elif instruction.opcode in ("call", "async-start"):
                for name in instruction.called:
                    self.computation(self.module.computations[name], times)
            else:
                self._instruction(instruction, where, times)

    def _loop(self, instruction: Instruction, where: Computation, times: int) -> None:
        trips = self.module.trips(instruction, where)
        if trips is None:
            self.cost.unknown.add(f"loop {instruction.source or instruction.name}")
        body = self.module.computations[instruction.attribute("body")]
        self.computation(body, times * (1 if trips is None else trips))

    def _conditional(self, instruction: Instruction, times: int) -> None:
        """Add the branch that takes longest."""
        costs = []
        for name in instruction.branches:
            reader = _Reader(self.module, self.layout, self._seconds)
            reader.computation(self.module.computations[name], times)
            costs.append(reader.cost)
        if costs:
            self.cost.add(max(costs, key=lambda c: (c.seconds, c.sent(DCN), c.sent(ICI))))

    def _instruction(self, outer: Instruction, where: Computation, times: int) -> None:
        flops = 0
        for instruction, inside in self._within(outer, where):
            n = _product(instruction, inside) or _product_of_kernel(instruction)
            if n:
                self.cost.products[instruction.source or instruction.name] += n * times
            flops += n
            self._collective(instruction, inside, times)
            self._opaque(instruction)
        moved = 0 if outer.opcode in _FREE else self._moved(outer, where)
        self.cost.memory += moved * times
        self.cost.seconds += self._seconds(flops, moved) * times

    def _within(
        self, instruction: Instruction, where: Computation
    ) -> Iterator[tuple[Instruction, Computation]]:
        """Yield an instruction, and those in the fusions that it is."""
        yield instruction, where
        for name in instruction.called:
            inner = self.module.computations[name]
            for inside in inner:
                yield from self._within(inside, inner)

    def _opaque(self, instruction: Instruction) -> None:
        """Note a kernel whose inside the text does not show."""
        target = instruction.attribute("custom_call_target")
        is_kernel = target.startswith(_KERNELS) or instruction.opcode == "ragged-dot"
        if is_kernel and not _product_of_kernel(instruction):
            self.cost.unknown.add(f"kernel {instruction.source or instruction.name}")

    # --- main memory ---------------------------------------------------------------------------

    def _moved(self, instruction: Instruction, where: Computation) -> int:
        """Return the bytes that an instruction reads from main memory and writes there."""
        inner = (
            self.module.computations[instruction.called[0]]
            if instruction.opcode == "fusion"
            else None
        )
        if inner is None:
            read = [where.instructions.get(name) for name in instruction.operands]
            if instruction.opcode in _SLICING:
                return 2 * _main(instruction.arrays)
            if instruction.opcode == "dynamic-update-slice":
                return 2 * (_main(read[1].arrays) if read[1] else 0)
            return sum(_main(i.arrays) for i in read if i) + _main(instruction.arrays)
        total = self._written(instruction, inner)
        for name, parameter in zip(instruction.operands, inner.parameters, strict=False):
            operand = where.instructions.get(name)
            if operand is not None and _main(operand.arrays):
                total += min(_main(operand.arrays), _used(parameter, inner))
        return total

    def _written(self, instruction: Instruction, inner: Computation) -> int:
        """Return the bytes of a fusion's results; of one that is an update in place, the update."""
        root = inner.root
        if root.opcode == "dynamic-update-slice":
            update = inner.instructions[root.operands[1]]
            return min(_main(instruction.arrays), sum(a.bytes for a in update.arrays))
        return _main(instruction.arrays)

    # --- wires ---------------------------------------------------------------------------------

    def _collective(self, instruction: Instruction, where: Computation, times: int) -> None:
        kind = instruction.opcode.removesuffix("-start")
        if instruction.opcode == "send":
            self._megascale(instruction, where, times)
        # Pieces of one collective are fused into what runs meanwhile: its first counts.
        step = _ASYNC_STEP.search(instruction.attributes)
        if kind not in KINDS or step and int(step[1]) >= 0:
            return
        if kind == "all-reduce" and where.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        groups = groups_of(instruction.attributes, self.module.partitions)
        if self.module.partitions < self.layout.size:  # of several slices each has this program
            groups = self.layout.across[:, 0][groups]
        wire = DCN if self.layout.crosses(groups) else ICI
        size = _payload(instruction, where, kind)
        sent = size if kind == "collective-permute" else size * (1 - 1 / groups.shape[1])
        sent *= 2 if kind == "all-reduce" else 1
        self.cost.wires[wire, kind, self.layout.along(groups)] += sent * times

    def _megascale(self, instruction: Instruction, where: Computation, times: int) -> None:
        """Add a transfer between slices, which the runtime does from the host."""
        transfer = _TRANSFER.search(instruction.attributes)
        if not transfer:
            return
        kind = transfer[1].lower().replace("_", "-").replace("one-to-one", "collective-permute")
        operand = where.instructions[instruction.operands[0]]
        slices = self.layout.across.shape[1]
        # Each device meets those that have its place in the other slices, and sends to all of them.
        shares = {
            "all-reduce": 2 - 2 / slices,
            "all-gather": slices - 1,
            "all-to-all": 1 - 1 / slices,
        }
        axes = self.layout.along(self.layout.across)
        self.cost.wires[DCN, kind, axes] += operand.bytes * shares.get(kind, 1.0) * times


def _main(arrays: Sequence[Array]) -> int:
    """Return the bytes of the arrays that lie in main memory."""
    return sum(a.bytes for a in arrays if a.space == 0)


def _used(parameter: Instruction, inner: Computation) -> int:
    """Return the bytes of a fusion's operand that it reads: the slices, if all it does is take slices of it."""
    users = inner.users.get(parameter.name, ())
    total = 0
    for user in users:
        if user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
            continue  # written in place
        if user.opcode in ("bitcast", "copy"):
            total += _used(user, inner)
        else:
            total += user.bytes if user.opcode in _SLICING else parameter.bytes
    return min(total, parameter.bytes) if users else 0


def _payload(instruction: Instruction, where: Computation, kind: str) -> int:
    """Return the bytes of a collective's larger side: what all-gather makes, what the others are given."""
    operands = sum(
        where.instructions[n].bytes for n in instruction.operands if n in where.instructions
    )
    if kind == "all-gather":
        # The start of an asynchronous one has its operands among its results.
        return (
            instruction.bytes - operands
            if instruction.opcode.endswith("-start")
            else instruction.bytes
        )
    return operands


def _product_of_kernel(instruction: Instruction) -> int:
    """Return the FLOPs that a custom kernel states of itself; 0 if it states none."""
    match = _STATED.search(instruction.attributes) if instruction.opcode == "custom-call" else None
    return int(match[1]) if match else 0


def _product(instruction: Instruction, where: Computation) -> int:
    """Return the FLOPs of a dot product or convolution; 0 for all else."""
    is_blas = instruction.attribute("custom_call_target").startswith(_BLAS)
    if instruction.opcode not in ("dot", "convolution") and not is_blas:
        return 0
    lhs, rhs = (where.instructions[name].arrays[0] for name in instruction.operands[:2])
    out = instruction.arrays[0]
    complex_ = 4 if out.dtype.startswith("c") else 1
    if instruction.opcode == "dot" or is_blas:
        match = _CONTRACTED.search(instruction.attributes)
        dims = [int(n) for n in re.findall(r"\d+", match[1] or match[2])] if match else []
        return 2 * complex_ * math.prod(out.shape) * math.prod(lhs.shape[d] for d in dims)
    return 2 * complex_ * _pairs(instruction, lhs, rhs, out)


def _pairs(instruction: Instruction, lhs: Array, rhs: Array, out: Array) -> int:
    """Return the multiplications of a convolution: those with padding and with holes do not count."""
    labels = _LABELS.search(instruction.attributes)
    if labels is None:
        raise ValueError(f"a convolution without dim_labels: {instruction.name}")
    of_lhs, of_rhs, of_out = labels.groups()
    window = _window(instruction.attributes)
    pairs = 1
    for d in range(len(of_out) - 2):
        low, _, holes, stride, spread = window[d]
        pairs *= meeting(
            outputs=out.shape[of_out.index(str(d))],
            taps=rhs.shape[of_rhs.index(str(d))],
            size=lhs.shape[of_lhs.index(str(d))],
            stride=stride,
            low=low,
            holes=holes,
            spread=spread,
        )
    others = out.shape[of_out.index("b")] * out.shape[of_out.index("f")]
    return others * rhs.shape[of_rhs.index("i")] * pairs


def _window(attributes: str) -> list[tuple[int, int, int, int, int]]:
    """Return (low padding, high padding, lhs dilation, stride, rhs dilation) of each dimension."""
    match = _WINDOW.search(attributes)
    fields = dict(part.split("=") for part in match[1].split()) if match else {}
    count = len(fields.get("size", "").split("x")) if "size" in fields else 0

    def per_dimension(name: str) -> list[int]:
        return [int(n) for n in fields[name].split("x")] if name in fields else [1] * count

    pads = fields["pad"].split("x") if "pad" in fields else ["0_0"] * count
    low, high = zip(*(map(int, p.split("_")) for p in pads), strict=True) if pads else ((), ())
    return list(
        zip(
            low,
            high,
            per_dimension("lhs_dilate"),
            per_dimension("stride"),
            per_dimension("rhs_dilate"),
            strict=True,
        )
    )
