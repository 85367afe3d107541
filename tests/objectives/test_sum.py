"""A sum of objectives: its members' losses alone, micro-batches, passes computed once, draws, auxiliary losses."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toyrun
from toyrun import host

from mmjax.core import config as configs
from mmjax.core.batch import Batch
from mmjax.core.config import build
from mmjax.core.errors import UserError
from mmjax.engine.gradient import loss_and_gradient
from mmjax.experiment import Experiment, make_experiment
from mmjax.modalities.base import Input
from mmjax.model import Model
from mmjax.objectives.base import Loss, Objective, classified, embedded, row_keys, written
from mmjax.objectives.sum import Member, Sum

ROWS = 8
VALID = np.array([1, 1, 1, 0, 1, 1, 0, 1], bool)  # uneven over the parts of any micro-batches
WEIGHTS = {"pairs": 1.0, "classes": 0.5}
PAIRS = {"name": "contrastive", "modalities": ["a", "b"], "embed_dim": 4, "head": "pairs"}
CLASSES = {"name": "classification", "modalities": ["a"], "classes": 5, "head": "classes"}
PAIR = {"a": {"tokens": 2}, "b": {"tokens": 3}}
EXPERTS = {
    "count": 2,
    "router": {"name": "token_choice", "top_k": 1, "capacity": 2.0},
    "losses": {"importance": 1.0},
}

pytestmark = pytest.mark.usefixtures("x64")


@dataclass(frozen=True)
class Drawn(Objective):
    """The mean over valid rows, each as often as its number of terms, of a draw times a parameter-free feature."""

    terms: tuple[int, ...] = (3, 1, 4, 1, 5, 9, 2, 6)

    def reads(self) -> tuple[str, ...]:
        return ("a",)

    def heads(self, width: Any, inputs: Mapping[str, Input]) -> dict[str, Any]:
        return {}

    def __call__(self, model: Model, batch: Batch, key: jax.Array) -> Loss:
        stream, aux = model.encode([model.tokens("a", batch.inputs["a"])], key)
        drawn_B = jax.vmap(jax.random.uniform)(row_keys(batch, key))
        terms_B = jnp.where(batch.valid, batch.fields["label"] + 1, 0).astype(drawn_B.dtype)
        feature_B = drawn_B + jnp.square(stream.x_BSD).sum(axis=(1, 2))
        mean = (terms_B * feature_B).sum() / jnp.maximum(terms_B.sum(), 1)
        drawn = (terms_B * drawn_B).sum() / jnp.maximum(terms_B.sum(), 1)
        return Loss(mean + aux.loss, {"draw": drawn, "baseline": drawn}, count=terms_B.sum())


def experiment(mlp: Any = None, **members: Mapping[str, Any]) -> Experiment:
    """Return an experiment of three tasks: a sum, and its members alone, which share heads with it."""
    block = toyrun.block()
    layer = {"name": "transformer", "num_heads": 2, "mlp_dim": 8, **(mlp or {})}
    block["model"] = {"width": 8, "layers": [{"repeat": 1, "blocks": [layer]}]}
    block["modalities"] = {"a": {"name": "toy"}, "b": {"name": "toy"}}
    members = members or {
        name: {"objective": o, "weight": WEIGHTS[name]}
        for name, o in {"pairs": PAIRS, "classes": CLASSES}.items()
    }
    objectives = {"sum": {"name": "sum", "members": members}, "pairs": PAIRS, "classes": CLASSES}
    block["tasks"] = {
        name: {
            "source": {"name": "toy"},
            "inputs": PAIR if name != "classes" else {"a": PAIR["a"]},
            "objective": objective,
            "batch": ROWS,
        }
        for name, objective in objectives.items()
    }
    return make_experiment(block)


@pytest.fixture(scope="module")
def built() -> Experiment:
    return experiment()


def batch_of(built: Experiment) -> Batch:
    """Return a batch of the sum, whose rows have few labels."""
    rng = np.random.default_rng(3)
    shapes = built.tasks["sum"].rows().batch(ROWS)
    drawn = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape).astype(s.dtype)), shapes)
    fields = {n: jnp.asarray(rng.integers(0, 5, ROWS), jnp.int32) for n in shapes.fields}
    return replace(drawn, fields=fields, valid=jnp.asarray(VALID))


def loss(built: Experiment, name: str, count: int = 1, objective: Any = None) -> tuple[Loss, Any]:
    """Return the loss of a task and its gradient, in `count` micro-batches."""
    task = built.tasks[name]
    task = replace(
        task,
        config=replace(task.config, microbatches=count),
        objective=objective or task.objective,
    )
    parameters = built.declaration.initialise(0, jnp.float64)
    merge, key = built.declaration.merge, jax.random.key(1)
    of = jax.jit(lambda p, batch: loss_and_gradient(task, merge, p, batch, key))
    return host(of(parameters, batch_of(built)))


def value(built: Experiment, objective: Objective) -> Loss:
    """Return the loss without its gradient."""
    parameters = built.declaration.initialise(0, jnp.float64)
    of = jax.jit(lambda p, batch: objective(built.declaration.merge(p), batch, jax.random.key(1)))
    return host(of(parameters, batch_of(built)))


def with_member(built: Experiment, **more: Objective) -> Sum:
    """Return the sum with further members."""
    objective: Any = built.tasks["sum"].objective
    return replace(objective, members={**objective.members, **members_of(**more)})


def members_of(**objectives: Objective) -> dict[str, Member]:
    return {n: Member(replace(o, head="none"), 2.0) for n, o in objectives.items()}


def test_a_sum_is_the_weighted_sum_of_its_members_alone(built: Experiment) -> None:
    (whole, gradient), alone = loss(built, "sum"), {n: loss(built, n) for n in WEIGHTS}
    expected = sum(w * alone[name][0].value for name, w in WEIGHTS.items())
    np.testing.assert_allclose(whole.value, expected, rtol=1e-12)
    for name, weight in WEIGHTS.items():
        np.testing.assert_allclose(whole.metrics[name], alone[name][0].value, rtol=1e-12)
        kept = whole.parts[name]
        assert kept.weight == weight and kept.count == VALID.sum()
        assert kept.compares is (name == "pairs")
    for path, found in gradient.items():
        parts = [WEIGHTS[n] * alone[n][1][path] for n in WEIGHTS]
        np.testing.assert_allclose(found, sum(parts), rtol=1e-10, atol=1e-12, err_msg=path)
    baselines = [w * alone[n][0].metrics["baseline"] for n, w in WEIGHTS.items()]
    np.testing.assert_allclose(whole.metrics["baseline"], sum(baselines), rtol=1e-12)


def test_micro_batches_keep_each_members_mean(built: Experiment) -> None:
    objective, count = with_member(built, drawn=Drawn()), 4
    (whole, gradient), (parts, summed) = (loss(built, "sum", n, objective) for n in (1, count))
    labels_B = batch_of(built).fields["label"]
    assert whole.parts["drawn"].count == np.where(VALID, labels_B + 1, 0).sum()
    assert len({int(x.sum()) for x in np.split(np.where(VALID, labels_B + 1, 0), count)}) > 1
    np.testing.assert_allclose(parts.value, whole.value, rtol=1e-10)
    for name, metric in whole.metrics.items():
        np.testing.assert_allclose(parts.metrics[name], metric, rtol=1e-10, err_msg=name)
    for path, found in summed.items():
        np.testing.assert_allclose(found, gradient[path], rtol=1e-9, atol=1e-12, err_msg=path)


def test_another_member_changes_no_draw(built: Experiment) -> None:
    draws = {}
    for names in (("drawn",), ("another", "drawn"), ("drawn", "third")):
        objective = Sum(head="sum", members=members_of(**{name: Drawn() for name in names}))
        draws[names] = value(built, objective).metrics
    values = {names: float(metrics["draw drawn"]) for names, metrics in draws.items()}
    assert len(set(values.values())) == 1
    both = draws["another", "drawn"]
    assert both["draw another"] != both["draw drawn"]
    # By the key of the row, with the member's name folded into it.
    batch, number = batch_of(built), zlib.crc32(b"drawn")
    keys = [jax.random.fold_in(k, number) for k in row_keys(batch, jax.random.key(1))]
    terms = np.where(VALID, batch.fields["label"] + 1, 0)
    drawn = np.array([jax.random.uniform(k) for k in keys])
    np.testing.assert_allclose(values["drawn",], (terms * drawn).sum() / terms.sum(), rtol=1e-6)


def flops(built: Experiment, name: str, objective: Any = None) -> float:
    """Return the FLOPs of a task's loss as XLA compiles it."""
    chosen = objective or built.tasks[name].objective

    def of(parameters: Any, batch: Batch) -> jax.Array:
        model = built.declaration.merge(parameters)
        return chosen(model, batch, jax.random.key(1)).value

    shapes = built.declaration.shapes(jnp.float32)
    compiled = jax.jit(of).lower(shapes, built.tasks["sum"].rows().batch(ROWS)).compile()
    analysis: Any = compiled.cost_analysis()
    return float(analysis["flops"])


