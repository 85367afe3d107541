"""Streams to attend over, and attention in plain loops."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.nn.masks import FULL, Causal, KeyIs, Mask, Pairs, QueryIs, Same

BATCH, HEADS = 2, 2

MASKS: dict[str, Mask] = {
    "full": FULL,
    "causal": Causal(),
    "packed": Causal() & Same("item"),
    "pictures": Causal() | Same("span", beside=0),
    "prefix": Causal() | KeyIs("prefix", 1),
    "zorro": Same("stream") | QueryIs("stream", 2),
}


def attributes(length: int) -> dict[str, np.ndarray]:
    """Return attributes of one stream: two packed items, two pictures, a prefix, three streams in turn."""
    at = np.arange(length)
    return {
        "position": at[None],
        "item": (at >= length // 2).astype(int)[None],
        "span": np.where(at % 7 > 2, at // 7 + 1, 0)[None],
        "prefix": (at < 3).astype(int)[None],
        "stream": (at % 3)[None],
    }


def pairs_of(mask: Mask, length: int, valid: bool = False, dynamic: bool = False) -> Pairs:
    of: Any = attributes(length)
    if dynamic:
        of = {name: jnp.asarray(np.repeat(x, BATCH, 0)) for name, x in of.items()}
    exists = None
    if valid:  # the first key of each item stays, so that every query reads something
        draws = np.random.default_rng(5).random((BATCH, length)) < 0.7
        draws[:, [0, 1, 2, length // 2]] = True
        exists = jnp.asarray(draws)
    return Pairs(mask, of, of, exists)


def projections(length: int, size: int, dtype: Any) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(3)
    return tuple(
        jnp.asarray(rng.normal(size=(BATCH, length, HEADS, size)), dtype) for _ in range(3)
    )


def loops(q: Any, k: Any, v: Any, pairs: Pairs) -> np.ndarray:
    """Attend by one query at a time, over the keys that it may read; zeros where there is none."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    whole = pairs.allowed()
    allowed = np.broadcast_to(True if whole is None else whole, (*q.shape[:2], k.shape[1]))
    out = np.zeros_like(q)
    for b, s, h in np.ndindex(*q.shape[:3]):
        keys = np.flatnonzero(allowed[b, s])
        if not keys.size:
            continue
        weight = np.exp(k[b, keys, h] @ q[b, s, h] / np.sqrt(q.shape[-1]))
        out[b, s, h] = weight @ v[b, keys, h] / weight.sum()
    return out
