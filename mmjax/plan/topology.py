"""Machines that a plan can be made for: `v5e:16x16`, two slices of it, `h100:4x8`.

Reading a name needs no compiler; `describe` loads it, and is called in a process that may be lost.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mmjax.core.errors import UserError, nearest

_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SOLID = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16",
)  # fmt: skip
_NODES = ("1x8", "2x8", "4x8", "8x8", "16x8", "32x8", "64x8", "128x8")
TPUS = {"v4": _SOLID, "v5e": _FLAT, "v5p": _SOLID, "v6e": _FLAT, "tpu7x": _SOLID}
GPUS = ("a100", "h100", "h200", "b200")
_MOST = {"v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256, "tpu7x": 9216}
_FORMS = (
    "Forms: v5e:AxB and v6e:AxB (2x2 to 16x16), v4:AxBxC, v5p:AxBxC and tpu7x:AxBxC (2x2x1 to 16x16x16), "
    "a100:NxG, h100:NxG, h200:NxG and b200:NxG (N nodes of G GPUs)."
)
# How the cloud names the same: v5litepod-256 counts chips, v4-512 and v5p-512 count cores, two a chip.
_CLOUD = re.compile(r"(v4|v5p|v5e|v5litepod|v6e|tpu7x)-(\d+)")
_MISSING = (
    "The plan for {name} needs the compiler of {what}, which is not installed. "
    "Install it: pip install 'mmjax[{extra}]'"
)


@dataclass(frozen=True)
class Topology:
    """Chips of one kind and how they are joined.

    Attributes:
      kind: `v5e`, `h100`, ...
      shape: chips of a slice along each dimension; of GPUs, nodes and GPUs of a node.
      slices: slices of that shape, joined by the data centre's network.
    """

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def label(self) -> str:
        """The name, followed by the number of slices if there are several."""
        return self.name if self.slices == 1 else f"{self.slices} x {self.name}"

    @property
    def wrap(self) -> tuple[bool, bool, bool]:
        """The sides of a slice that close to a ring: of whole cubes of 4 all; of v5e and v6e those of 16.

        The compiler cannot infer it from the name, and without rings makes all-reduces of all-gathers, which send twice
        as much.
        """
        if len(self.shape) == 3:
            return (all(n % 4 == 0 for n in self.shape),) * 3
        return (self.shape[0] == 16, self.shape[1] == 16, False)

    @property
    def is_gpu(self) -> bool:
        return self.kind in GPUS

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices


def read_topology(text: str, slices: int = 1) -> Topology:
    """Return the topology that a name means.

    Raises:
      UserError: there is none of this name; it names the nearest, and the forms.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", text)
    if not match or match[1] not in (*TPUS, *GPUS):
        raise UserError(f"--topology={text}: unknown.{_nearest(text)} {_FORMS}")
    result = Topology(match[1], tuple(map(int, match[2].split("x"))), slices)
    wrong = _wrong(result)
    if wrong:
        raise UserError(f"--topology={text}: {wrong}{_nearest(text)} {_FORMS}")
    return result


def _wrong(topology: Topology) -> str:
    """Return what is wrong with a topology's numbers; empty if nothing is."""
    if topology.slices < 1:
        return f"{topology.slices} slices; there is at least 1."
    if topology.is_gpu:
        if topology.slices > 1:
            return "GPU nodes have no slices; raise the number of nodes."
        is_good = (
            len(topology.shape) == 2 and topology.shape[0] >= 1 and 1 <= topology.shape[1] <= 8
        )
        return "" if is_good else "a node has 1 to 8 GPUs."
    dimensions = len(TPUS[topology.kind][0].split("x"))
    if len(topology.shape) != dimensions:
        return f"{topology.kind} has {dimensions} dimensions."
    if 0 in topology.shape or topology.shape[0] % 2 or topology.shape[1] % 2:
        return "a host has 2x2 chips, so the first two sides are even."
    if math.prod(topology.shape) > _MOST[topology.kind]:
        return f"a slice of {topology.kind} has at most {_MOST[topology.kind]} chips; use --slices."
    return ""


def _nearest(text: str) -> str:
    cloud = _CLOUD.fullmatch(text)
    if cloud:
        kind = cloud[1].replace("v5litepod", "v5e")
        chips = int(cloud[2]) // (2 if kind in ("v4", "v5p") else 1)
        same = (s for s in TPUS[kind] if math.prod(map(int, s.split("x"))) == chips)
        if shape := next(same, None):
            return f" Did you mean '{kind}:{shape}'?"
    close = nearest(text, _known())
    return close if "mean" in close else ""


def _known() -> Iterator[str]:
    for kind, shapes in TPUS.items():
        yield from (f"{kind}:{shape}" for shape in shapes)
    for kind in GPUS:
        yield from (f"{kind}:{shape}" for shape in _NODES)


def require_compiler(topology: Topology) -> None:
    """Raise unless the compiler for a topology is installed; it is not loaded."""
    module, what, extra = (
        ("jax_plugins.xla_cuda12", "CUDA GPUs", "gpu-plan")
        if topology.is_gpu
        else ("libtpu", "TPUs", "tpu")
    )
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        raise UserError(_MISSING.format(name=topology.name, what=what, extra=extra))


def environment() -> dict[str, str]:
    """Return the environment of a process that compiles for machines which are not there."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        # Its executables cannot be read back; reports are cached instead.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        # Without these, libtpu looks for the host that it runs on and complains.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }


def describe(topology: Topology) -> Sequence[Any]:
    """Return the devices of a topology, slice by slice (node by node); this loads the compiler."""
    from jax.experimental import topologies

    if topology.is_gpu:
        from mmjax.plan.gpus import target

        nodes, gpus = topology.shape
        description = topologies.get_topology_desc(
            topology.kind, "cuda", target_config=target(topology.kind), topology=f"1x{nodes}x{gpus}"
        )
        return list(description.devices)
    options: dict[str, Any] = {"wrap": topology.wrap}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if topology.kind == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip
    description = topologies.get_topology_desc(
        platform="tpu", topology_name=topology.name, **options
    )
    return sorted(description.devices, key=lambda d: getattr(d, "slice_index", 0))
