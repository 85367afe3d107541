"""A layer of experts against a dense one of as many active FLOPs, and its gathers against one-hot products.

Forward and backward of the layer alone, on tokens in groups of 2,048, float32. Each router's layer has 8 experts, of
which a token meets one, and the dense layer is one of them; the router's own products are little beside (reported), but
for the soft router's, whose slots are means of tokens. The one-hot dispatch is GShard's (Lepikhin et al. 2021): tokens
come to slots and back by products with masks `[T, E, C]`. Asserted before it is timed: the same outputs and the same
gradients as ours, by the same routing.

The config is not read but for its seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from benchmarks._pairs import Effort, Quantity, millis, quantity, ratios, rounds
from mmjax.analysis.flops import model_flops
from mmjax.core import config as configs
from mmjax.core.parameters import Declaration
from mmjax.nn.dense import mlp_of
from mmjax.nn.experts import Experts, ExpertsConfig
from mmjax.nn.routers.base import Dispatch, Router, Slots
from mmjax.nn.stream import Stream

ROWS, LENGTH, WIDTH, HIDDEN, COUNT = 16, 256, 256, 1024, 8
ROUTERS: Mapping[str, dict[str, Any]] = {
    "expert choice": {"name": "expert_choice"},
    "token choice": {"name": "token_choice"},
    "token choice with priority": {"name": "token_choice", "batch_priority": True},
    "soft": {"name": "soft", "slots_per_expert": 256},  # as many slots as a group has tokens
}
DENSE = "dense"
Call = Callable[[], Any]


@struct.dataclass
class OneHot(Dispatch):
    """Slots as products with masks.

    Attributes:
      mask_GECT: 1 where a slot holds a token.
      gate_GEC: as of `Slots`.
    """

    mask_GECT: jax.Array
    gate_GEC: jax.Array

    def gather(self, x_GTD: jax.Array) -> jax.Array:
        return jnp.einsum("gect,gtd->gecd", self.mask_GECT, x_GTD)

    def combine(self, y_GECD: jax.Array, tokens: int) -> jax.Array:
        del tokens
        return jnp.einsum("gect,gecd->gtd", self.mask_GECT * self.gate_GEC[..., None], y_GECD)

    def parts(self, tokens: int) -> jax.Array:
        del tokens
        return (self.mask_GECT * (self.gate_GEC[..., None] > 0)).sum(axis=2).swapaxes(1, 2)


@dataclass(frozen=True)
class ByProducts:
    """A router whose slots are filled and emptied by products."""

    inner: Router
    noise = 0.0

    def route(self, logits_GTL: jax.Array, valid_GT: jax.Array) -> OneHot:
        slots = self.inner.route(logits_GTL, valid_GT)
        assert isinstance(slots, Slots)
        mask = jax.nn.one_hot(slots.index_GEC, valid_GT.shape[1], dtype=jnp.float32)
        return OneHot(mask, slots.gate_GEC)


def measure(effort: Effort) -> list[Quantity]:
    """Return ratios to the dense layer, and of gathers to products."""
    seed = effort.block.get("seed", 0)
    x = np.random.default_rng(seed).normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
    dense, dense_flops = _dense(x, seed)
    result = []
    for name, router in ROUTERS.items():
        ours, flops = _experts(x, router, seed)
        calls = {name: ours, DENSE: dense}
        products = f"{name}, one-hot"
        if router["name"] != "soft":
            calls[products], _ = _experts(x, router, seed, by_products=True)
            assert_equal(calls[name](), calls[products]())
        times = rounds(calls, effort.pairs, effort.steps)
        share = [flops / dense_flops] * effort.pairs
        result.append(ratios(times, name, DENSE))
        result.append(quantity(f"{name}: FLOPs to {DENSE}", share))
        if products in times:
            result.append(ratios(times, name, products, "below 1"))
        result += millis(times, f"{name}: " if name != DENSE else "")
    return result


def assert_equal(ours: Any, theirs: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ours, theirs)


def _experts(
    x: np.ndarray, router: Mapping[str, Any], seed: int, by_products: bool = False
) -> tuple[Call, int]:
    config = configs.build(ExpertsConfig, {"count": COUNT, "router": router}, "experts")
    layer = Experts(WIDTH, HIDDEN, config)
    if by_products:
        layer.routing = ByProducts(layer.routing)  # type: ignore[assignment]
    return _call(layer, lambda made, x: made(Stream(x), None)[0], x, seed)


def _dense(x: np.ndarray, seed: int) -> tuple[Call, int]:
    return _call(mlp_of("gelu", WIDTH, HIDDEN, False), lambda made, x: made(x), x, seed)


def _call(
    layer: nnx.Module, apply: Callable[[Any, jax.Array], jax.Array], x: np.ndarray, seed: int
) -> tuple[Call, int]:
    """Return loss and gradients of parameters and tokens; and its FLOPs."""
    declaration = Declaration(layer)
    parameters = jax.jit(declaration.initialise, static_argnums=0)(seed)
    weight = np.random.default_rng(seed + 1).normal(size=x.shape).astype(np.float32)

    def loss(parameters: Any, x: jax.Array) -> jax.Array:
        return (apply(declaration.merge(parameters), x) * weight).sum()

    both = jax.value_and_grad(loss, (0, 1))
    step, given = jax.jit(both), jax.device_put((parameters, x))
    return lambda: jax.block_until_ready(step(*given)), model_flops(both, *given)
