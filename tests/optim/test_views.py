"""Check how a task's steps see the optimizer: what they leave alone to the last bit, and what `shared` costs."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toyrun
from etils import epath
from jax.nn import initializers
from toyrun import Parts, host, parts, run

from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.core.parameters import Spec
from mmjax.engine import checkpoint
from mmjax.engine.compile import LimitsConfig, Program, compile_all
from mmjax.engine.requests import train_requests
from mmjax.engine.state import EMA
from mmjax.experiment import make_experiment
from mmjax.monitor.tables import program_table
from mmjax.optim.config import OptimizerConfig
from mmjax.optim.optimizer import Optimizer
from mmjax.optim.views import SHARED, UpdateScope

TINY = Path(__file__).resolve().parents[1] / "configs" / "tiny.py"
SHORT = ("optimizer.warmup=0", "optimizer.ema=0.5", "optimizer.weight_decay=0.1")
TASKS = ("one", "two")
OWN = "optimizer.update_scope=own_moments"


@functools.cache
def compiled(*overrides: str) -> tuple[Parts, dict[str, Program]]:
    toy = parts(*overrides)
    return toy, compile_all(train_requests(toy.experiment, toy.mesh), toy.mesh, LimitsConfig())


def after(tasks: Sequence[str], *overrides: str) -> tuple[list[Any], list[Any]]:
    """Return states (the initial one first) and metrics of steps of `tasks` in turn."""
    toy, programs = compiled(*SHORT, *overrides)
    state = jax.tree.map(lambda x: jnp.array(x, copy=True), toy.state)
    states, metrics = [host(state)], []
    for step, task in enumerate(tasks):
        visit = list(tasks[:step]).count(task)
        batch = toy.batch(task, range(8))
        state, told = programs[task].call(state, batch, toy.ticks(task, step, visit))
        states.append(host(state))
        metrics.append(host(told))
    return states, metrics


def same(one: Any, two: Any) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), one, two)))


def belongings(state: Any, name: str) -> Any:
    """Return a parameter and all that goes with it."""
    return state.parameters[name], state.optimizer[name], state.buffers[EMA + name]


# --- own clock ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_what_a_task_does_not_reach_is_the_same_to_the_last_bit(name: str) -> None:
    tasks = ["two", "one", "one"]
    states, metrics = after(
        tasks, "optimizer.update_scope=own_clock", f"optimizer.algorithm.name={name}"
    )
    assert all(m["finite"] for m in metrics)
    touched = {n for n in states[0].parameters if not n.startswith("heads/two/")}
    for before, now in zip(states[1:], states[2:], strict=False):
        for parameter in now.parameters:
            unchanged = same(belongings(now, parameter), belongings(before, parameter))
            assert unchanged == (parameter not in touched), parameter
    counts = {n: np.max(leaf["count"]) for n, leaf in states[-1].optimizer.items()}
    assert counts["heads/two/out/kernel"] == 1 and counts["heads/one/out/kernel"] == 2
    assert counts["trunk/groups/0/blocks/0/inner/kernel"] == 3


def test_the_shared_view_moves_everything() -> None:
    """The control of the test above: by the others' moments, by decay, by counting."""
    states, _ = after(["two", "one"])
    for parameter in states[0].parameters:
        assert not same(belongings(states[2], parameter), belongings(states[1], parameter))


def test_views_differ_by_task() -> None:
    """Steps of `one` move all; steps of `two` only what they reach."""
    states, _ = after(["one", "two", "one"], "tasks.two.update_scope=own_clock")
    far = "heads/one/out/kernel"
    assert same(belongings(states[2], far), belongings(states[1], far))
    assert states[3].optimizer["heads/two/out/kernel"]["count"] == 3


def test_the_norm_is_of_what_is_reached() -> None:
    """It is the same number: what is not reached has the gradient zero."""
    adam = ("optimizer.update_scope=own_clock", "optimizer.algorithm.name=adamw")
    norms = [after(["one"], *view)[1][0]["grad_norm"] for view in ((), adam)]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-6)


# --- reach in a model --------------------------------------------------------------------------


def moves(*overrides: str) -> dict[str, frozenset[str]]:
    block = configs.override(
        configs.read_file(str(TINY)), ["optimizer.update_scope=own_clock", *overrides]
    )
    return {name: view.trains for name, view in make_experiment(block).optimizers.views.items()}


def test_reach_in_a_model_of_two_modalities() -> None:
    """Through the scan over layers, to the stems of the task's own modalities and the head of its own."""
    found = moves()
    whole = found["image_text"] | found["masked_image"]
    assert found["masked_image"] == {
        n for n in whole if n.startswith(("stems/image", "trunk/", "heads/masked_image"))
    }
    assert found["image_text"] == {n for n in whole if not n.startswith("heads/masked_image")}
    assert "stems/text/embedding" in found["image_text"] - found["masked_image"]
    # Rematerialisation changes nothing.
    assert moves("model.remat=full") == found == moves("model.remat=dots")


