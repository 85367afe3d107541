"""Growth of time: of a step with tokens, batch, depth and experts; of compiling with programs; of a choice with tasks.

Each series doubles one size and leaves the others; the exponent is the slope of log time over log size, by least
squares, in each round. `theory` is the same slope of the model FLOPs of the steps (attention's share of them grows with
the square of the tokens; experts of a fixed capacity cost what one costs). For programs and tasks it is 1 and 0: what
is compiled is compiled once each, and which task comes next is looked up. An exponent far above theory is a defect.
What is fixed for every step makes exponents smaller.

The config is not read but for its seed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks._pairs import Effort, Quantity, quantity, rounds
from mmjax.analysis.flops import model_flops
from mmjax.core.parameters import Declaration
from mmjax.nn.stream import Stream
from mmjax.nn.trunk import GroupConfig, Trunk
from mmjax.schedule.phase_specs import from_config

BASE = {"tokens": 128, "batch": 16, "depth": 4, "experts": 0}
SERIES: Mapping[str, Sequence[int]] = {
    "tokens": (128, 256, 512, 1024),
    "batch": (8, 16, 32, 64),
    "depth": (2, 4, 8, 16),
    "experts": (2, 4, 8, 16),
}
PROGRAMS = (1, 2, 4, 8)
TASKS = (10, 100, 1000)
LOOKUPS = 2000
WIDTH, HEADS, HIDDEN = 128, 4, 512
Call = Callable[[], Any]


def measure(effort: Effort) -> list[Quantity]:
    """Return exponents, with those of theory."""
    seed, result = effort.block.get("seed", 0), []
    for name, sizes in SERIES.items():
        calls, flops = {}, []
        for size in sizes:
            calls[str(size)], count = step({**BASE, name: size}, seed)
            flops.append(count)
        times = rounds(calls, effort.pairs, effort.steps)
        result += _exponents(f"step, {name}", sizes, list(times.values()), slope(sizes, flops))
    result += _exponents("compiling, programs", PROGRAMS, _compiling(effort.pairs, seed), 1.0)
    result += _exponents("next task, tasks", TASKS, _choosing(effort.pairs), 0.0)
    return result


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the slope of log value over log size, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def _exponents(
    name: str, sizes: Sequence[int], times: Sequence[Sequence[float]], theory: float
) -> list[Quantity]:
    """Return the exponent in each round, and the milliseconds of each size."""
    values = [slope(sizes, each) for each in zip(*times, strict=True)]
    wanted = f"{theory:.2f} by theory"
    shown = [
        quantity(f"{name} {size}", [1000 * t for t in each], "ms")
        for size, each in zip(sizes, times, strict=True)
    ]
    return [quantity(f"{name}: exponent", values, "exponent", wanted), *shown]


def step(sizes: Mapping[str, int], seed: int) -> tuple[Call, int]:
    """Return loss and gradient of a trunk; and their FLOPs."""
    declaration, both = _program(sizes)
    call, held = jax.jit(both), list[Any]()

    def run() -> Any:
        if not held:
            parameters = jax.jit(declaration.initialise, static_argnums=0)(seed)
            x = np.random.default_rng(seed).normal(size=_shape(sizes)).astype(np.float32)
            held.extend(jax.device_put((parameters, x)))
        return jax.block_until_ready(call(*held))

    return run, model_flops(both, *_abstract(declaration, sizes))


def _program(sizes: Mapping[str, int], salt: float = 1.0) -> tuple[Declaration, Call]:
    """Return a trunk, and the gradient of a loss of it, times `salt`."""
    block: dict[str, Any] = {"name": "transformer", "num_heads": HEADS, "mlp_dim": HIDDEN}
    if sizes["experts"]:
        block["experts"] = {"count": sizes["experts"]}
    trunk = Trunk([GroupConfig(sizes["depth"], (block,))], WIDTH)
    declaration = Declaration(nnx.Dict({"trunk": trunk}))

    def loss(parameters: Any, x: jax.Array) -> jax.Array:
        out, aux = declaration.merge(parameters)["trunk"](Stream(x), None)
        return salt * jnp.square(out.x_BSD).mean() + aux.loss

    return declaration, jax.value_and_grad(loss)


def _shape(sizes: Mapping[str, int]) -> tuple[int, int, int]:
    return sizes["batch"], sizes["tokens"], WIDTH


def _abstract(declaration: Declaration, sizes: Mapping[str, int]) -> tuple[Any, Any]:
    specs = declaration.specs.items()
    parameters = {name: jax.ShapeDtypeStruct(s.shape, jnp.float32) for name, s in specs}
    return parameters, jax.ShapeDtypeStruct(_shape(sizes), jnp.float32)


def _compiling(pairs: int, seed: int) -> list[list[float]]:
    """Return seconds to trace and compile so many programs that differ in their batch, none of them compiled before."""
    rng = np.random.default_rng(seed)
    result: list[list[float]] = [[] for _ in PROGRAMS]
    for _ in range(pairs if pairs < 10 else max(3, pairs // 10)):
        for index, count in enumerate(PROGRAMS):
            began = time.perf_counter()
            for n in range(count):
                sizes = {**BASE, "depth": 1, "batch": 1 + n}
                # A number of its own, so that no cache knows the program.
                declaration, both = _program(sizes, float(rng.random() + time.time() % 1))
                jax.jit(both).lower(*_abstract(declaration, sizes)).compile()
            result[index].append(time.perf_counter() - began)
    return result


def _choosing(pairs: int) -> list[list[float]]:
    """Return seconds to look up which task comes at a step, far from the beginning."""
    result: list[list[float]] = [[] for _ in TASKS]
    schedules = [
        from_config("shares", {f"task_{i}": 1 + i % 7 for i in range(count)}, 0) for count in TASKS
    ]
    for schedule in schedules:
        schedule.task(10**6)
    for _ in range(pairs):
        for index, schedule in enumerate(schedules):
            began = time.perf_counter()
            for at in range(10**9, 10**9 + LOOKUPS):
                schedule.task(at)
            result[index].append((time.perf_counter() - began) / LOOKUPS)
    return result
