"""Rows of the table of parameters, counted by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.nn import initializers

from mmjax.core.parameters import Spec
from mmjax.monitor.parameter_rows import part_of, rows_of_checkpoint, rows_of_config


def spec(name: str, shape: tuple[int, ...], axes: tuple[Any, ...], copies: float = 1) -> Spec:
    return Spec(name, shape, axes, initializers.zeros, False, True, None, copies)


SPECS = [
    spec("stems/text/table", (100, 8), ("vocabulary", "embed")),
    spec("stems/text/place", (30, 8), ("positions", "embed")),
    spec("stems/image/kernel", (12, 8), (None, "embed")),
    spec("trunk/layers/mlp/kernel", (2, 8, 16), ("layers", "embed", "mlp")),
    spec("trunk/layers/experts/kernel", (4, 8, 16), ("experts", "embed", "mlp"), copies=4),
    spec("heads/caption/logits", (8, 100), ("embed", "vocabulary")),
]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("trunk/layers/003/mlp/kernel", "trunk"),
        ("eye/layers/003/mlp/kernel", "eye"),
        ("stems/text/table", "stems/text"),
        ("heads/caption/logits", "heads/caption"),
        ("scale", "scale"),
    ],
)
def test_a_parameter_belongs_to_the_trunk_or_to_a_stem_or_a_head(name: str, part: str) -> None:
    assert part_of(name) == part


def test_a_token_meets_one_row_of_a_table_and_one_of_the_copies() -> None:
    rows = {row["part"]: row for row in rows_of_config({s.name: s for s in SPECS})}
    assert list(rows) == ["heads/caption", "stems/image", "stems/text", "trunk"]
    assert {part: row["total"] for part, row in rows.items()} == {
        "heads/caption": 800,
        "stems/image": 96,
        "stems/text": 800 + 240,
        "trunk": 256 + 512,
    }
    assert {part: row["active_per_token"] for part, row in rows.items()} == {
        "heads/caption": 8,
        "stems/image": 96,
        "stems/text": 8 + 8,
        "trunk": 256 + 128,
    }


def test_rows_of_a_checkpoint_have_totals_alone() -> None:
    shapes = {s.name: jax.ShapeDtypeStruct(s.shape, jnp.float32) for s in SPECS}
    assert rows_of_checkpoint(shapes) == [
        {"part": "heads/caption", "total": 800},
        {"part": "stems/image", "total": 96},
        {"part": "stems/text", "total": 1040},
        {"part": "trunk", "total": 768},
    ]


def test_no_parameters_are_no_rows() -> None:
    assert rows_of_config({}) == [] == rows_of_checkpoint({})
