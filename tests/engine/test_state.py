"""The state: its clock, its form in checkpoints, where it lies, its averages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import toyrun
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from toyrun import Parts, host, parts, run

from mmjax import loading
from mmjax.core.errors import UserError
from mmjax.engine import checkpoint
from mmjax.engine.compile import LimitsConfig, compile_all
from mmjax.engine.integrity import unseal
from mmjax.engine.requests import train_requests
from mmjax.engine.state import (
    EMA,
    SUMMED,
    Clock,
    compute_dtype,
    state_from_canonical,
    state_to_canonical,
)
from mmjax.schedule.phase_specs import from_config
from mmjax.training.evaluation import Evaluation
from mmjax.training.initial_state import initial_state
from mmjax.training.session import begin

WIDE = ("model.width=16", "optimizer.ema=0.75")


@pytest.fixture(scope="module")
def toy() -> Parts:
    return parts(*WIDE)


COUNTS = st.dictionaries(st.sampled_from(["a", "b", "ü c"]), st.integers(0, 2**62))


@settings(deadline=None)
@given(step=st.integers(0, 2**40), positions=COUNTS, skipped=COUNTS, invalid=COUNTS)
def test_a_clock_survives_json(
    step: int, positions: Mapping[str, int], skipped: Mapping[str, int], invalid: Mapping[str, int]
) -> None:
    schedule = from_config("random", {"a": 2, "b": 3}, 5).append(7, {"b": 1, "ü c": 2})
    clock = Clock(step, schedule, positions, skipped, invalid)
    assert Clock.from_json(json.loads(json.dumps(clock.to_json()))) == clock


def test_the_canonical_form_takes_layers_apart_and_back(toy: Parts) -> None:
    specs, state = toy.experiment.declaration.specs, toy.state
    tree = state_to_canonical(specs, state)
    stacked = "trunk/groups/0/blocks/0/inner/kernel"
    names = [f"trunk/layers/{layer:03d}/inner/kernel" for layer in range(2)]
    assert state.parameters[stacked].shape == (2, 16, 16)
    assert stacked not in tree["parameters"]
    for layer, name in enumerate(names):
        assert np.array_equal(tree["parameters"][name], state.parameters[stacked][layer])
        assert tree["optimizer"][name]["mu"].shape == (16, 16)
        assert tree["optimizer"][name]["count"].shape == ()
        assert np.array_equal(tree["buffers"][EMA + name], state.buffers[EMA + stacked][layer])
    # An error in the order of layers would show: they differ.
    assert not np.array_equal(tree["parameters"][names[0]], tree["parameters"][names[1]])
    back = state_from_canonical(specs, tree)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, back, state)))


def test_what_is_saved_shares_no_memory_with_the_state(toy: Parts, tmp_path: Path) -> None:
    """The next step writes over the state while the save continues in the background."""
    session = begin(toy.experiment, epath.Path(tmp_path), toy.mesh, False, print)
    state = initial_state(toy.experiment, toy.mesh, session.start)
    saved = jax.tree.leaves(session.canonical(state))
    assert len(saved) > len(jax.tree.leaves(state))
    pointers = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)}
    assert not pointers & {x.unsafe_buffer_pointer() for x in saved}


def test_the_initial_state_does_not_depend_on_the_mesh() -> None:
    alone = host(parts(*WIDE).state)
    spread = parts(*WIDE, "mesh.fsdp=2", "mesh.tensor=2", devices=8)
    assert any(not p.sharding.is_fully_replicated for p in spread.state.parameters.values())
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, host(spread.state), alone)))


def test_what_belongs_to_a_parameter_lies_like_it() -> None:
    toy = parts(*WIDE, "mesh.fsdp=2", "mesh.tensor=2", devices=8)
    abstract = toy.experiment.abstract_state(toy.mesh)
    sharded = 0
    for name, parameter in abstract.parameters.items():
        for leaf in (*abstract.optimizer[name].values(), abstract.buffers[EMA + name]):
            if leaf.shape == parameter.shape:
                assert leaf.sharding == parameter.sharding
                sharded += not leaf.sharding.is_fully_replicated
            else:
                assert leaf.sharding.is_fully_replicated
    assert sharded >= 6
    # Arrays of the state itself, not only the plan.
    for x, a in zip(jax.tree.leaves(toy.state), jax.tree.leaves(abstract), strict=True):
        assert (x.shape, x.dtype, x.sharding) == (a.shape, a.dtype, a.sharding)


def test_averages_follow_the_parameters(toy: Parts) -> None:
    """`average = 0.75 average + 0.25 parameter` after each update, from the initial parameters on."""
    programs = compile_all(train_requests(toy.experiment, toy.mesh), toy.mesh, LimitsConfig())
    state = jax.tree.map(lambda x: jnp.array(x, copy=True), toy.state)
    averages = {n: p.astype(np.float64) for n, p in host(state.parameters).items()}
    start = host(state.parameters)
    for step, task in enumerate(["one", "two", "one", "two"]):
        state, _ = programs[task].call(
            state, toy.batch(task, range(8)), toy.ticks(task, step, step // 2)
        )
        for name, value in host(state.parameters).items():
            averages[name] = 0.75 * averages[name] + 0.25 * value
    for name, average in averages.items():
        found = np.asarray(state.buffers[EMA + name])
        np.testing.assert_allclose(found, average, rtol=1e-5, atol=1e-6)
    assert any(np.abs(averages[n] - start[n]).max() > 1e-3 for n in averages)
    assert any(np.abs(averages[n] - state.parameters[n]).max() > 1e-3 for n in averages)


def test_averages_are_saved_restored_and_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[Any] = []
    call = Evaluation.__call__

    def noted(self: Evaluation, programs: Any, parameters: Any, *more: Any) -> Any:
        evaluated.append(host(parameters))
        return call(self, programs, parameters, *more)

    monkeypatch.setattr(Evaluation, "__call__", noted)
    run(tmp_path / "straight", *WIDE)
    run(tmp_path / "halved", *WIDE, "steps=8")
    run(tmp_path / "halved", *WIDE)
    assert toyrun.bits(tmp_path / "straight") == toyrun.bits(tmp_path / "halved")
    folder = epath.Path(tmp_path / "straight")
    shapes = checkpoint.read_shapes(folder, 12)
    assert {EMA + n for n in shapes["parameters"]} == set(shapes["buffers"])
    wanted = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), shapes)
    state = checkpoint.read_state(folder, 12, wanted)
    stem = "stems/toy/embed/kernel"
    assert np.array_equal(evaluated[-1][stem], state["buffers"][EMA + stem])
    assert not np.array_equal(evaluated[-1][stem], state["parameters"][stem])


BF16 = (
    "model.width=16", "dtype.parameters=bfloat16", "optimizer.ema=0.999", "optimizer.accumulate=2",
)  # fmt: skip


def test_averages_and_sums_of_bfloat16_parameters_are_float32() -> None:
    buffers = parts(*BF16).state.buffers
    assert {n.split("/")[0]: b.dtype.name for n, b in buffers.items()} == {
        "ema": "float32", "sum": "float32", SUMMED: "int32",
    }  # fmt: skip


def as_earlier(folder: epath.Path, step: int) -> Any:
    """Rewrite a checkpoint's averages, sums and second moments in bfloat16, as earlier versions kept them."""
    shapes = checkpoint.read_shapes(folder, step)
    wanted = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), shapes)
    state = jax.tree.map(
        lambda x: np.asarray(x, jnp.bfloat16 if x.dtype == np.float32 else x.dtype),
        checkpoint.read_state(folder, step, wanted),
    )
    kept = {part: leaves for part, leaves in state.items() if leaves}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoints" / str(step) / "state", kept, force=True)
    path = folder / "checkpoints" / str(step) / "meta" / "metadata"
    meta = unseal(json.loads(path.read_text()), "meta data")
    path.write_text(json.dumps({**meta, "format": 1}))  # which had no checksums
    return kept