def test_a_pass_that_members_share_is_computed_once(built: Experiment) -> None:
    together, pairs = flops(built, "sum"), flops(built, "pairs")
    classes = flops(built, "classes")
    assert together < pairs + 0.1 * classes
    # Under another mask the same tokens are another pass.
    masked = {"objective": {**PAIRS, "joint_forward": True}, "weight": 1.0}
    apart = experiment(pairs=masked, classes={"objective": CLASSES})
    assert flops(apart, "sum") > flops(built, "pairs") + 0.5 * classes


def test_auxiliary_losses_of_a_shared_pass_count_once() -> None:
    built = experiment({"experts": EXPERTS})
    objective = built.tasks["sum"].objective
    batch = batch_of(built)

    @jax.jit
    def of(parameters: Any) -> Any:
        model = built.declaration.merge(parameters)
        streams = [model.tokens(m, batch.inputs[m]) for m in PAIR]
        auxes = [model.encode([stream], None)[1].loss for stream in streams]
        return sum(auxes), objective(model, batch, jax.random.key(1))

    once, whole = of(built.declaration.initialise(0, jnp.float64))
    weighted = sum(p.weight * whole.metrics[name] for name, p in whole.parts.items())
    assert once > 0
    np.testing.assert_allclose(whole.value - weighted, once, rtol=1e-6)


