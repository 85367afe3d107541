"""What every objective has from its base: defaults, losses of several means, and keys of rows."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.core.batch import Batch
from mmjax.core.errors import UserError
from mmjax.modalities.base import EXISTS, Input
from mmjax.nn.stream import Stream
from mmjax.objectives.base import (
    Classifies,
    Composes,
    Coupled,
    Embeds,
    Loss,
    Objective,
    Part,
    Represented,
    Shows,
    Writes,
    able,
    classified,
    composed,
    embedded,
    refuse_drop,
    row_keys,
    with_rows,
    written,
)


@dataclass(frozen=True)
class Plain(Objective):
    """Reads two modalities, and offers only its loss."""

    def reads(self) -> tuple[str, ...]:
        return ("image", "text")

    def heads(self, width: int, inputs: Any) -> dict[str, Any]:
        return {}

    def __call__(self, model: Any, batch: Any, key: Any) -> Loss:
        return Loss(jnp.zeros(()))


def input_of(name: str, instances: int = 0, drop: float = 0.0) -> Input:
    modality: Any = SimpleNamespace()
    return Input(name, modality, SimpleNamespace(field=name, token_drop=drop), instances)


def test_a_plain_objective_keeps_rows_as_they_come() -> None:
    plain = Plain()
    assert plain.head == "" and plain.fields() == () and plain.for_evaluation() is plain
    assert (plain.rows_together(), plain.window_rows(8)) == (1, 1)
    assert list(plain.arranged(["a", "b", "c"])) == [0, 1, 2]
    plain.check_example(None)  # type: ignore[arg-type]


def test_an_objective_without_its_loss_cannot_be_made() -> None:
    class Unfinished(Plain):
        __call__ = Objective.__call__

    with pytest.raises(TypeError, match="abstract"):
        Unfinished()  # type: ignore[abstract]


def test_several_instances_are_refused_unless_an_objective_takes_them() -> None:
    Plain().check_inputs({"image": input_of("image")})
    with pytest.raises(UserError, match="Plain takes one instance of 'image'; remove 'instances'"):
        Plain().check_inputs({"text": input_of("text"), "image": input_of("image", instances=2)})


def test_dropped_tokens_are_refused_by_those_that_need_all() -> None:
    refuse_drop(Plain(), {"image": input_of("image")})
    with pytest.raises(UserError, match="Plain needs all tokens of 'image'; remove 'token_drop'"):
        refuse_drop(Plain(), {"image": input_of("image", drop=0.5)})


# --- what else it offers ------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [Embeds, Classifies, Writes, Composes, Shows])
def test_what_an_objective_does_not_offer_is_refused_by_its_name(capability: Any) -> None:
    words = f"objective Plain is none that {capability.__name__.lower()}"
    with pytest.raises(UserError, match=words):
        able(Plain(), capability)


def test_an_objective_that_offers_something_is_returned_itself() -> None:
    class Embedding(Plain, Embeds):
        def embeds(self) -> tuple[str, ...]:
            return ("image",)

        def embed(self, model: Any, modality: str, arrays: Any, relative_to: str = "") -> Any:
            raise NotImplementedError

    objective = Embedding()
    assert able(objective, Embeds) is objective
    assert embedded(objective) == ("image",) and embedded(Plain()) == ()
    assert classified(objective) == written(objective) == composed(objective) == ()


# --- losses -------------------------------------------------------------------------------------

VALID = jnp.asarray([True, True, True, False])


def test_a_loss_is_a_mean_over_its_valid_rows_unless_it_counts_itself() -> None:
    assert float(Loss(jnp.float32(2)).terms(VALID)) == 3
    assert float(Loss(jnp.float32(2), count=jnp.int32(7)).terms(VALID)) == 7
    assert Loss(jnp.bfloat16(2)).terms(VALID).dtype == jnp.bfloat16
    [(name, part)] = Loss(jnp.float32(2)).means(VALID).items()
    assert (name, float(part.count), part.weight, part.compares) == ("", 3.0, 1.0, False)


def test_no_gradient_flows_into_a_count() -> None:
    def terms(x: jax.Array) -> jax.Array:
        return Loss(x, count=2 * x).terms(VALID)

    assert float(jax.grad(terms)(jnp.float32(3))) == 0


def test_a_loss_is_empty_where_none_of_its_means_has_a_term() -> None:
    def loss(one: int, two: int) -> Loss:
        parts = {"a": Part(1.0, jnp.int32(one)), "b": Part(0.5, jnp.int32(two))}
        return Loss(jnp.zeros(()), parts=parts)

    empty = [bool(loss(one, two).is_empty(VALID)) for one, two in ((0, 0), (0, 2), (3, 0), (3, 2))]
    assert empty == [True, False, False, False]
    assert not Loss(jnp.zeros(())).is_empty(VALID)
    assert Loss(jnp.zeros(())).is_empty(jnp.zeros(4, bool))


def test_a_coupled_loss_adds_what_the_trunk_adds() -> None:
    class Aux:
        loss, proposals = jnp.float32(0.25), {"counts": jnp.int32(5)}

        def metrics(self) -> dict[str, jax.Array]:
            return {"balance": jnp.float32(0.25)}

    @dataclass(frozen=True)
    class Compared(Coupled, Plain):
        __call__ = Coupled.__call__  # type: ignore[assignment]

        def represent(self, model: Any, batch: Any, key: Any) -> Represented:
            return Represented(batch["x"] * model, Aux())  # type: ignore[arg-type]

        def compare(self, model: Any, rows: Any, batch: Any) -> Loss:
            return Loss(
                rows.sum(), {"largest": rows.max()}, {"scale": jnp.int32(1), "counts": jnp.int32(2)}
            )

    loss = Compared()(2.0, {"x": jnp.asarray([1.0, 3.0])}, jax.random.key(0))  # type: ignore[arg-type]
    assert float(loss.value) == 8.25
    assert {n: float(v) for n, v in loss.metrics.items()} == {"largest": 6.0, "balance": 0.25}
    assert {n: int(v) for n, v in loss.proposals.items()} == {"scale": 1, "counts": 7}


# --- rows ---------------------------------------------------------------------------------------


def test_tokens_of_valid_rows_and_instances_are_counted() -> None:
    """Two rows of two instances each of a text; the second row is no example."""
    streams = {
        "image": Stream(jnp.zeros((2, 4, 3))),
        "text": Stream(jnp.zeros((4, 3, 3)), jnp.asarray([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]], bool)),
    }  # fmt: skip
    model: Any = SimpleNamespace(tokens=lambda name, arrays: streams[name])
    batch = Batch(inputs={"image": None, "text": None}, valid=jnp.asarray([True, False]), fields={})
    occupancy = Plain().occupancy(model, batch, jax.random.key(0))
    assert int(occupancy.valid) == 4 + 3
    assert occupancy.positions == 2 * 4 + 4 * 3


def test_every_modality_learns_which_rows_exist() -> None:
    batch = Batch(inputs={"a": {"x": 1}, "b": {}}, valid=VALID, fields={"id": 2})
    passed = with_rows(batch)
    assert passed.inputs == {"a": {"x": 1, EXISTS: VALID}, "b": {EXISTS: VALID}}
    assert passed.fields == {"id": 2} and batch.inputs["b"] == {}


def bits(keys: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(keys))


def test_a_row_has_the_same_key_in_whatever_part_of_a_batch_it_comes() -> None:
    key = jax.random.key(3)
    whole = bits(row_keys(Batch({}, {}, jnp.ones(6, bool)), key))
    assert len(np.unique(whole, axis=0)) == 6
    part = bits(row_keys(Batch({}, {}, jnp.ones(2, bool)), key, first=4))
    np.testing.assert_array_equal(part, whole[4:])


def test_keys_of_rows_are_none_that_an_objective_folds_in_and_may_be_given() -> None:
    key = jax.random.key(3)
    folded = bits(jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(8)))
    rows = bits(row_keys(Batch({}, {}, jnp.ones(8, bool)), key))
    assert not {tuple(k) for k in folded.tolist()} & {tuple(k) for k in rows.tolist()}
    mine = jax.random.split(key, 2)
    assert row_keys(Batch({}, {}, jnp.ones(2, bool), mine), key) is mine
