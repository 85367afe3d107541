"""Texts of a sequence in slots that they share: each item is what it is alone, and padding is skipped."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sequences import (
    BLOCK,
    CHAMELEON,
    LENGTH,
    MIXED,
    ROWS,
    TEXT_FIRST,
    UNTIED,
    VALID,
    batch,
    built,
    draws,
    noised,
    plan,
)

from mmjax.core.batch import Batch
from mmjax.core.errors import UserError
from mmjax.engine.gradient import loss_and_gradient
from mmjax.generation.composer import Composer
from mmjax.nn.attention_kernels import choose
from mmjax.objectives.base import Objective, row_keys
from mmjax.objectives.transfusion import Transfusion

ROTARY = {**BLOCK, "rotary": 100.0}
MAMBA = {
    "name": "mamba",
    "state": 2,
    "per_modality": {"parts": ["in"], "modalities": ["text", "image"]},
}
ROOMY = {"text": 10}  # the texts of two rows have at most 8 tokens, and a token before each
CASES: dict[str, tuple[Transfusion, Any]] = {
    # A text that is dropped would leave a hole in the positions of slots, and leaves none in shared ones.
    "in order": (replace(TEXT_FIRST, pack=2, capacity=ROOMY, condition_dropout=0.0), ROTARY),
    "either order": (replace(MIXED, pack=2, capacity=ROOMY), {**UNTIED, "rotary": 100.0}),
    "colours": (replace(CHAMELEON, pack=2, reverse_prob=0.5, capacity=ROOMY), ROTARY),
    "one sequence": (replace(MIXED, pack=4, capacity={"text": 19}, condition_dropout=0.5), ROTARY),
    "text alone": (replace(TEXT_FIRST, modalities=("text",), pack=2, capacity=ROOMY), ROTARY),
    "a recurrence": (replace(MIXED, pack=2, capacity=ROOMY), MAMBA),
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("x64")


def alone(
    objective: Transfusion, model: Any, b: Any, key: jax.Array, valid: np.ndarray = VALID
) -> Any:
    """Return the rows, each represented by itself in slots for no more than its own text."""
    keys, rows = row_keys(b, key), []
    single = replace(objective, pack=1, capacity={}, window=0)
    for row in range(ROWS):
        own = jax.tree.map(lambda x, row=row: x[row : row + 1], replace(b, keys=keys))
        length = int(valid[row].sum())
        own.inputs["text"] = {n: x[:, :length] for n, x in own.inputs["text"].items()}
        rows.append(single.represent(model, own, key).rows)
    return jax.tree.map(lambda *x: jnp.concatenate(x), *rows)


def without_cut(rows: Any) -> Any:
    return {m: {k: v for k, v in row.items() if k != "cut"} for m, row in rows.items()}


@pytest.mark.parametrize("name", CASES)
def test_items_that_share_slots_are_what_they_are_alone(name: str) -> None:
    """Sums and counts of each row, and the gradient of the whole loss, to 1e-10."""
    objective, block = CASES[name]
    declaration, p = built(objective, block)
    b, key = batch(), jax.random.key(3)

    def shared(p: Any) -> Any:
        rows = objective.represent(declaration.merge(p), b, key).rows
        return objective.compare(declaration.merge(p), rows, b).value, rows

    def apart(p: Any) -> Any:
        rows = alone(objective, declaration.merge(p), b, key)
        return objective.compare(declaration.merge(p), rows, b).value, rows

    found, wanted = (jax.jit(jax.value_and_grad(f, has_aux=True))(p) for f in (shared, apart))
    valid = np.asarray(b.valid)
    assert all(not row["cut"].any() for row in found[0][1].values() if "cut" in row)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[valid], b[valid], rtol=1e-10),
        without_cut(found[0][1]),
        wanted[0][1],
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), found[1], wanted[1]
    )


@pytest.mark.parametrize("case", [TEXT_FIRST, MIXED], ids=["in order", "either order"])
def test_items_of_a_document_see_those_before_them(case: Transfusion) -> None:
    """`across`, in shared slots and in slots of their own; without rotations, only the order matters."""
    slots = replace(case, pack=2, attend_across_items=True)
    declaration, p = built(slots)
    model, b, key = declaration.merge(p), batch(), jax.random.key(3)
    b = replace(b, valid=jnp.ones(ROWS, bool))
    wanted, found, single = (
        jax.jit(lambda each=each: each.represent(model, b, key).rows)()
        for each in (
            slots,
            replace(slots, capacity=ROOMY),
            replace(slots, attend_across_items=False),
        )
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), without_cut(found), wanted
    )
    assert abs(single["image"]["sum"][1] - wanted["image"]["sum"][1]) > 1e-6


def test_texts_over_the_capacity_are_cut_to_one_length_and_keep_their_end() -> None:
    """Lengths 3 and 5 in six slots after their beginnings: 3 each; 1 and 2 stay whole."""
    objective = replace(TEXT_FIRST, modalities=("text",), pack=2, capacity={"text": 8})
    declaration, p = built(objective, ROTARY)
    model, b, key = declaration.merge(p), batch(), jax.random.key(3)
    b = replace(b, valid=jnp.ones(ROWS, bool))
    ids = np.array(b.inputs["text"]["ids"])
    ids[1, 2] = ids[1, 4]
    short = np.array(VALID)
    short[1, 3:] = False
    text = {"ids": jnp.asarray(ids), "valid": jnp.asarray(short)}
    cut = replace(b, inputs={**b.inputs, "text": text})
    wanted = jax.jit(lambda: alone(objective, model, cut, key, short))()
    found = jax.jit(lambda: objective.represent(model, b, key).rows)()
    np.testing.assert_allclose(found["text"]["sum"], wanted["text"]["sum"], rtol=1e-10)
    np.testing.assert_array_equal(found["text"]["count"], [3, 3, 1, 2])
    np.testing.assert_array_equal(found["text"]["cut"], [0, 2, 0, 0])
    metrics = objective.compare(model, found, b).metrics
    np.testing.assert_allclose(metrics["cut text"], 2 / 11)
    # Evaluation cuts nothing.
    whole = objective.for_evaluation()
    assert isinstance(whole, Transfusion)
    wanted = jax.jit(lambda: alone(objective, model, b, key))()
    np.testing.assert_allclose(
        whole.represent(model, b, key).rows["text"]["sum"], wanted["text"]["sum"], rtol=1e-10
    )


def test_a_row_that_is_not_valid_takes_no_slot() -> None:
    """Its text and the sequence's others need nine slots; without it five are enough, and none is cut."""
    objective = replace(
        TEXT_FIRST, modalities=("text",), pack=2, capacity={"text": 7}, condition_dropout=0.0
    )
    declaration, p = built(objective, ROTARY)
    model, b, key = declaration.merge(p), batch(), jax.random.key(3)
    b = replace(b, valid=jnp.array([False, True, True, True]))
    rows = jax.jit(lambda: objective.represent(model, b, key).rows["text"])()
    wanted = jax.jit(lambda: alone(objective, model, b, key)["text"])()
    np.testing.assert_allclose(rows["sum"][1:], wanted["sum"][1:], rtol=1e-10)
    assert not rows["cut"].any() and rows["count"][0] == 0


