"""Latents that read their input again: their numbers, and what reads share."""

from __future__ import annotations

from typing import Any

import connecting
import jax
import numpy as np
import pytest

from mmjax.connectors.latents import Latents

pytestmark = pytest.mark.usefixtures("x64")

WIDTH_IN, WIDTH, WIDTH_OUT, COUNT, LENGTH = 6, 4, 5, 3, 5
THERE = np.array([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0]], bool)
READS_AT = (0, 1, 3)


def config(**keys: Any) -> Latents:
    return Latents(num_heads=2, mlp_dim=3, count=COUNT, width=WIDTH, **keys)


@pytest.mark.parametrize(("shared", "modules"), [(False, (0, 1, 2)), (True, (0, 1, 1))])
def test_against_numpy(shared: bool, modules: tuple[int, ...]) -> None:
    """Shared, all reads after the first have the same weights. The second row has no token to read."""
    call, p = connecting.built(
        config(depth=4, reads_at=READS_AT, shared=shared), WIDTH_IN, WIDTH_OUT
    )
    given = connecting.stream(("image", (LENGTH,)), width=WIDTH_IN, valid=THERE)
    out = call(p, given)
    assert len({name.split("/")[1] for name in p if name.startswith("reads")}) == max(modules) + 1
    np.testing.assert_array_equal(out.valid_BS, [[True] * COUNT, [False] * COUNT])
    all_of_it = np.ones((COUNT, COUNT), bool)
    norm = connecting.layer_norm
    for b in range(2):
        z, source = p["latents"], connecting.affine(p, "into", np.asarray(given.x_BSD[b]))
        for depth in range(4):
            if depth in READS_AT:
                q = connecting.under(p, f"reads/{modules[READS_AT.index(depth)]}/")
                sees = np.tile(THERE[b], (COUNT, 1))
                read = norm(q, "context_norm", source)
                z = z + connecting.attention(q, "cross", norm(q, "cross_norm", z), read, sees)
                z = z + connecting.mlp(q, "mlp", norm(q, "mlp_norm", z))
            q = connecting.under(p, f"blocks/{depth}/")
            normed = norm(q, "attention_norm", z)
            z = z + connecting.attention(q, "attention", normed, normed, all_of_it)
            z = z + connecting.mlp(q, "mlp", norm(q, "mlp_norm", z))
        expected = connecting.affine(p, "out", norm(p, "norm", z))
        np.testing.assert_allclose(out.x_BSD[b], expected, rtol=1e-9, atol=1e-11)


def test_padding_has_no_gradient_and_every_token_that_exists_has() -> None:
    call, p = connecting.built(config(depth=1), WIDTH_IN, WIDTH_OUT)
    given = connecting.stream(("image", (LENGTH,)), width=WIDTH_IN, valid=THERE)

    def total(p: Any, x: Any) -> Any:
        return (call(p, given.replace(x_BSD=x)).x_BSD * np.arange(WIDTH_OUT)).sum()

    by_p, by_x = jax.jit(jax.grad(total, argnums=(0, 1)))(p, given.x_BSD)
    np.testing.assert_array_equal(np.abs(by_x).max(-1) > 0, THERE)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in by_p.values())
