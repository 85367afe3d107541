"""A parameter as the matrix that it is, and where the state of its transform lies."""

from __future__ import annotations

from typing import Any

import pytest
from directions import SPECS
from jax.sharding import PartitionSpec
from toyrun import bits, parts, run

from mmjax.optim.transforms import as_matrix, layer_shape


def test_a_stacked_parameter_has_the_shape_of_a_layer() -> None:
    assert layer_shape(SPECS["query"]) == ((4, 2, 3), ("embed", "heads", None))
    assert layer_shape(SPECS["table"]) == ((7, 4), ("vocabulary", "embed"))


def test_attention_as_the_matrices_it_is() -> None:
    assert as_matrix(SPECS["query"]) == ((4, 6), ("embed", "heads"))
    assert as_matrix(SPECS["out"]) == ((6, 4), ("heads", "embed"))
    assert as_matrix(SPECS["experts"]) == ((3, 5, 4), (None, "embed", "mlp"))
    assert as_matrix(SPECS["table"]) == ((7, 4), ("vocabulary", "embed"))


def test_state_lies_by_the_axes_that_it_keeps() -> None:
    """The layers' kernel is [layers, embed, mlp]: rows follow `embed`, columns `mlp`."""
    toy = parts(
        "model.width=16", "optimizer.algorithm.name=adafactor", "optimizer.algorithm.min_dim_to_factor=8",
        "mesh.fsdp=2", "mesh.tensor=2", devices=8,
    )  # fmt: skip
    kernel = toy.state.optimizer["trunk/groups/0/blocks/0/inner/kernel"]
    lies = {field: leaf.sharding.spec for field, leaf in kernel.items()}
    assert lies["v_row"] == PartitionSpec(None, ("fsdp",))
    assert lies["v_col"] == PartitionSpec(None, ("tensor",))
    assert lies["count"] == PartitionSpec(None)


@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer.algorithm.name=muon", "optimizer.algorithm.moments_dtype=bfloat16"),
        ("optimizer.algorithm.name=adafactor", "optimizer.algorithm.min_dim_to_factor=8"),
    ],
    ids=["muon", "adafactor"],
)
def test_a_run_goes_on_in_the_same_bits(tmp_path: Any, overrides: tuple[str, ...]) -> None:
    run(tmp_path / "straight", *overrides)
    run(tmp_path / "halved", *overrides, "steps=8")
    run(tmp_path / "halved", *overrides)
    assert bits(tmp_path / "straight") == bits(tmp_path / "halved")
