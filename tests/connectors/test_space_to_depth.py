"""Joined neighbours against loops."""

from __future__ import annotations

from typing import Any

import connecting
import jax
import numpy as np
import pytest

from mmjax.connectors.space_to_depth import SpaceToDepth

pytestmark = pytest.mark.usefixtures("x64")

ROWS, COLUMNS = 4, 6
THERE = np.random.default_rng(2).random((2, ROWS, COLUMNS)) < 0.6
THERE[1, 2:, 4:] = False


def test_against_loops() -> None:
    """Tokens of a cell are joined in row-major order; those that do not exist count as zeros."""
    call, p = connecting.built(SpaceToDepth(hidden=7), 3, 5)
    given = connecting.stream(("image", (ROWS, COLUMNS)), width=3, valid=THERE.reshape(2, -1))
    out = call(p, given)
    assert out.layout == (("image", 6),) and out.grids == ((2, 3),)
    x = np.asarray(given.x_BSD).reshape(2, ROWS, COLUMNS, 3)
    for b, i, j in np.ndindex(2, 2, 3):
        places = [(2 * i, 2 * j), (2 * i, 2 * j + 1), (2 * i + 1, 2 * j), (2 * i + 1, 2 * j + 1)]
        joined = np.concatenate([x[b][at] * THERE[b][at] for at in places])
        hidden = connecting.affine(p, "up", connecting.layer_norm(p, "norm", joined))
        expected = connecting.affine(p, "down", connecting.gelu(hidden))
        np.testing.assert_allclose(out.x_BSD[b, i * 3 + j], expected, rtol=1e-9, atol=1e-12)
        assert out.valid_BS[b, i * 3 + j] == any(THERE[b][at] for at in places)


def test_a_cell_depends_on_its_own_tokens_that_exist_alone() -> None:
    call, p = connecting.built(SpaceToDepth(factor=2), 3, 5)
    given = connecting.stream(("image", (ROWS, COLUMNS)), width=3, valid=THERE.reshape(2, -1))

    def outputs(x: Any) -> Any:
        return call(p, given.replace(x_BSD=x)).x_BSD[0].sum(-1)

    by_x = np.abs(jax.jit(jax.jacrev(outputs))(given.x_BSD)[:, 0]).max(-1)
    for cell, y, x in np.ndindex(6, ROWS, COLUMNS):
        is_own = (y // 2) * 3 + x // 2 == cell
        assert (by_x[cell, y * COLUMNS + x] > 0) == (is_own and THERE[0, y, x])