def test_micro_batches_keep_sequences_together() -> None:
    """A loss of documents is that of the whole batch, whose documents they have."""
    objective = replace(TEXT_FIRST, pack=2, attend_across_items=True)
    declaration, p = built(objective)

    def value(count: int) -> Any:
        config = SimpleNamespace(microbatches=count)
        task: Any = SimpleNamespace(config=config, objective=objective, name="task")
        task.loss = lambda model, batch, key: objective(model, batch, key)
        loss, grads = loss_and_gradient(task, declaration.merge, p, batch(), jax.random.key(3))
        return loss.value, grads

    whole, parts = (jax.jit(value, static_argnums=0)(count) for count in (1, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), whole, parts)


@pytest.mark.parametrize("pack, capacity", [(2, {}), (2, {"text": 7}), (4, {"text": 14})])
def test_occupancy_counts_the_tokens_that_sequences_hold(pack: int, capacity: Any) -> None:
    objective = replace(MIXED, pack=pack, capacity=capacity, condition_dropout=0.4)
    declaration, p = built(objective)
    model, b = declaration.merge(p), batch()
    b = replace(b, valid=jnp.array([True, True, True, False]))
    for seed in range(4):
        key = jax.random.key(seed)
        x = {"image": jnp.zeros((ROWS, 4, 12))}
        drawn = objective.draw(row_keys(b, key), x)
        lengths = []
        for row in range(ROWS):
            lost = not drawn.keep_B[row] and not drawn.swapped_B[row]
            lengths.append(0 if lost else int(VALID[row].sum()))
        lengths[3] = 0 if capacity else lengths[3]  # it takes no slot
        room = (capacity or {"text": pack * (LENGTH + 1)})["text"] - pack
        for start in range(0, ROWS, pack):
            limit, group = LENGTH, slice(start, start + pack)
            while sum(min(n, limit) for n in lengths[group]) > room:
                limit -= 1
            lengths[group] = [min(n, limit) for n in lengths[group]]
        found = objective.occupancy(model, b, key)
        assert int(found.valid) == sum(n + 1 + 4 for n in lengths[:3])
        slots = ROWS // pack * (capacity or {"text": pack * (LENGTH + 1)})["text"]
        assert found.positions == slots + ROWS * 4


