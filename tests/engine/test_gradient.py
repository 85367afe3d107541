"""Micro-batches come to the same as the whole batch: in float64 to 1e-10, draws and all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toyrun
from toyrun import host, parts

from mmjax.core.batch import Batch
from mmjax.core.errors import UserError
from mmjax.core.parameters import Rows
from mmjax.engine.compile import LimitsConfig, compile_all
from mmjax.engine.gradient import loss_and_gradient
from mmjax.engine.requests import train_requests
from mmjax.experiment import Experiment, make_experiment
from mmjax.model import Model
from mmjax.nn.towers import Widths
from mmjax.objectives.base import Coupled, Loss, Objective, row_keys
from mmjax.task import Task

ROWS = 8
# Uneven over the parts, whichever way they are cut.
VALID = np.array([1, 1, 1, 0, 1, 1, 0, 1], bool)


pytestmark = pytest.mark.usefixtures("x64")


def task(name: str, reads: Mapping[str, Any], **objective: Any) -> dict[str, Any]:
    return {
        "source": {"name": "toy"},
        "inputs": dict(reads),
        "objective": {"name": name, **objective},
        "batch": ROWS,
    }


PAIR: dict[str, Any] = {"a": {"tokens": 2}, "b": {"tokens": 3}}
TASKS = {
    "concepts": task(
        "contrastive", PAIR, modalities=["a", "b"], embed_dim=4, positive_key="concept"
    ),
    "masked": task(
        "masked_image", {"image": {"size": 8}}, decoder_width=8, decoder_depth=1, decoder_heads=2
    ),
    "classes": task("classification", {"image": {"size": 8}}, classes=5),
}


Result = tuple[Loss, dict[str, jax.Array]]


class Cases:
    """`cases(task name, micro-batches)`: loss and gradient of a batch; each case is compiled once."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self._compiled: dict[Any, Any] = {}

    def __call__(
        self, name: str, count: int, valid: np.ndarray = VALID, key: int = 1, objective: Any = None
    ) -> Result:
        which = (name, count, repr(objective))
        if which not in self._compiled:
            self._compiled[which] = jax.jit(self.function(name, count, objective))
        return host(self._compiled[which](*self.arguments(name, valid, key)))

    def function(self, name: str, count: int, objective: Any) -> Callable[..., Result]:
        task = self.experiment.tasks[name]
        config = replace(task.config, microbatches=count)
        task = replace(task, config=config, objective=objective or task.objective)
        merge = self.experiment.declaration.merge
        return lambda parameters, batch, key: loss_and_gradient(task, merge, parameters, batch, key)

    def arguments(self, name: str, valid: np.ndarray = VALID, key: int = 1) -> tuple[Any, ...]:
        return self.parameters, batch_of(self.experiment.tasks[name], valid), jax.random.key(key)

    @cached_property
    def parameters(self) -> dict[str, jax.Array]:
        """Initial parameters, in float64 as in all tests here."""
        return jax.jit(lambda: self.experiment.declaration.initialise(0, jnp.float64))()


@pytest.fixture(scope="module")
def cases() -> Cases:
    block = toyrun.block()
    layer = {"name": "transformer", "num_heads": 2, "mlp_dim": 8}
    block["model"] = {"width": 8, "layers": [{"repeat": 2, "blocks": [layer]}]}
    block["modalities"] = {
        "a": {"name": "toy"},
        "b": {"name": "toy"},
        "image": {"name": "image", "patch": 2},
    }
    block["tasks"] = TASKS
    return Cases(make_experiment(block))


def batch_of(chosen: Task, valid: np.ndarray) -> Any:
    rng = np.random.default_rng(3)

    def draw(shape: Any) -> jax.Array:
        values = rng.normal(size=(ROWS, *shape.shape)) * 60 + 128
        return jnp.asarray(values.astype(shape.dtype))

    shapes = chosen.rows().shapes()
    fields = {n: jnp.asarray(rng.integers(0, 3, ROWS), jnp.int32) for n in shapes.fields}
    inputs = jax.tree.map(draw, shapes.inputs)
    return Batch(inputs=inputs, fields=fields, valid=jnp.asarray(valid))


def distance(one: Result, two: Result) -> float:
    """Return the largest difference of value, metrics and gradients."""
    trees = ((r[0].value, r[0].metrics, r[1]) for r in (one, two))
    differences = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), *trees)
    return max(jax.tree.leaves(differences))


@pytest.mark.parametrize(
    ("name", "count"),
    [("concepts", 2), ("concepts", 4), ("masked", 2), ("masked", 4), ("classes", 2)],
)
def test_the_gradient_is_that_of_the_whole_batch(cases: Cases, name: str, count: int) -> None:
    whole, parts = cases(name, 1), cases(name, count)
    assert max(float(np.abs(g).max()) for g in whole[1].values()) > 1e-3
    assert distance(whole, parts) < 1e-10


