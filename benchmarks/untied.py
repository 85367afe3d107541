"""A training step of a trunk untied by modality against a dense one, and chunked scans against the plain recurrence.

All of a block's parts are untied (Mixture-of-Transformers). `static` is one segment per modality, `interleaved`
segments of 16 tokens in turn; the dense trunk sees the same tokens. A chunked scan makes its states again in the
backward pass, where the recurrence holds those of all tokens. In each pair both halves run in one process, and
which comes first alternates. The config is not read but for its seed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks._pairs import Effort, Quantity, ratios, rounds
from mmjax.blocks.transformer import PARTS
from mmjax.core.parameters import Declaration
from mmjax.nn.by_modality import SHARED, PerModality
from mmjax.nn.masks import Causal
from mmjax.nn.selective_scan import Tokens, selective_scan
from mmjax.nn.stream import Stream
from mmjax.nn.trunk import GroupConfig, Trunk

NAMES = ("text", "image", "sound")
ROWS, LENGTH, WIDTH, LAYERS = 8, 384, 256, 4
BLOCK = {"name": "transformer", "num_heads": 4, "mlp_dim": 4 * WIDTH, "qk_norm": True}
SPAN = 16  # tokens of an interleaved segment
INNER, STATE = 512, 16  # of the recurrence

Layout = tuple[tuple[str, int], ...]
Step = Callable[[], Any]


def measure(effort: Effort) -> list[Quantity]:
    """Return ratios of seconds."""
    seed = effort.block.get("seed", 0)
    result = []
    for count in (2, 3):
        names = NAMES[:count]
        layouts = {
            "static": tuple((name, LENGTH // count) for name in names),
            "interleaved": tuple((name, SPAN) for name in names) * (LENGTH // SPAN // count),
        }
        for kind, layout in layouts.items():
            one, two = _trunk_step(layout, True, seed), _trunk_step(layout, False, seed)
            name = f"untied to dense, {count} modalities, {kind}"
            result.append(_compared(name, one, two, effort, "at most 1.03"))
    plain = _scan_step(_recurrence, seed)
    for way in ("serial", "parallel"):
        scan = _scan_step(partial(selective_scan, way=way), seed)
        result.append(_compared(f"{way} chunked scan to recurrence", scan, plain, effort))
    return result


def _compared(name: str, one: Step, two: Step, effort: Effort, wanted: str = "") -> Quantity:
    calls = {"one": lambda: _wait(one), "two": lambda: _wait(two)}
    return ratios(rounds(calls, effort.pairs, effort.steps), "one", "two", wanted, name)


def _wait(step: Step) -> None:
    jax.block_until_ready(step())


def _trunk_step(layout: Layout, is_untied: bool, seed: int) -> Step:
    """Return loss and gradient of a trunk."""
    names = list(dict.fromkeys(name for name, _ in layout))
    block = (
        {**BLOCK, "per_modality": {"parts": list(PARTS), "modalities": names}}
        if is_untied
        else BLOCK
    )
    norms = PerModality(("norm",), tuple(names)) if is_untied else SHARED
    trunk = Trunk([GroupConfig(LAYERS, (block,))], WIDTH, per_modality=norms)
    declaration = Declaration(nnx.Dict({"trunk": trunk}))
    parameters = jax.jit(declaration.initialise)(seed)
    x = jax.random.normal(jax.random.key(seed), (ROWS, LENGTH, WIDTH))

    def loss(parameters: Any, x: jax.Array) -> jax.Array:
        stream = Stream(x, layout=layout, mask=Causal())
        out, _ = declaration.merge(parameters)["trunk"](stream, jax.random.key(0))
        return jnp.square(out.x_BSD - 1).mean()

    gradient = jax.jit(jax.value_and_grad(loss))
    return lambda: gradient(parameters, x)


def _scan_step(scan: Callable[[jax.Array, Tokens], jax.Array], seed: int) -> Step:
    """Return loss and gradient of the selective recurrence alone."""
    keys = jax.random.split(jax.random.key(seed), 4)
    sizes = (INNER, INNER, STATE, STATE)
    x, step, b, c = (
        jax.random.normal(key, (ROWS, LENGTH, size)) for key, size in zip(keys, sizes, strict=True)
    )
    tokens = Tokens(x, jax.nn.softplus(step - 3), b, c)
    a_EN = -jnp.broadcast_to(jnp.arange(1.0, STATE + 1), (INNER, STATE))
    gradient = jax.jit(jax.value_and_grad(lambda t: jnp.square(scan(a_EN, t)).mean()))
    return lambda: gradient(tokens)


def _recurrence(a_EN: jax.Array, tokens: Tokens) -> jax.Array:
    """Return the recurrence, token by token."""

    def body(h_BEN: jax.Array, token: Tokens) -> tuple[jax.Array, jax.Array]:
        write_BEN = (token.step_BSE * token.x_BSE)[..., None] * token.in_BSN[:, None]
        h_BEN = jnp.exp(token.step_BSE[..., None] * a_EN) * h_BEN + write_BEN
        return h_BEN, (h_BEN * token.out_BSN[:, None]).sum(axis=-1)

    start_BEN = jnp.zeros((tokens.x_BSE.shape[0], *a_EN.shape))
    by_token = jax.tree.map(lambda t: jnp.moveaxis(t, 1, 0), tokens)
    _, y_SBE = jax.lax.scan(body, start_BEN, by_token)
    return jnp.moveaxis(y_SBE, 0, 1)