def test_it_offers_what_its_members_do(built: Experiment) -> None:
    objective: Any = built.tasks["sum"].objective
    assert objective.reads() == ("a", "b") and objective.fields() == ("label",)
    assert embedded(objective) == ("a", "b") and classified(objective) == ("a",)
    assert written(objective) == () and objective.shows() == ()
    model = built.declaration.merge(built.declaration.initialise(0, jnp.float64))
    arrays = batch_of(built).inputs
    for name, call in {
        "pairs": lambda o: o.embed(model, "b", arrays["b"]),
        "classes": lambda o: o.predict(model, arrays),
    }.items():
        alone = call(built.tasks[name].objective)
        np.testing.assert_array_equal(call(objective.for_evaluation()), alone)
    with pytest.raises(UserError, match="no member of the sum writes"):
        objective.write(model, batch_of(built), jax.random.key(0))


def test_members_without_a_head_have_one_of_their_own() -> None:
    members = {n: {"objective": {**o, "head": ""}} for n, o in (("x", CLASSES), ("y", CLASSES))}
    specs = experiment(**members).declaration.specs
    assert {name.split("/")[1] for name in specs if name.startswith("heads/sum")} == {
        "sum_x",
        "sum_y",
    }


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({}, "objective.members is empty; a sum needs an objective."),
        ({"a": {"objective": CLASSES, "weight": 0}}, r"objective.members.a.weight is 0"),
        ({"a": {"objective": {"name": "clasification"}}}, "Did you mean 'classification'?"),
        ({"a": {"objective": {**CLASSES, "clases": 2}}}, "objective.members.a.objective.clases"),
        ({"a b": {"objective": CLASSES}}, "members: 'a b' is no name"),
    ],
)
def test_bad_members_are_refused_by_key(block: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        configs.component("objectives", {"name": "sum", "members": block}, "objective")
    assert build(Member, {"objective": CLASSES}, "m").weight == 1.0
