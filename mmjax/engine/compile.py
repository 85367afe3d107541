"""Compilation of programs before step 0: the cache, the compiler's threads, and what fits into a device."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from mmjax.core.bounds import AMOUNT, COUNT, SIZE, check
from mmjax.core.config import SCHEDULE
from mmjax.core.errors import UserError
from mmjax.core.sharding import record_replicated
from mmjax.engine.health import HealthLimits


@dataclass(frozen=True)
class LimitsConfig:
    """Limits on the resources of a run.

    Attributes:
      memory_gib: bytes of one device that a program may need, in GiB; 0 for no limit.
      programs: number of programs that a config may make.
      max_invalid_examples: examples of a task that may fail to be read before the run stops.
      max_non_finite_steps: steps of a task in a row with a non-finite loss or gradient before the run leaves it out.
      divergence: a task has diverged when its loss is over this many times its first losses; 0: never.
      divergence_visits: visits of a task whose median is compared, of its first and of its last ones.
      watchdog_seconds: seconds without a sign of life (a step, a batch, a save) before the run is ended; 0: never.
    """

    memory_gib: float = 0.0
    programs: int = 64
    max_invalid_examples: int = 100
    max_non_finite_steps: int = field(default=10, metadata=SCHEDULE)
    divergence: float = field(default=10.0, metadata=SCHEDULE)
    divergence_visits: int = field(default=16, metadata=SCHEDULE)
    watchdog_seconds: float = 1800.0

    def __post_init__(self) -> None:
        check(
            self,
            memory_gib=AMOUNT,
            programs=COUNT,
            max_invalid_examples=SIZE,
            max_non_finite_steps=COUNT,
        )
        check(self, divergence=AMOUNT, divergence_visits=COUNT, watchdog_seconds=AMOUNT)

    @property
    def bounds(self) -> HealthLimits:
        return HealthLimits(self.max_non_finite_steps, self.divergence, self.divergence_visits)


@dataclass(frozen=True)
class Request:
    """A program to be compiled.

    Attributes:
      task: name of its task.
      kind: `train`, or what it computes in evaluation.
      function: traced under the mesh.
      arguments: `jax.ShapeDtypeStruct`s with shardings.
      out_shardings: pinned, so that a later call cannot compile again.
      donate: positions of arguments that the call consumes.
      shape: short words for the table.
      model_flops: counts the floating-point operations of the model's dot products.
      facts: more for the table.
    """

    task: str
    kind: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    out_shardings: Any
    donate: tuple[int, ...]
    shape: str
    model_flops: Callable[[], int]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """A compiled request; `report` holds what the table shows (bytes are per device)."""

    call: Callable[..., Any]
    report: dict[str, Any]


def cache_folder(name: str) -> epath.Path:
    """Return a folder in the user's cache, for what can be made again."""
    root = epath.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return root / "mmjax" / name


def use_cache(folder: epath.PathLike | None = None) -> None:
    """Keep compiled programs on disk: in `folder`, the folder JAX already has, or the user's cache."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(folder or cache_folder("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class _CacheHits:
    """Threads that hit the persistent cache since the last query."""

    def __init__(self) -> None:
        self._threads: set[int] = set()
        jax.monitoring.register_event_listener(self._listen)

    def _listen(self, event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            self._threads.add(threading.get_ident())

    def pop(self) -> bool:
        hit = threading.get_ident() in self._threads
        self._threads.discard(threading.get_ident())
        return hit


_hits = _CacheHits()


def compile_all(
    requests: Mapping[str, Request],
    mesh: Mesh,
    limits: LimitsConfig,
    watch: Callable[[str, str], None] = lambda name, state: None,
) -> dict[str, Program]:
    """Lower in order, compile in parallel, and refuse what does not fit, by name.

    `watch(name, state)` is called, by several threads, when a program is `tracing`, `compiling`, and `compiled` or
    `cached` (see `monitor.compiling`).
    """
    if len(requests) > limits.programs:
        raise UserError(
            f"The config makes {len(requests)} programs, over limits.programs = {limits.programs}: "
            f"{', '.join(requests)}. Use fewer shapes, or raise the limit."
        )
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        futures = {}
        for name, request in requests.items():
            watch(name, "tracing")
            lowered = _lower(request, mesh)
            futures[name] = pool.submit(_compile, *lowered, request, partial(watch, name))
        programs = {name: future.result() for name, future in futures.items()}
    _check_fit(programs, limits)
    return programs


def compile_silently(
    fun: Callable[..., Any], argument: Any, out_shardings: Any, mesh: Mesh
) -> Callable[..., Any]:
    """Compile a small program that belongs to no task now, so that nothing compiles later."""
    with jax.set_mesh(mesh):
        compiled: Callable[..., Any] = (
            jax.jit(fun, out_shardings=out_shardings).lower(argument).compile()
        )
    return compiled


def _lower(request: Request, mesh: Mesh) -> tuple[Any, int, list[str]]:
    """Trace on this thread; return the lowered program, its model FLOPs, and the dimensions that stay whole."""
    jitted = jax.jit(
        request.function, donate_argnums=request.donate, out_shardings=request.out_shardings
    )
    with jax.set_mesh(mesh), record_replicated() as replicated:
        lowered = jitted.lower(*request.arguments)
        return lowered, request.model_flops(), sorted(map(str, replicated))


def _compile(
    lowered: Any,
    model_flops: int,
    replicated: list[str],
    request: Request,
    watch: Callable[[str], None],
) -> Program:
    _hits.pop()
    watch("compiling")
    start = time.monotonic()
    compiled = lowered.compile()
    seconds = time.monotonic() - start
    report = {
        "name": request.task,
        "kind": request.kind,
        "shape": request.shape,
        "bytes": device_bytes(compiled),
        "flops": model_flops,
        "compile_seconds": seconds,
        "cached": _hits.pop(),
        "whole": replicated,
        **request.facts,
    }
    watch("cached" if report["cached"] else "compiled")
    return Program(compiled, report)


def device_bytes(compiled: Any) -> int:
    """Return the bytes that a call needs on one device: arguments, temporaries, non-argument outputs, code."""
    m = compiled.memory_analysis()
    if m is None:
        return 0
    out = m.output_size_in_bytes - m.alias_size_in_bytes
    return int(
        m.argument_size_in_bytes + m.temp_size_in_bytes + out + m.generated_code_size_in_bytes
    )


def _check_fit(programs: Mapping[str, Program], limits: LimitsConfig) -> None:
    limit = limits.memory_gib * 2**30
    over = {
        n: p.report["bytes"] for n, p in programs.items() if limit and p.report["bytes"] > limit
    }
    if over:
        lines = "\n  ".join(f"{n}: {b / 2**30:.3g} GiB" for n, b in over.items())
        raise UserError(
            f"These programs need more than limits.memory_gib = {limits.memory_gib} on a device:\n  {lines}\n"
            "A smaller batch, shape or model.remat = 'full' would help."
        )
