"""Teachers: averages and frozen copies that an objective reads; who moves them, when, and how far."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
import toyrun

from mmjax.core.errors import UserError
from mmjax.core.teachers import TEACHER
from mmjax.engine.requests import train_requests
from mmjax.engine.state import evaluated, state_from_canonical, state_to_canonical
from mmjax.engine.steps import train_function

OF = ["stems/.*", "trunk/.*", "heads/one/.*"]
TAUGHT = "tasks.one.objective={'name': 'toy_teacher', 'bad_loss': [39]}"
WIDE = ("dtype.parameters=float64", "dtype.compute=float64")
UNUSED = "teacher/old/heads/one/unused/kernel"

pytestmark = pytest.mark.usefixtures("x64")


def teacher(name: str = "old", **keys: Any) -> str:
    return f"model.teachers.{name}={ {'of': OF, 'decay': 0.5, **keys} }"


@cache
def parts(*words: str, devices: int = 1) -> toyrun.Parts:
    with jax.enable_x64(True):
        return toyrun.parts(TAUGHT, *WIDE, *(words or (teacher(),)), devices=devices)


@cache
def program(task: str, *words: str, devices: int = 1) -> Any:
    made = parts(*words, devices=devices)
    experiment = made.experiment
    function = train_function(experiment.spec, experiment.tasks[task], experiment.optimizers.whole)

    def call(*arguments: Any) -> Any:
        with jax.set_mesh(made.mesh):
            return jax.jit(function)(*arguments)

    return call


def steps(*words: str, run: Any, devices: int = 1) -> tuple[list[Any], Any]:
    """Return the states from the first on, of steps `(task, ids)`, and the metrics of the last."""
    made = parts(*words, devices=devices)
    states, state, metrics = [toyrun.host(made.state)], made.state, None
    for step, (task, ids) in enumerate(run):
        batch, ticks = made.batch(task, list(ids)), made.ticks(task, step, step)
        state, metrics = program(task, *words, devices=devices)(state, batch, ticks)
        states.append(toyrun.host(state))
    return states, metrics


def taught(state: Any) -> dict[str, np.ndarray]:
    return {n: x for n, x in state.buffers.items() if n.startswith(TEACHER)}


THREE = [("one", range(8)), ("one", range(8, 16)), ("one", range(16, 24))]


def test_an_average_equals_its_closed_form_after_three_steps() -> None:
    """`m1 m2 m3 p0 + (1-m1) m2 m3 p1 + (1-m2) m3 p2 + (1-m3) p3`; a cosine over the 8 visits of 12 steps."""
    made, (states, _) = parts(), steps(run=THREE)
    # By the schedule, whose steps are not these: task one has the shares 2 of 3.
    schedule = made.experiment.planned.schedule()
    visits = [schedule.visits(step)["one"] for step in range(3)]
    m = [1 - 0.5 * (math.cos(math.pi * v / 7) + 1) / 2 for v in visits]
    for name, x in taught(states[-1]).items():
        p = [s.parameters[name.split("/", 2)[2]] for s in states]
        wanted = m[0] * m[1] * m[2] * p[0] + (1 - m[0]) * m[1] * m[2] * p[1]
        wanted = wanted + (1 - m[1]) * m[2] * p[2] + (1 - m[2]) * p[3]
        np.testing.assert_allclose(x, wanted, rtol=1e-12, atol=1e-15)
    moved = {n for n in taught(states[0]) if (taught(states[0])[n] != taught(states[-1])[n]).any()}
    biases = {n for n in taught(states[0]) if n == "teacher/old/heads/one/unused/bias"}
    assert moved == taught(states[0]).keys() - biases  # a bias of 0 without a gradient stays


def test_every_leaf_moves_also_one_that_the_loss_does_not_reach() -> None:
    """`own_clock` leaves the parameter, so that its average stays at its value, from wherever it began."""
    words = (teacher(schedule="constant"), "optimizer.update_scope=own_clock")
    made = parts(*words)
    start = {**made.state.buffers, UNUSED: made.state.buffers[UNUSED] + 1}
    state, batch = made.state.replace(buffers=start), made.batch("one", list(range(8)))
    after, _ = program("one", *words)(state, batch, made.ticks("one", 0, 0))
    kernel = made.state.parameters["heads/one/unused/kernel"]
    np.testing.assert_array_equal(after.parameters["heads/one/unused/kernel"], kernel)
    np.testing.assert_allclose(after.buffers[UNUSED], kernel + 0.5, rtol=1e-12)


def test_the_clock_counts_the_visits_of_its_tasks_in_the_run() -> None:
    """Twelve steps have eight visits of task one; the last of them has the last decay."""
    optimizers = parts().experiment.optimizers
    schedule = optimizers.planned.schedule()
    mine = [step for step in range(12) if schedule.task(step) == "one"]
    ticks = [optimizers.progress("one", step, {})["decay:old"] for step in mine]
    assert (ticks[0], ticks[-1]) == (0.5, 1.0) and sorted(ticks) == ticks and len(set(ticks)) == 8
    assert "decay:old" not in optimizers.progress("two", 0, {})


def test_another_length_needs_no_other_program() -> None:
    texts = []
    for words in ((teacher(),), (teacher(), "steps=48"), (teacher(decay=0.9),)):
        made = parts(*words)
        request = train_requests(made.experiment, made.mesh)["one"]
        with jax.set_mesh(made.mesh):
            texts.append(jax.jit(request.function).lower(*request.arguments).as_text())
    assert texts[0] == texts[1] == texts[2]
    assert parts(teacher(), "steps=48").ticks("one", 1, 1) != parts().ticks("one", 1, 1)


def test_a_teacher_has_no_gradient() -> None:
    """A loss that is the teacher's alone has the gradient zero."""
    words = (teacher(), "tasks.one.objective={'name': 'toy_teacher', 'blind': True}")
    _, metrics = steps(*words, run=THREE[:1])
    assert float(metrics["loss"]) > 0 and float(metrics["grad_norm"]) == 0