def test_frozen_parameters_are_not_moved() -> None:
    rule = 'optimizer.rules=[{"match": "trunk/.*", "freeze": True}]'
    assert moves(rule) == {
        t: {n for n in m if "trunk/" not in n or "heads" in n} for t, m in moves().items()
    }


# --- own moments -------------------------------------------------------------------------------


def test_own_moments_are_apart_and_parameters_shared() -> None:
    states, _ = after(["two", "one", "one"], OWN)
    assert not states[0].optimizer  # no task has any in common
    stem = "stems/toy/embed/kernel"
    of_two = {n: leaf for n, leaf in states[0].moments.items() if n.startswith("two:")}
    assert "two:heads/one/out/kernel" not in of_two and f"two:{stem}" in of_two
    assert not same({n: states[1].moments[n] for n in of_two}, of_two)
    for now in states[2:]:
        assert same({n: now.moments[n] for n in of_two}, {n: states[1].moments[n] for n in of_two})
    assert not same(states[3].parameters[stem], states[1].parameters[stem])
    assert [states[3].moments[f"{t}:{stem}"]["count"] for t in TASKS] == [2, 1]


def test_own_moments_are_those_of_the_task_trained_alone() -> None:
    """Where both tasks see the same parameters, a visit's moments come from its own visits only."""
    states, _ = after(["one", "two"], OWN)
    alone, _ = after(["one"], OWN)
    for name in alone[1].moments:
        if name.startswith("one:"):
            assert same(states[2].moments[name], alone[1].moments[name])


def test_a_task_with_moments_of_its_own_leaves_the_others_as_they_are() -> None:
    shared = parts(*SHORT).experiment
    toy = parts("tasks.two.update_scope=own_moments", *SHORT)
    abstract = toy.experiment.abstract_state(toy.mesh)
    plain = shared.abstract_state(toy.mesh)
    assert abstract.optimizer == plain.optimizer and abstract.parameters == plain.parameters
    assert {n.partition(":")[0] for n in abstract.moments} == {"two"}
    kernel = "trunk/groups/0/blocks/0/inner/kernel"
    for name in ("mu", "nu"):
        own, common = abstract.moments[f"two:{kernel}"][name], abstract.optimizer[kernel][name]
        assert (own.shape, own.sharding) == (common.shape, common.sharding)


def test_the_table_tells_what_own_moments_cost() -> None:
    toy, programs = compiled(*SHORT, "tasks.two.update_scope=own_moments")
    reports = [p.report for p in programs.values()]
    moments = sum(x.nbytes for x in jax.tree.leaves(toy.state.moments))
    common = sum(x.nbytes for x in jax.tree.leaves(toy.state.optimizer))
    assert [r["optimizer_bytes"] for r in reports] == [common, moments]
    said = io.StringIO()
    program_table(reports, said)
    assert "own_moments" in said.getvalue() and "Optimizer" in said.getvalue()
    quiet = io.StringIO()
    program_table([p.report for p in compiled(*SHORT)[1].values()], quiet)
    assert "Optimizer" not in quiet.getvalue()


def test_bytes_are_those_of_one_device() -> None:
    settings = (
        "tasks.two.update_scope=own_moments",
        "model.width=16",
        "mesh.fsdp=8",
        "mesh.data=1",
    )
    toy = parts(*settings, devices=8)
    request = train_requests(toy.experiment, toy.mesh)["two"]
    first = toy.mesh.devices.flat[0]
    held = [
        s.data.nbytes
        for x in jax.tree.leaves(toy.state.moments)
        for s in x.addressable_shards
        if s.device == first
    ]
    assert request.facts["optimizer_bytes"] == sum(held)
    assert sum(held) < sum(x.nbytes for x in jax.tree.leaves(toy.state.moments)) / 2


# --- resuming ----------------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["own_clock", "own_moments"])
def test_a_run_goes_on_in_the_same_bits(tmp_path: Path, view: str) -> None:
    settings = (f"tasks.two.update_scope={view}", "optimizer.unit=visits", "optimizer.decay=cosine")
    run(tmp_path / "straight", *settings)
    run(tmp_path / "halved", *settings, "checkpoint.every=3")
    for step in (12, 9):  # as if it had been killed after step 6
        epath.Path(tmp_path / "halved" / "checkpoints" / str(step)).rmtree()
    epath.Path(tmp_path / "halved" / "results.json").unlink()
    run(tmp_path / "halved", *settings)
    assert toyrun.parameters(tmp_path / "straight").keys()
    straight, halved = (toyrun.bits(tmp_path / w).split(" ")[0] for w in ("straight", "halved"))
    assert straight == halved