@pytest.mark.parametrize("name", ["concepts", "masked"])
def test_a_part_without_any_valid_row(cases: Cases, name: str) -> None:
    valid = np.array([1, 0, 1, 0, 0, 0, 1, 0], bool)  # every second part is empty
    whole, parts = (cases(name, n, valid) for n in (1, 2))
    assert np.isfinite(whole[0].value) and distance(whole, parts) < 1e-10


@pytest.mark.parametrize("name", ["concepts", "masked"])
def test_no_valid_row_at_all_gives_zero_and_no_nan(cases: Cases, name: str) -> None:
    loss, grads = cases(name, 4, np.zeros(ROWS, bool))
    assert loss.value == 0 and not any(np.any(g) for g in grads.values())


@dataclass(frozen=True, kw_only=True)
class Apart(Objective):
    """A coupled objective done as if its rows had nothing to do with each other."""

    inner: Any

    def reads(self) -> tuple[str, ...]:
        return tuple(self.inner.reads())

    def fields(self) -> tuple[str, ...]:
        return tuple(self.inner.fields())

    def heads(self, widths: Widths, inputs: Any) -> dict[str, Any]:
        return dict(self.inner.heads(widths, inputs))

    def __call__(self, model: Model, batch: Batch, key: jax.Array) -> Loss:
        loss: Loss = self.inner(model, batch, key)
        return replace(loss, parts={})


def test_parts_of_a_contrastive_loss_alone_are_another_loss(cases: Cases) -> None:
    """The control: fewer negatives. What keeps the value are the two passes."""
    inner = cases.experiment.tasks["concepts"].objective
    parts = cases("concepts", 4, objective=Apart(head="concepts", inner=inner))
    assert abs(float(cases("concepts", 1)[0].value - parts[0].value)) > 0.1


@dataclass(frozen=True, kw_only=True)
class Means(Apart):
    """A mean over terms of which rows have different numbers; one function, as one would write it by hand."""

    counts: bool = True

    def __call__(self, model: Model, batch: Batch, key: jax.Array) -> Loss:
        stream, aux = model.encode([model.tokens("a", batch.inputs["a"])], key)
        weight_B = jnp.where(batch.valid, 1.0 + batch.fields["concept"], 0.0)
        error_B = jnp.square(stream.x_BSD).sum(axis=(1, 2))
        count = weight_B.sum()
        value = (weight_B * error_B).sum() / jnp.maximum(count, 1)
        loss = Loss(value, {"count": count / count}, count=count if self.counts else None)
        return loss.with_aux(replace(aux, loss=aux.loss + 3))


def test_a_mean_over_other_things_than_rows_says_how_many(cases: Cases) -> None:
    inner = cases.experiment.tasks["concepts"].objective
    told, untold = (Means(head="concepts", inner=inner, counts=c) for c in (True, False))
    whole = cases("concepts", 1, objective=told)
    parts = cases("concepts", 4, objective=told)
    assert distance(whole, parts) < 1e-10
    assert (float(whole[0].auxiliary), float(parts[0].auxiliary)) == pytest.approx((3, 3))
    assert distance(whole, cases("concepts", 4, objective=untold)) > 1e-3


# --- keys --------------------------------------------------------------------------------------


def test_each_row_has_a_key_of_its_own_whatever_its_part() -> None:
    batch = Batch({}, {}, jnp.ones(ROWS, bool))
    keys = row_keys(batch, jax.random.key(5))
    data = np.asarray(jax.random.key_data(keys))
    assert len(np.unique(data, axis=0)) == ROWS
    assert np.array_equal(
        data, jax.random.key_data(row_keys(replace(batch, keys=keys), jax.random.key(6)))
    )
    assert not np.array_equal(data, jax.random.key_data(row_keys(batch, jax.random.key(6))))


def test_parts_draw_from_keys_of_their_own(cases: Cases) -> None:
    """What a layer draws for a whole part must not be the same in the next part."""
    seen: list[Any] = []

    @dataclass(frozen=True, kw_only=True)
    class Noting(Means):
        def __call__(self, model: Model, batch: Batch, key: jax.Array) -> Loss:
            jax.debug.callback(lambda k: seen.append(tuple(k.tolist())), jax.random.key_data(key))
            return super().__call__(model, batch, key)

    inner = cases.experiment.tasks["concepts"].objective
    cases("concepts", 4, objective=Noting(head="concepts", inner=inner))
    jax.effects_barrier()
    assert len(set(seen)) == 4