def test_steps_that_are_not_finite_or_of_other_tasks_leave_it() -> None:
    first = steps(run=THREE[:1])[0][-1]
    for run in ([("one", range(32, 40))], [("two", range(16))], [("one", [])]):
        states, metrics = steps(run=THREE[:1] + run)
        assert bool(metrics["finite"]) is (run[0][1] != range(32, 40))
        for name, x in taught(states[-1]).items():
            np.testing.assert_array_equal(x, taught(first)[name])


def test_a_frozen_teacher_keeps_the_parameters_of_step_0() -> None:
    states, _ = steps(teacher(kind="frozen"), run=THREE)
    for name, x in taught(states[-1]).items():
        np.testing.assert_array_equal(x, states[0].parameters[name.split("/", 2)[2]])
    name = "stems/toy/embed/kernel"
    assert (states[-1].parameters[name] != states[0].parameters[name]).any()


def test_evaluation_reads_teachers_beside_averages() -> None:
    state = parts(teacher(), "optimizer.ema=0.9").state
    read, parameters = evaluated(state), state.parameters
    assert read.keys() == parameters.keys() | taught(state).keys()
    assert read["trunk/norm/scale"] is state.buffers["ema/trunk/norm/scale"]


def test_it_is_sharded_as_its_parameter_and_stored_by_layer() -> None:
    made = parts(teacher(), "mesh.fsdp=4", "mesh.tensor=2", devices=8)
    for name, x in taught(made.state).items():
        assert x.sharding == made.state.parameters[name.split("/", 2)[2]].sharding, name
    kernel = "trunk/groups/0/blocks/0/inner/kernel"
    assert "fsdp" in str(made.state.buffers[f"teacher/old/{kernel}"].sharding.spec)
    specs = made.experiment.declaration.stored
    tree = state_to_canonical(specs, made.state)
    name = "teacher/old/trunk/layers/001/inner/kernel"
    np.testing.assert_array_equal(tree["buffers"][name], made.state.parameters[kernel][1])
    back = state_from_canonical(specs, tree)
    jax.tree.map(np.testing.assert_array_equal, toyrun.host(back), toyrun.host(made.state))


def test_eight_devices_come_to_the_same() -> None:
    words = (teacher(), "mesh.fsdp=4", "mesh.tensor=2")
    one, eight = steps(run=THREE)[0][-1], steps(*words, run=THREE, devices=8)[0][-1]
    for name, x in taught(one).items():
        np.testing.assert_allclose(taught(eight)[name], x, rtol=1e-10, atol=1e-13)


def test_a_teacher_is_float32_or_wider() -> None:
    state = toyrun.parts(TAUGHT, teacher(), "dtype.parameters=bfloat16").state
    assert {str(x.dtype) for x in taught(state).values()} == {"float32"}


REFUSED = [
    ((teacher(of=["nothing/.*"]),), r"model\.teachers\.old\.of\[0\] = 'nothing/\.\*' matches"),
    ((teacher(of=[]),), r"model\.teachers\.old\.of is empty: a teacher of nothing"),
    ((teacher(of=["trunk/layers/000/.*"]),), "not the other layers of their group"),
    (
        (teacher("young"),),
        r"tasks\.one\.objective reads the teacher 'old'; model\.teachers has young",
    ),
    ((teacher(), teacher("other")), r"model\.teachers\.other: the objective of no task reads it"),
    ((teacher(kind="emma"),), "old.kind is 'emma'. Did you mean 'ema'"),
    ((teacher(schedule="line"),), "old.schedule is 'line'"),
    ((teacher(decay=1.5),), r"decay is 1\.5; it must be"),
    ((teacher(path="runs/x"),), "old.path is 'runs/x', and of a frozen teacher"),
    ((teacher(), "optimizer.accumulate=2"), "optimizer.accumulate is 2, and the teacher 'old'"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_a_teacher_that_cannot_be_is_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parts(*words)
