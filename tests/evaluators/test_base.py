"""Passes and evaluators: what they read, and how they are built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brightness import SOURCE, task

from mmjax.core.batch import Batch
from mmjax.core.errors import CodeError, UserError
from mmjax.evaluators.base import (
    Embed,
    LossOf,
    Pass,
    function,
    make_evaluators,
    passes_of,
    records_of,
    row_spec,
)
from mmjax.evaluators.held_out_loss import HeldOutLoss
from mmjax.evaluators.retrieval import Retrieval


def test_rows_of_a_pass_hold_what_its_output_needs() -> None:
    embedding = row_spec(task(), Pass(Embed("depth"), SOURCE, ("concept",)))
    assert set(embedding.inputs) == {"depth"} and embedding.fields == ("concept",)
    loss = row_spec(task(), Pass(LossOf(), SOURCE, ("concept", "group")))
    assert set(loss.inputs) == {"image", "depth"} and loss.fields == ("group", "concept")


def test_functions_give_one_output_per_row() -> None:
    batch = Batch(
        inputs={"image": {"pixels": np.ones((2, 4, 4, 3))}}, valid=jnp.ones(2, bool), fields={}
    )
    model: Any = 2.0
    outputs = function(task(), LossOf())(model, batch, jax.random.key(0))
    assert set(outputs) == {"loss", "auxiliary", "baseline", "terms", "weight", "compared"}
    np.testing.assert_array_equal(outputs["terms"], [1.0, 1.0])
    np.testing.assert_array_equal(outputs["loss"], [6.0, 6.0])
    np.testing.assert_array_equal(outputs["baseline"], [5.0, 5.0])
    outputs = function(task(), Embed("image"))(model, batch, jax.random.key(0))
    np.testing.assert_array_equal(outputs["vector"], np.full((2, 3), 2.0))


def test_a_record_without_a_unit_is_a_plain_number() -> None:
    evaluator = HeldOutLoss(source=SOURCE)
    assert evaluator.record(task(), "error", 1.0, 2.0, 3)["unit"] == ""
    assert evaluator.record(task(), "error", 1.0, 2.0, 3, unit="dB")["unit"] == "dB"


@dataclass(frozen=True)
class Odd(HeldOutLoss):
    """An evaluator that returns what a test gives."""

    returned: Any = None

    def passes(self, task: Any) -> Any:
        return self.returned

    def score(self, task: Any, outputs: Any) -> Any:
        return self.returned


@dataclass(frozen=True)
class Scalar(Embed):
    def outputs(self, task: Any, model: Any, batch: Any, key: Any) -> Any:
        return {"vector": jnp.zeros(5)}


def test_what_an_evaluator_returns_is_checked() -> None:
    where = r"Odd in .*test_base\.py returns"
    with pytest.raises(CodeError, match=f"^passes of {where} list; it must return Mapping"):
        passes_of(Odd(returned=[]), task())
    with pytest.raises(CodeError, match=rf"passes\['a'\] of {where} int; it must return Pass"):
        passes_of(Odd(returned={"a": 3}), task())
    with pytest.raises(CodeError, match=f"^score of {where} int"):
        records_of(Odd(returned=3), task(), {})
    with pytest.raises(CodeError, match=f"{where} a record without chance, count; make it by"):
        row = {"name": "a", "task": "b", "split": "c", "value": 1.0}
        records_of(Odd(returned=[row]), task(), {})
    batch = Batch(inputs={}, valid=jnp.ones(2, bool), fields={})
    words = r"^outputs of Scalar in .* returns 'vector' with the shape \[5\]; .* the 2 rows"
    with pytest.raises(CodeError, match=words):
        function(task(), Scalar("image"))(None, batch, jax.random.key(0))  # type: ignore[arg-type]


def test_a_record_states_which_way_is_better() -> None:
    evaluator = HeldOutLoss(source=SOURCE)
    assert evaluator.record(task(), "error", 1.0, 2.0, 3, better="lower")["better"] == "lower"
    with pytest.raises(UserError, match="'error' has better='smaller'; choose 'higher' or 'lower'"):
        evaluator.record(task(), "error", 1.0, 2.0, 3, better="smaller")


def test_evaluators_are_built_from_their_blocks() -> None:
    blocks = {
        "one": {"name": "held_out_loss", "source": SOURCE},
        "two": {"name": "retrieval", "source": SOURCE, "at": [3]},
    }
    made = make_evaluators(task(blocks))
    assert made["one"] == HeldOutLoss(source=SOURCE)
    assert made["two"] == Retrieval(source=SOURCE, at=(3,))
    with pytest.raises(UserError, match=r"tasks.bright.evaluators.one.name: .*'retrieval'\?"):
        make_evaluators(task({"one": {"name": "retrival"}}))
    with pytest.raises(UserError, match=r"Unknown config key 'tasks.bright.evaluators.one.att'"):
        make_evaluators(task({"one": {"name": "retrieval", "att": [3]}}))