def test_masks_differ_by_visit(cases: Cases) -> None:
    assert distance(cases("masked", 2, key=1), cases("masked", 2, key=2)) > 1e-4


# --- what is refused, and programs --------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Replaced(Means):
    def __call__(self, model: Model, batch: Batch, key: jax.Array) -> Loss:
        rows = {"code": Rows({"id": batch.valid})}
        return replace(super().__call__(model, batch, key), proposals=rows)


def test_rows_of_the_whole_batch_are_refused_in_parts(cases: Cases) -> None:
    inner = cases.experiment.tasks["concepts"].objective
    replaced, arguments = Replaced(head="concepts", inner=inner), cases.arguments("concepts")
    with pytest.raises(UserError, match=r"tasks\.concepts\.microbatches.*buffer 'code'"):
        jax.eval_shape(cases.function("concepts", 2, replaced), *arguments)
    jax.eval_shape(cases.function("concepts", 1, replaced), *arguments)


@pytest.mark.parametrize("count", [1, 2])
def test_a_coupled_loss_proposes_once_whatever_the_parts(cases: Cases, count: int) -> None:
    """`represent` runs twice on each part; its statistics count once, and add to those of `compare`."""
    objective: Any = cases.experiment.tasks["concepts"].objective

    class Proposing(type(objective)):  # type: ignore[misc]
        def represent(self, model: Model, batch: Batch, key: jax.Array) -> Any:
            result = super().represent(model, batch, key)
            proposals = {"seen": {"count": batch.valid.sum().astype(float)}}
            return replace(result, aux=replace(result.aux, proposals=proposals))

        def compare(self, model: Model, rows: Any, batch: Batch) -> Loss:
            proposals = {"seen": {"count": jnp.asarray(100.0)}}
            return replace(super().compare(model, rows, batch), proposals=proposals)

    keys = {f.name: getattr(objective, f.name) for f in fields(objective)}
    loss, _ = cases("concepts", count, objective=Proposing(**keys))
    assert loss.proposals == {"seen": {"count": 100 + VALID.sum()}}


def test_a_coupled_objective_has_two_parts_and_its_whole_is_their_sum(cases: Cases) -> None:
    objective: Any = cases.experiment.tasks["concepts"].objective
    assert isinstance(objective, Coupled)
    parameters, batch, key = cases.arguments("concepts")

    def both(parameters: Any) -> Any:
        model = cases.experiment.declaration.merge(parameters)
        represented = objective.represent(model, batch, key)
        parts = objective.compare(model, represented.rows, batch).value + represented.aux.loss
        return objective(model, batch, key).value, parts, represented.rows

    whole, parts, rows = jax.jit(both)(parameters)
    assert {x.shape[0] for x in jax.tree.leaves(rows)} == {ROWS}
    assert float(whole) == pytest.approx(float(parts), rel=1e-14)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("tasks.one.microbatches=3",), r"tasks\.one\.microbatches is 3; it must divide the batch of 8"),
        (("tasks.one.microbatches=0",), r"tasks\.one\.microbatches is 0"),
    ],
)  # fmt: skip
def test_parts_that_do_not_divide_the_batch_are_refused(overrides: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parts(*overrides)


def test_a_part_spreads_over_all_devices() -> None:
    with jax.enable_x64(False):
        toy = parts("tasks.one.microbatches=2", devices=8)
        with pytest.raises(
            UserError, match=r"tasks\.one in \d+ microbatches: batch 4 does not divide"
        ):
            train_requests(toy.experiment, toy.mesh)


def program_of(*overrides: str, devices: int = 1) -> tuple[Any, Any]:
    toy = parts("tasks.one.objective.hidden=0.0", *overrides, devices=devices)
    request = train_requests(toy.experiment, toy.mesh)["one"]
    return toy, compile_all({"one": request}, toy.mesh, LimitsConfig())["one"]


def test_a_program_of_parts_does_the_same_on_a_mesh() -> None:
    results = []
    with jax.enable_x64(False):
        for overrides, devices in (
            ((), 1),
            (("tasks.one.microbatches=2", "mesh.fsdp=2", "mesh.data=2"), 4),
        ):
            toy, program = program_of(*overrides, devices=devices)
            when = toy.ticks("one", 0, 0)
            state, metrics = program.call(toy.state, toy.batch("one", range(7)), when)
            results.append(host((state.parameters, metrics)))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_parts_save_memory() -> None:
    with jax.enable_x64(False):
        sizes = ("tasks.one.batch=512", "model.width=64")
        whole, parts = (
            program_of(*sizes, f"tasks.one.microbatches={n}")[1].report["bytes"] for n in (1, 8)
        )
    assert parts < 0.6 * whole