def test_a_run_whose_checkpoint_holds_them_in_bfloat16_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loaded for use, too: each number is the one that was stored."""
    words = (*BF16, "tasks.one.evaluators={}", "tasks.two.evaluators={}")
    run(tmp_path, *words, "steps=4")
    folder = epath.Path(tmp_path)
    stored = as_earlier(folder, 4)["buffers"]["ema/stems/toy/embed/kernel"]
    held = checkpoint.read_shapes(folder, 4)
    assert {s.dtype.name for n, s in held["buffers"].items() if n != SUMMED} == {"bfloat16"}
    loaded = loading.load(str(tmp_path)).parameters["stems/toy/embed/kernel"]
    assert loaded.dtype == jnp.float32 and np.array_equal(loaded, stored.astype(np.float32))
    capsys.readouterr()
    run(tmp_path, *words, "steps=8")
    said = capsys.readouterr().out
    assert "arrays in a narrower dtype than they are kept in today (buffers/ema/" in said
    held = checkpoint.read_shapes(folder, 8)
    assert {s.dtype.name for n, s in held["buffers"].items() if n != SUMMED} == {"float32"}
    assert {s["nu"].dtype.name for s in held["optimizer"].values()} == {"float32"}
    assert {s.dtype.name for s in held["parameters"].values()} == {"bfloat16"}


def test_without_an_average_the_parameters_are_evaluated(toy: Parts) -> None:
    plain = parts("model.width=16")
    assert not plain.state.buffers
    assert (
        set(state_to_canonical(plain.experiment.declaration.specs, plain.state)["buffers"]) == set()
    )


def test_an_unknown_dtype_is_refused() -> None:
    assert compute_dtype("bfloat16") == jnp.bfloat16
    with pytest.raises(UserError, match="dtype 'float16': expected one of float32, bfloat16"):
        compute_dtype("float16")


def test_float64_needs_jax_to_be_set_up_for_it() -> None:
    assert not jax.config.values["jax_enable_x64"]
    with pytest.raises(UserError, match="JAX_ENABLE_X64=1"):
        compute_dtype("float64")
