"""Connectors with random parameters, and their layers in NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.core.parameters import Declaration
from mmjax.nn.stream import Stream

Parameters = Mapping[str, np.ndarray]


def built(config: Any, width_in: int, width_out: int) -> tuple[Any, dict[str, np.ndarray]]:
    """Return the jitted call `(parameters, stream) -> stream` of a connector, and random parameters."""
    declaration = Declaration(config.build(width_in, width_out))
    rng = np.random.default_rng(0)
    parameters = {n: rng.normal(size=s.shape) for n, s in declaration.specs.items()}
    return jax.jit(lambda p, s: declaration.merge(p)(s, None)[0]), parameters


def stream(
    *segments: tuple[str, tuple[int, ...]], width: int, valid: Any = None, **rest: Any
) -> Stream:
    """Return two rows of random tokens; a size of rows and columns makes a segment a grid."""
    layout = tuple((name, int(np.prod(size))) for name, size in segments)
    length = sum(count for _, count in layout)
    x = np.random.default_rng(1).normal(size=(2, length, width))
    grids = tuple(size if len(size) > 1 else () for _, size in segments)
    return Stream(
        jnp.asarray(x),
        None if valid is None else jnp.asarray(valid),
        layout=layout,
        grids=grids if any(grids) else (),
        **rest,
    )


def affine(p: Parameters, name: str, x: np.ndarray) -> np.ndarray:
    return x @ p[f"{name}/kernel"] + p.get(f"{name}/bias", 0)


def layer_norm(p: Parameters, name: str, x: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    spread = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + eps)
    return centred / spread * p[f"{name}/scale"] + p.get(f"{name}/bias", 0)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def mlp(p: Parameters, name: str, x: np.ndarray) -> np.ndarray:
    return affine(p, f"{name}/down", gelu(affine(p, f"{name}/up", x)))


def attention(
    p: Parameters, name: str, x: np.ndarray, source: np.ndarray, sees: np.ndarray
) -> np.ndarray:
    """Return attention of one row without biases, a query at a time; `sees[s]` are the keys of query s."""
    out = np.zeros_like(x)
    for s, h in np.ndindex(len(x), p[f"{name}/query"].shape[1]):
        read = source[sees[s]]
        if not len(read):
            continue
        q, k, v = (
            y @ p[f"{name}/{part}"][:, h]
            for y, part in ((x[s], "query"), (read, "key"), (read, "value"))
        )
        weight = np.exp(k @ q / np.sqrt(len(q)))
        out[s] += weight / weight.sum() @ v @ p[f"{name}/out"][h]
    return out


def under(p: Parameters, prefix: str, index: Any = ...) -> dict[str, np.ndarray]:
    """Return the parameters under a prefix; `index` chooses the layer of stacked ones."""
    return {n.removeprefix(prefix): x[index] for n, x in p.items() if n.startswith(prefix)}
