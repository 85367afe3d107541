"""Tokens that end rows and frames: where they are, and that a picture's shape is known by them alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import connecting
import jax
import numpy as np
import pytest

from mmjax.connectors.grid_tokens import GridTokens
from mmjax.nn.positions import grid

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize(("row", "frame"), [(True, False), (False, True), (True, True)])
def test_against_loops(row: bool, frame: bool) -> None:
    frames, rows, columns = 2, 3, 4
    there = np.zeros((2, frames, rows, columns), bool)
    there[0, 0, 0], there[0, 1, 1:, :2], there[1] = True, True, True
    given = connecting.stream(
        ("video", (frames, rows, columns)),
        width=3,
        valid=there.reshape(2, -1),
        coordinates=grid(t=frames, y=rows, x=columns),
        attributes={"span": np.arange(24)[None]},
    )
    call, p = connecting.built(GridTokens(row=row, frame=frame), 3, 5)
    out = call(p, given)
    x = connecting.affine(p, "out", np.asarray(given.x_BSD)).reshape(2, frames, rows, columns, 5)
    for b in range(2):
        vectors, exists, spans = [], [], []
        for f in range(frames):
            for y in range(rows):
                vectors += list(x[b, f, y])
                exists += list(there[b, f, y])
                spans += range((f * rows + y) * columns, (f * rows + y + 1) * columns)
                if row:
                    vectors.append(p["newline"])
                    exists.append(there[b, f, y].any())
                    spans.append(spans[-1])
            if frame:
                vectors.append(p["frame_end"])
                exists.append(there[b, f].any())
                spans.append(spans[-1])
        np.testing.assert_allclose(out.x_BSD[b], vectors, rtol=1e-12)
        np.testing.assert_array_equal(out.valid_BS[b], exists)
    np.testing.assert_array_equal(out.attributes["span"][0], spans)
    for axis, coordinates in given.coordinates.items():
        np.testing.assert_array_equal(out.coordinates[axis][0], coordinates[0][np.array(spans)])
    assert out.layout == (("video", len(vectors)),) and out.grids == ()


def test_pictures_of_other_shapes_with_the_same_patches_differ_by_the_newlines_alone() -> None:
    wide = connecting.stream(("image", (4, 6)), width=3)
    high = replace(wide, grids=((6, 4),))
    call, p = connecting.built(GridTokens(), 3, 3)
    assert list(p) == ["newline"]  # of one width already: nothing else is learned
    one, other = (np.asarray(call(p, given).x_BSD) for given in (wide, high))
    assert one.shape[1] == 4 * 7 and other.shape[1] == 6 * 5
    ends = [np.all(x == p["newline"], axis=-1)[0] for x in (one, other)]
    assert [np.flatnonzero(end).tolist() for end in ends] == [
        [6, 13, 20, 27],
        [4, 9, 14, 19, 24, 29],
    ]
    for x, end in zip((one, other), ends, strict=True):
        np.testing.assert_array_equal(x[:, ~end], wide.x_BSD)


def test_the_learned_tokens_have_a_gradient() -> None:
    call, p = connecting.built(GridTokens(frame=True), 3, 3)
    given = connecting.stream(("video", (2, 2, 3)), width=3)

    def total(p: Any) -> Any:
        return call(p, given).x_BSD.sum()

    gradient = jax.jit(jax.grad(total))(p)
    np.testing.assert_allclose(gradient["newline"], 2 * 2 * 2, rtol=1e-12)  # rows of both examples
    np.testing.assert_allclose(gradient["frame_end"], 2 * 2, rtol=1e-12)
