"""The state of a run at its beginning: initialised, with what a checkpoint or another run holds in place."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import toyrun
from etils import epath

from mmjax.core.parameters import to_canonical
from mmjax.engine import checkpoint
from mmjax.training.initial_state import Fresh, initial_state


def test_parameters_taken_from_elsewhere_are_in_place_and_can_be_taken_once() -> None:
    toy = toyrun.parts()
    specs = toy.experiment.declaration.specs
    expected = {n: np.asarray(x) for n, x in to_canonical(specs, toy.state.parameters).items()}
    name = "trunk/layers/001/inner/kernel"
    expected[name] = np.arange(expected[name].size, dtype=np.float32).reshape(expected[name].shape)
    start = Fresh({name: expected[name]})
    state = initial_state(toy.experiment, toy.mesh, start)
    parameters = to_canonical(specs, state.parameters)
    assert parameters.keys() == expected.keys()
    assert all(np.array_equal(parameters[n], expected[n]) for n in expected)
    assert start.parameters is None
    with pytest.raises(RuntimeError, match="taken before"):
        initial_state(toy.experiment, toy.mesh, start)


def test_averages_may_begin_later(tmp_path: Path) -> None:
    """At the parameters as they stand, not at new random ones."""
    workdir = tmp_path / "run"
    toyrun.run(workdir, "steps=4")
    before = toyrun.parameters(workdir)
    toyrun.run(workdir, "steps=5", "optimizer.ema=0.5", allow_change=True)
    after, folder = toyrun.parameters(workdir), epath.Path(workdir)
    shapes = checkpoint.read_shapes(folder, 5)["buffers"]
    abstract = {n: jax.ShapeDtypeStruct(s.shape, s.dtype) for n, s in shapes.items()}
    averages = checkpoint.read_state(folder, 5, {"buffers": abstract})["buffers"]
    assert {name.removeprefix("ema/") for name in averages} == set(after)
    for name, value in after.items():
        expected = (before[name] + value) / 2
        np.testing.assert_allclose(averages[f"ema/{name}"], expected, rtol=1e-6)