def test_a_view_may_change_under_a_run(tmp_path: Path) -> None:
    """The task's own moments begin at zero; everything else continues."""
    run(tmp_path, "steps=4")
    with pytest.raises(UserError, match=r"tasks\.two\.update_scope \(schedule\)"):
        run(tmp_path, "tasks.two.update_scope=own_moments")
    run(tmp_path, "tasks.two.update_scope=own_moments", "steps=8", allow_change=True)
    folder = epath.Path(tmp_path)
    shapes = checkpoint.read_shapes(folder, 8)
    assert {n.partition(":")[0] for n in shapes["moments"]} == {"two"}
    run(tmp_path, allow_change=True)
    assert "moments" not in checkpoint.read_shapes(folder, 12)


def test_an_unknown_view_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"tasks\.two\.update_scope: no 'own_clok'. Did you mean 'own_clock'"
    ):
        parts("tasks.two.update_scope=own_clok")
    with pytest.raises(
        UserError, match=r"optimizer\.update_scope: no 'share'. Did you mean 'shared'"
    ):
        parts("optimizer.update_scope=share")


# --- units of the learning rate ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        # A warm-up of 2, then half a cosine over the 10 steps that are left.
        ("steps", [0.5, 1.0, 1.0, 0.9755]),
        # Each task by its own visits: eight of one and four of two in twelve steps.
        ("visits", [0.5, 0.5, 1.0, 1.0]),
    ],
)
def test_the_rate_counts_what_it_is_told(unit: str, expected: list[float]) -> None:
    assert rates(unit, 2, ["one", "two", "one", "two"]) == pytest.approx(expected, rel=1e-3)


def test_a_task_reaches_the_end_of_its_decay_by_its_own_visits() -> None:
    found = rates("visits", 0, ["two"] * 5)
    cosine = [(1 + math.cos(math.pi * n / 4)) / 2 for n in range(5)]
    assert found == pytest.approx(cosine, abs=1e-6)


def test_the_rate_counts_examples() -> None:
    """12 steps read 8 x 8 + 4 x 16 = 128 examples; the warm-up is 16 of them, two visits of one."""
    cosine = [(1 + math.cos(math.pi * (n - 16) / 112)) / 2 for n in (16, 24, 32)]
    assert rates("examples", 16, ["one"] * 5) == pytest.approx([0, 0.5, *cosine], abs=1e-6)


def rates(unit: str, warmup: int, tasks: Sequence[str]) -> list[float]:
    """Return the learning rate at steps of `tasks` in turn, of a peak of 1."""
    experiment = make_experiment(
        toyrun.block(
            f"optimizer.unit={unit}", f"optimizer.warmup={warmup}",
            "optimizer.learning_rate=1.0", "optimizer.decay=cosine",
        )
    )  # fmt: skip
    result, positions = [], dict.fromkeys(TASKS, 0)
    for step, task in enumerate(tasks):
        when = {
            "step": step,
            "visit": tasks[:step].count(task),
            **experiment.optimizers.progress(task, step, positions),
        }
        ticks = {name: jnp.asarray(n) for name, n in when.items()}
        result.append(float(experiment.optimizers.whole.rate(task, ticks)))
        positions[task] += experiment.tasks[task].batch
    return result


# --- what `shared` costs -----------------------------------------------------------------------


def test_the_drift_of_shared_adam() -> None:
    """A parameter that only a task of every 12th step reaches, its gradient always 1, in the long run."""
    every, rate = 12, 1e-4
    spec = Spec("x", (), (), initializers.zeros, False, False, None)
    view = UpdateScope(SHARED, frozenset({"x"}))
    optimizer = Optimizer(OptimizerConfig(clip=0.0), {"x": spec}, lambda _: 1, {"task": view})

    def step(carry: Any, n: Any) -> Any:
        x, state = carry
        grads = {"x": (n % every == 0).astype(x.dtype)}
        updated = optimizer.update(grads, state, {"x": x}, jnp.asarray(rate, x.dtype))
        return (updated.parameters["x"], updated.optimizer), x - updated.parameters["x"]

    with jax.enable_x64(True):
        x = jnp.zeros(())
        start = (x, optimizer.init({"x": x}))
        _, moved = jax.lax.scan(step, start, jnp.arange(every * 1000))
    visit = np.asarray(moved).reshape(-1, every)[-1] / rate
    assert visit.sum() == pytest.approx(3.46, abs=0.01)
    assert visit[1:].sum() / visit.sum() == pytest.approx(0.86, abs=0.005)
    # Its own step is all that moves it under its own clock, by one learning rate.
    assert np.asarray(moved)[0] / rate == pytest.approx(1, abs=1e-6)
