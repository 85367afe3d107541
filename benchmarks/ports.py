"""Layers of Zorro and of Mamba, forward and backward, against public ports of them in PyTorch.

`zorro-pytorch`: its attention and gated feed-forward layers, under its mask over two modalities and fusion tokens.
`mambapy`: its selective state-space block, which Mixture-of-Mamba is made of. Nothing of a port that is not installed.
Both with our parameters, float32; asserted before anything is timed: the same loss, and gradients of every parameter,
to what the two forms of GELU differ (Zorro's port has the exact one, ours that by tanh). Timed are loss and gradients.

The config is not read but for its seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks._pairs import Effort, Quantity, millis, ratios, rounds
from mmjax.blocks.bottleneck import FUSION
from mmjax.core.parameters import Declaration
from mmjax.nn.masks import FULL, Mask
from mmjax.nn.stream import Stream
from mmjax.nn.trunk import GroupConfig, Trunk
from mmjax.objectives.fusion import MASKS

OURS = "ours"
Arrays = Mapping[str, np.ndarray]
Call = Callable[[], tuple[float, Arrays]]  # -> the loss, and gradients by the port's names


@dataclass(frozen=True)
class Case:
    """Layers, and what goes through them.

    Attributes:
      package: the port's module.
      close: how far gradients may be apart, relative to their size.
      layout: tokens of each kind, in order.
    """

    package: str
    close: float
    batch: int
    width: int
    layers: int
    block: Mapping[str, Any]
    layout: tuple[tuple[str, int], ...]
    mask: Mask = FULL

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.layout)


def _geglu(width: int) -> dict[str, Any]:
    hidden = int(width * 4 * 2 / 3)  # as the port has it
    return {"name": "transformer", "num_heads": width // 64, "mlp_dim": hidden, "mlp": "geglu"}


CASES: Mapping[str, Case] = {
    "zorro": Case(
        "zorro_pytorch", 2e-3, 16, 256, 4, _geglu(256),
        (("audio", 64), (FUSION, 16), ("video", 64)), MASKS["zorro"],
    ),
    "mamba": Case("mambapy", 1e-4, 8, 256, 2, {"name": "mamba"}, (("text", 128),)),
}  # fmt: skip


def measure(effort: Effort) -> list[Quantity]:
    """Return ratios of times, for each port that is there."""
    result = []
    for name, case in CASES.items():
        if find_spec(case.package) is None:
            continue
        calls = both(name, case, effort.block.get("seed", 0))
        assert_equal({each: call() for each, call in calls.items()}, case)
        times = rounds(calls, effort.pairs, effort.steps)
        result.append(
            ratios(times, OURS, case.package, "below 1", f"{name}: {OURS} to {case.package}")
        )
        result += millis(times, f"{name}: ")
    return result


def assert_equal(told: Mapping[str, tuple[float, Arrays]], case: Case) -> None:
    """Check that there is one loss, and one gradient of every parameter."""
    (one, ours), (other, theirs) = told[OURS], told[case.package]
    np.testing.assert_allclose(one, other, rtol=case.close, atol=case.close)
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name, value in ours.items():
        apart = np.linalg.norm(value - theirs[name]) / np.linalg.norm(theirs[name])
        assert apart < case.close, f"gradient of {name}: {apart:.1e} apart"


def both(name: str, case: Case, seed: int) -> dict[str, Call]:
    """Return loss and gradients, ours and the port's, of the same parameters and tokens."""
    from benchmarks import _ports_torch

    declaration, parameters = declared(case, seed)
    rng = np.random.default_rng(seed)
    shape = (case.batch, case.tokens, case.width)
    # The loss is a product with fixed numbers: a mean of squares is a constant behind a norm.
    x, weights = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    rename = _ports_torch.RENAMED[name]
    port = _ports_torch.MADE[name](case, rename(parameters, case), x, weights)
    return {OURS: ours(case, declaration, parameters, x, weights, rename), case.package: port}


def declared(case: Case, seed: int) -> tuple[Declaration, dict[str, np.ndarray]]:
    """Return the layers with a norm behind them, and parameters, none of them at a value that hides what it does."""
    trunk = Trunk([GroupConfig(case.layers, (dict(case.block),))], case.width)
    declaration = Declaration(nnx.Dict({"trunk": trunk}))
    made = jax.jit(declaration.initialise, static_argnums=0)(seed)
    rng = np.random.default_rng(seed)
    shaken = {n: np.asarray(v) + 0.01 * rng.normal(size=v.shape) for n, v in made.items()}
    return declaration, {name: value.astype(np.float32) for name, value in shaken.items()}


def ours(
    case: Case,
    declaration: Declaration,
    parameters: Arrays,
    x: np.ndarray,
    weights: np.ndarray,
    rename: Any,
) -> Call:
    def loss(parameters: Any, x: jax.Array, weights: jax.Array) -> jax.Array:
        stream = Stream(x, layout=case.layout, mask=case.mask)
        out, _ = declaration.merge(parameters)["trunk"](stream, None)
        return (out.x_BSD * weights).mean()

    call = jax.jit(jax.value_and_grad(loss))
    given = jax.device_put((dict(parameters), x, weights))

    def run() -> tuple[float, Arrays]:
        value, gradients = jax.block_until_ready(call(*given))
        return float(value), rename({n: np.asarray(g) for n, g in gradients.items()}, case)

    return run
