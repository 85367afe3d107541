"""Compiles programs for a described machine and reports on each: a process of its own, which may be lost.

    python -m mmjax.plan.case < SPECIFICATION

The specification is JSON, the fields of `Specification`. On standard output come JSON lines: first
`{"ready": {...}}` or `{"error": "..."}` (the user's), then `{"name": ..., ...}` for each program as it is done.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jaxlib

from mmjax.core import config as configs
from mmjax.core.chips import Chip, chip
from mmjax.core.errors import UserError
from mmjax.core.sharding import AXES, make_mesh, shard_bytes
from mmjax.engine.compile import Request
from mmjax.engine.requests import eval_requests, train_requests
from mmjax.experiment import Experiment, make_experiment
from mmjax.plan import cost, hlo
from mmjax.plan.groups import Layout
from mmjax.plan.topology import Topology, describe

# The format of cached reports; raise it when their content or their counting changes.
FORMAT = 3
# The compiler's message when a program does not fit, with the bytes that it would need.
_EXHAUSTED = re.compile(r"RESOURCE_EXHAUSTED")
_REQUIRED = re.compile(r"(?:\(|Used )([\d.]+)([KMGT]?)(?:\) exceeds| of )")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Less optimization; from jax 0.11 on `jax_optimization_level` has taken the option's place.
_FAST = {"exec_time_optimization_effort": -1.0}


@dataclass(frozen=True)
class Specification:
    """The program to compile.

    Attributes:
      block: the config.
      extra: folders of the user's modules.
      kind, shape, slices: of the topology.
      names: programs, by task name or `program_key`; all of the config if None.
      fast: compile with less optimization.
      cache: folder of reports; empty for none.
    """

    block: dict[str, Any]
    extra: Sequence[str]
    kind: str
    shape: Sequence[int]
    slices: int
    names: Sequence[str] | None
    fast: bool
    cache: str

    @property
    def topology(self) -> Topology:
        return Topology(self.kind, tuple(self.shape), self.slices)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def main() -> None:
    write = _writer()
    specification = Specification(**json.load(sys.stdin))
    try:
        for folder in specification.extra:
            configs.add_folder(folder)
        cases = Cases(specification)
        write({"ready": cases.facts()})
        for name in cases.names:
            write({"name": name, **cases.report(name)})
    except UserError as error:
        write({"error": str(error)})


def _writer() -> Callable[[Mapping[str, Any]], None]:
    """Return a writer of lines to what is now standard output; whatever else writes there goes to standard error."""
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def write(line: Mapping[str, Any]) -> None:
        print(json.dumps(line), file=stream, flush=True)

    return write


class Cases:
    """The programs of a config for one topology."""

    def __init__(self, specification: Specification):
        self._specification = specification
        if specification.fast and _minor() >= 11:
            jax.config.update("jax_optimization_level", "O0")
        self._experiment: Experiment = make_experiment(specification.block)
        self._devices = describe(specification.topology)
        self._mesh = make_mesh(self._experiment.run.mesh, self._devices)
        self._requests: dict[str, Request] = {
            **train_requests(self._experiment, self._mesh),
            **eval_requests(self._experiment, self._mesh),
        }
        self._state = self._experiment.abstract_state(self._mesh)

    @property
    def names(self) -> list[str]:
        chosen = self._specification.names
        return list(self._requests if chosen is None else chosen)

    @property
    def _chip(self) -> Chip:
        kind = self._devices[0].device_kind
        result = chip(kind)
        if result is None or not result.memory:
            raise UserError(f"The memory and the links of '{kind}' are unknown.")
        return result

    def facts(self) -> dict[str, Any]:
        """Return the facts that hold for all programs."""
        return {
            "device": self._devices[0].device_kind,
            "mesh": {axis: int(self._mesh.shape[axis]) for axis in AXES},
            "chip": dataclasses.asdict(self._chip),
            "state_bytes": shard_bytes(self._state),
            "versions": versions(),
            "names": self.names,
        }

    def report(self, name: str) -> dict[str, Any]:
        """Return the plan's facts on a program."""
        request = self._requests[name]
        jitted = jax.jit(
            request.function, donate_argnums=request.donate, out_shardings=request.out_shardings
        )
        with jax.set_mesh(self._mesh):
            lowered, model_flops = jitted.lower(*request.arguments), request.model_flops()
        compiled = self._cached(lowered)
        return {
            "task": request.task,
            "kind": request.kind,
            "shape": request.shape,
            "tokens": request.facts.get("tokens"),
            "model_flops": model_flops,
            "batch_bytes": shard_bytes(request.arguments[1]),
            "beside_bytes": self._beside(request),
            **compiled,
        }

    def _beside(self, request: Request) -> int:
        """Return the bytes that lie on a device while the program runs without being its arguments.

        In training the next batch; in evaluation what is no parameter of the state.
        """
        if request.kind == "train":
            return shard_bytes(request.arguments[1])
        return shard_bytes(self._state) - shard_bytes(self._state.parameters)

    # --- compilation, once for each program ----------------------------------------------------

    def _cached(self, lowered: Any) -> dict[str, Any]:
        if not self._specification.cache:
            return {**self._compile(lowered), "cached": False}
        file = Path(self._specification.cache) / f"{self._key(lowered)}.json"
        if file.exists():
            return {**json.loads(file.read_text()), "cached": True}
        compiled = self._compile(lowered)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial_file = file.with_suffix(f".{os.getpid()}")
        partial_file.write_text(json.dumps(compiled))
        partial_file.replace(file)
        return {**compiled, "cached": False}

    def _key(self, lowered: Any) -> str:
        facts = [
            FORMAT, versions(), self._specification.topology.label, self._options(),
            self._specification.fast, list(self._mesh.shape.items()), [d.id for d in self._mesh.devices.flat],
        ]  # fmt: skip
        words = json.dumps(facts, sort_keys=True) + lowered.as_text()
        return hashlib.sha256(words.encode()).hexdigest()[:32]

    def _options(self) -> dict[str, Any]:
        return _FAST if self._specification.fast and _minor() < 11 else {}

    def _compile(self, lowered: Any) -> dict[str, Any]:
        start = time.monotonic()
        try:
            compiled = lowered.compile(compiler_options=self._options() or None)
        except jax.errors.JaxRuntimeError as error:
            seconds = time.monotonic() - start
            return {**_refused(str(error)), "compile_seconds": seconds}
        seconds = time.monotonic() - start
        memory = compiled.memory_analysis()
        return {
            "status": "compiled",
            "compile_seconds": seconds,
            "bytes": {
                "arguments": memory.argument_size_in_bytes,
                "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
                "temporaries": memory.temp_size_in_bytes,
                "peak": memory.peak_memory_in_bytes,
                "code": memory.generated_code_size_in_bytes,
            },
            **self._costs(compiled.as_text()),
        }

    def _costs(self, text: str) -> dict[str, Any]:
        costs = cost.cost(hlo.parse(text), self._layout(), self._chip.flops, self._chip.bandwidth)
        return {
            "flops": costs.flops,
            "products": [
                {"name": name, "flops": n} for name, n in sorted(costs.products.items()) if n
            ],
            "memory_bytes": costs.memory,
            "busy_seconds": costs.seconds,
            "collectives": [
                {"wire": wire, "kind": kind, "axes": axes, "bytes": round(n)}
                for (wire, kind, axes), n in sorted(costs.wires.items())
            ],
            "unknown": sorted(costs.unknown),
        }

    def _layout(self) -> Layout:
        is_gpu = self._specification.topology.is_gpu
        where = "process_index" if is_gpu else "slice_index"
        places = [getattr(d, where, 0) for d in self._mesh.devices.flat]
        return Layout({axis: int(n) for axis, n in self._mesh.shape.items()}, places)


def _refused(words: str) -> dict[str, Any]:
    if not _EXHAUSTED.search(words):
        return {"status": "failed", "message": " ".join(words.split())[:500]}
    match = _REQUIRED.search(words)
    return {
        "status": "out_of_memory",
        "required_bytes": int(float(match[1]) * _UNITS[match[2]]) if match else 0,
        "message": " ".join(words.split())[:300],
    }


def versions() -> dict[str, str]:
    """Return the versions that decide how a program is compiled."""
    result = {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
    for package in ("libtpu", "jax-cuda12-pjrt"):
        with suppress(metadata.PackageNotFoundError):
            result[package] = metadata.version(package)
    return result


def _minor() -> int:
    return int(jax.__version__.split(".")[1])


if __name__ == "__main__":
    main()