def test_occupancy_of_other_objectives_is_that_of_their_tokens() -> None:
    """Of three valid rows, 3, 5 and 2 pieces and four patches each; the positions hold all four rows."""
    declaration, p = built(TEXT_FIRST)
    b = batch()
    assert np.asarray(b.valid).tolist() == [True, True, False, True]
    found = Objective.occupancy(TEXT_FIRST, declaration.merge(p), b, jax.random.key(0))
    assert int(found.valid) == 3 + 5 + 2 + 3 * 4 and found.positions == ROWS * (LENGTH + 4)


def test_rows_of_a_window_are_grouped_by_their_texts_lengths() -> None:
    objective = replace(TEXT_FIRST, pack=2, capacity={"text": 8}, window=4)
    rows = [Batch({"text": {"valid": np.arange(9) < n}}, {}, True) for n in (8, 1, 2, 7)]
    assert [objective.window_rows(batch) for batch in (2, 8)] == [2, 4]
    assert objective.arranged(rows) == [0, 1, 2, 3]
    assert objective.arranged([rows[i] for i in (0, 3, 1, 2)]) == [0, 2, 1, 3]


def test_a_kernel_that_needs_a_static_mask_can_attend_where_spans_lie_in_order() -> None:
    """Splash attention takes static factors and one `Same`; a text's order is known from how it lies."""
    objective = replace(TEXT_FIRST, pack=2, capacity=ROOMY)
    declaration, p = built(objective)
    model, found = declaration.merge(p), []
    encode = model.encode

    def spy(streams: Any, key: Any, mask: Any) -> Any:
        [stream] = streams
        pairs = replace(stream, mask=mask).pairs()
        q = jnp.zeros((2, stream.x_BSD.shape[1], 1, 4), jnp.bfloat16)
        found.append(choose("splash", "tpu", q, q, pairs))
        return encode(streams, key, mask)

    stand_in: Any = SimpleNamespace(
        stems=model.stems, heads=model.heads, tokens=model.tokens, encode=spy
    )
    for each in (objective, replace(objective, reverse_prob=0.5)):
        each.represent(stand_in, batch(), jax.random.key(0))
    assert found == ["splash", "plain"]


@pytest.mark.parametrize("block", [ROTARY, MAMBA], ids=["rotary", "a recurrence"])
def test_what_is_held_predicts_as_the_shared_slots_do(block: Any) -> None:
    """A picture after its text, span by span, is at the distance from it that it had in training."""
    objective = replace(TEXT_FIRST, pack=2, capacity=ROOMY)
    declaration, p = built(objective, block)
    model, inputs = declaration.merge(p), batch().inputs
    x_t = noised(objective, model)
    whole = objective.run(model, inputs, x_t, draws(objective), jax.random.key(0))
    text, image = plan(objective, "image")
    composer = Composer(objective, model, [text, image])
    cache = composer.read(composer.init_cache(), [text])
    held = composer._predict(cache, [image], x_t, {"image": jnp.asarray(0.3)}, ["image"])
    np.testing.assert_allclose(held["image"], whole.values["image"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "words, said",
    [
        ({"capacity": {"image": 20}}, "capacity names 'image', which is not in discrete"),
        ({"capacity": {"text": 7}, "pack": 4}, "capacity of 'text' is 7.*at least 8"),
        (
            {"capacity": {"text": 8}, "pack": 4, "window": 6},
            "window is 6; expected 0 or a multiple",
        ),
        ({"window": 4}, "window is 4, which groups items by length for `capacity`"),
        (
            {"capacity": {"text": 8}, "window": 4, "attend_across_items": True},
            "not those of documents",
        ),
    ],
)
def test_capacities_that_make_no_sense(words: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        replace(TEXT_FIRST, **words)
    with pytest.raises(UserError, match="capacity names 'colours', which is no text"):
        built(replace(CHAMELEON, capacity={"colours": 20}))
