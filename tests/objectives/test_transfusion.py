"""Transfusion: what sees what, what the loss is a mean of, and what is written and drawn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import (
    BLOCK,
    CHAMELEON,
    IMAGE_FIRST,
    LENGTH,
    MIXED,
    MODALITIES,
    ROWS,
    SIZE,
    TEXT_FIRST,
    TOKENS,
    UNIDIFFUSER,
    UNTIED,
    VALID,
    VOCABULARY,
    WIDTH,
    batch,
    built,
    draws,
    noised,
    plan,
)

from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.data.tokenizer import TokenIds
from mmjax.generation.composer import Composer
from mmjax.generation.spans import Span
from mmjax.modalities.text import Text
from mmjax.objectives.base import row_keys
from mmjax.objectives.transfusion import Draws, Transfusion

pytestmark = pytest.mark.usefixtures("x64")


def reach(objective: Transfusion, drawn: Draws, *blocks: Any) -> np.ndarray:
    """Return whether the trunk's output of token s of row b depends on token t of row c: bool `[B, S, B, S]`."""
    declaration, p = built(objective, *blocks)
    model, inputs = declaration.merge(p), batch().inputs
    lengths = [TOKENS[m] for m in objective.modalities]

    def outputs(change: jax.Array) -> jax.Array:
        streams = []
        for name, part in zip(
            objective.modalities, jnp.split(change, np.cumsum(lengths)[:-1], axis=1), strict=True
        ):
            if name in objective.discrete:
                stream = objective.written(model, name, inputs[name], jnp.ones(ROWS, bool))
            else:
                x = model.stems[name].values(inputs[name], jnp.float64)
                stream, _ = objective.noisy(model, name, inputs[name], x, drawn.times[name])
            streams.append(replace(stream, x_BSD=stream.x_BSD + part))
        return objective._trunk(model, streams, drawn.swapped_B, jax.random.key(0))[0].sum(-1)

    whole = jnp.zeros((ROWS, sum(lengths), WIDTH))
    found: np.ndarray = np.asarray(jax.jit(jax.jacrev(outputs))(whole))
    return np.abs(found).sum(-1) > 0  # fmt: skip


def allowed(objective: Transfusion, swapped: np.ndarray) -> np.ndarray:
    """Return the same by the paper's words, in plain loops over items and spans."""
    lengths = {m: TOKENS[m] for m in objective.modalities}
    tokens = [
        (b, m, i) for b in range(ROWS) for m in objective.modalities for i in range(lengths[m])
    ]
    exists = {
        "text": lambda b, i: i == 0 or VALID[b, i - 1],
        "sound": lambda b, i: not (b == 1 and i >= 2),
    }

    def place(b: int, m: str) -> int:
        at = objective.modalities.index(m)
        return -at if swapped[b] else at

    found = np.zeros((len(tokens), len(tokens)), bool)
    for q, (b, m, i) in enumerate(tokens):
        for k, (c, n, j) in enumerate(tokens):
            if not exists.get(n, lambda *_: True)(c, j):
                continue
            if b != c:
                found[q, k] = (
                    objective.attend_across_items
                    and b // objective.pack == c // objective.pack
                    and c < b
                )
            elif m != n:
                both = {m, n} <= set(objective.continuous)
                found[q, k] = place(b, n) < place(b, m) or (objective.bidirectional_spans and both)
            else:
                found[q, k] = j <= i or m in objective.continuous
    size = sum(lengths.values())
    return found.reshape(ROWS, size, ROWS, size)  # fmt: skip


THREE = replace(TEXT_FIRST, modalities=("text", "image", "sound"))
CASES = {
    "text first": TEXT_FIRST,
    "image first": IMAGE_FIRST,
    "either": MIXED,
    "packed": replace(TEXT_FIRST, pack=2),
    "packed, either": replace(MIXED, pack=4),
    "a document": replace(TEXT_FIRST, pack=2, attend_across_items=True),
    "documents, either": replace(MIXED, pack=2, attend_across_items=True),
    "discrete": CHAMELEON,
    "discrete, packed": replace(CHAMELEON, pack=2, reverse_prob=0.5),
    "three": replace(THREE, pack=2),
    "mutual": UNIDIFFUSER,
    "mutual, packed": replace(THREE, pack=2, bidirectional_spans=True),
    "one": replace(TEXT_FIRST, modalities=("text",)),
}


@pytest.mark.parametrize(
    "name, kernel", [*((name, "plain") for name in CASES), ("documents, either", "chunked")]
)
def test_no_token_sees_what_the_mask_forbids(name: str, kernel: str) -> None:
    """By the gradient of every output with respect to every input, and it sees all that is allowed."""
    objective = CASES[name]
    swapped = (
        np.array([False, True, True, False]) if objective.reverse_prob else np.zeros(ROWS, bool)
    )
    found = reach(
        objective, draws(objective, jnp.asarray(swapped)), {**BLOCK, "attention_impl": kernel}
    )
    wanted = allowed(objective, swapped)
    exists = np.stack([wanted[b, :, b].any(axis=0) for b in range(ROWS)])  # pads are seen by none
    # Outputs of padding hold no promise; two layers reach what one allows, as the relation is transitive.
    np.testing.assert_array_equal(found[exists], wanted[exists])


def test_parts_by_modality_change_nothing_of_what_sees_what() -> None:
    objective = replace(MIXED, pack=2)
    swapped = np.array([False, True, True, False])
    dense = reach(objective, draws(objective, jnp.asarray(swapped)))
    np.testing.assert_array_equal(
        reach(objective, draws(objective, jnp.asarray(swapped)), UNTIED), dense
    )


@pytest.mark.parametrize(
    "name, target",
    [
        ("text first", "epsilon"),
        ("either", "v"),
        ("packed", "flow"),
        ("image first", "flow"),
        ("discrete", "v"),
        ("three", "epsilon"),
    ],
)
def test_the_loss_against_its_formula(name: str, target: str) -> None:
    objective = replace(
        CASES[name], prediction=target, condition_dropout=0.5, weights={objective_last(name): 3.0}
    )
    declaration, p = built(objective)
    model, b, key = declaration.merge(p), batch(), jax.random.key(3)
    inputs = b.inputs
    x = {m: np.asarray(model.stems[m].values(inputs[m], jnp.float64)) for m in objective.continuous}
    drawn = objective.draw(row_keys(b, key), {m: jnp.asarray(v) for m, v in x.items()})
    x_t, wanted = {}, {}
    for m in objective.continuous:
        t, e = np.asarray(drawn.times[m])[:, None, None], np.asarray(drawn.noise[m])
        alpha, sigma = 1 - t, t
        if target != "flow":
            alpha = np.cos((t + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)
            sigma = np.sqrt(1 - alpha**2)
        x_t[m] = jnp.asarray(alpha * x[m] + sigma * e)
        wanted[m] = {"epsilon": e, "v": alpha * e - sigma * x[m], "flow": e - x[m]}[target]
    out = objective.run(model, inputs, x_t, drawn, key)
    loss, total = objective(model, b, key), 0.0
    for m in objective.modalities:
        if m in objective.discrete:
            logits, ids = np.asarray(out.logits[m]), np.asarray(inputs[m]["ids"])
            logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            lost = ~np.asarray(drawn.keep_B) & first(objective, m, np.asarray(drawn.swapped_B))
            there = np.asarray(inputs[m]["valid"]) & ~lost[:, None] & np.asarray(b.valid)[:, None]
            terms = [-logs[r, i, ids[r, i]] for r, i in zip(*np.nonzero(there), strict=True)]
            weight = 1.0
        else:
            there = np.ones((ROWS, TOKENS[m]), bool)
            there[1, 2:] = m != "sound"
            error = np.square(np.asarray(out.values[m]) - wanted[m]).mean(-1)
            terms = [error[r][there[r]].mean() for r in range(ROWS) if b.valid[r]]
            weight = 5.0
        mean = np.mean(terms) if terms else 0.0
        np.testing.assert_allclose(loss.metrics[m], mean, rtol=1e-6)
        total += mean * objective.weights.get(m, weight)
    np.testing.assert_allclose(loss.value, total, rtol=1e-6)


@pytest.mark.parametrize("capacity", [{}, {"text": 10}])
def test_the_z_loss_is_the_mean_square_of_the_log_of_the_sum(capacity: Any) -> None:
    """Chameleon: 1e-5 log^2 Z of each discrete token that counts; a modality's weight holds for it too."""
    objective = replace(
        CHAMELEON, z_loss=0.1, weights={"text": 3.0}, condition_dropout=0.0, capacity=capacity
    )
    objective = replace(objective, pack=2)
    declaration, p = built(objective)
    model, b, key = declaration.merge(p), batch(), jax.random.key(3)
    drawn = objective.draw(row_keys(b, key), {})
    plain = replace(objective, capacity={}, pack=1)
    out = plain.run(model, b.inputs, {}, drawn, key)
    told = {
        "text": VALID & np.asarray(b.valid)[:, None],
        "colours": np.repeat(np.asarray(b.valid)[:, None], 4, 1),
    }
    means = {
        m: np.square(np.log(np.exp(np.asarray(out.logits[m])).sum(-1)))[told[m]].mean()
        for m in told
    }
    with_z, without = (o(model, b, key) for o in (objective, replace(objective, z_loss=0.0)))
    for m, mean in means.items():
        np.testing.assert_allclose(with_z.metrics[f"z {m}"], mean, rtol=1e-6)
    added = 0.1 * (3.0 * means["text"] + means["colours"])
    np.testing.assert_allclose(with_z.value - without.value, added, rtol=1e-6)
    assert "z text" not in without.metrics


def objective_last(name: str) -> str:
    return CASES[name].modalities[-1]


def first(objective: Transfusion, m: str, swapped: np.ndarray) -> np.ndarray:
    at, last = objective.modalities.index(m), len(objective.modalities) - 1
    return np.where(swapped, at == last, at == 0)


def test_a_span_before_a_text_is_never_noisier_than_the_limit() -> None:
    keys, x = jax.random.split(jax.random.key(0), 400), {"image": jnp.zeros((400, 4, 12))}
    drawn = IMAGE_FIRST.draw(keys, x)
    t = drawn.times["image"]
    assert 0.45 < t.max() <= 0.5 and t.min() < 0.05 and not drawn.swapped_B.any()
    drawn = TEXT_FIRST.draw(keys, x)
    assert drawn.times["image"].max() > 0.9 and 0.02 < 1 - drawn.keep_B.mean() < 0.2
    assert abs(drawn.noise["image"].std() - 1) < 0.1
    drawn = MIXED.draw(keys, x)
    t, swapped = drawn.times["image"], drawn.swapped_B
    assert 0.4 < swapped.mean() < 0.6
    assert t[swapped].max() <= 0.5 and t[~swapped].max() > 0.9


def test_times_of_spans_are_their_own() -> None:
    """UniDiffuser: which of them is conditioned on which is a choice of times."""
    keys = jax.random.split(jax.random.key(0), 400)
    x = {"image": jnp.zeros((400, 4, 12)), "sound": jnp.zeros((400, 4, 4))}
    times = UNIDIFFUSER.draw(keys, x).times
    assert abs(np.corrcoef(times["image"], times["sound"])[0, 1]) < 0.15


def test_packed_items_are_what_they_are_alone() -> None:
    """The same rows, one to a sequence or two: not a bit of difference in what counts."""
    for objective in (TEXT_FIRST, MIXED, CHAMELEON):
        declaration, p = built(objective)
        model, b, key = declaration.merge(p), batch(), jax.random.key(3)
        one, two = (replace(objective, pack=n)(model, b, key) for n in (1, 2))
        np.testing.assert_allclose(one.value, two.value, rtol=1e-10)
        shared = replace(objective, pack=2, attend_across_items=True)(model, b, key)
        assert abs(float(shared.value - one.value)) > 1e-6


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(ROWS)))
def test_a_row_is_what_it_is_in_any_company(order: list[int]) -> None:
    declaration, p = built(MIXED)
    model, b = declaration.merge(p), batch()
    keys = jax.random.split(jax.random.key(0), ROWS)
    at = jnp.asarray(order)

    def rows(b: Any, keys: jax.Array) -> Any:
        return MIXED.represent(model, replace(b, keys=keys), jax.random.key(1)).rows

    moved = rows(jax.tree.map(lambda a: a[at], b), keys[at])
    same = jax.tree.map(lambda a: a[at], rows(b, keys))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), moved, same)


# --- what is made ------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [BLOCK, UNTIED], ids=["dense", "untied"])
def test_what_is_held_predicts_as_the_whole_sequence_does(block: Any) -> None:
    declaration, p = built(TEXT_FIRST, block)
    model, inputs = declaration.merge(p), batch().inputs
    x_t = noised(TEXT_FIRST, model)
    whole = TEXT_FIRST.run(model, inputs, x_t, draws(TEXT_FIRST), jax.random.key(0))
    composer = Composer(TEXT_FIRST, model, plan(TEXT_FIRST, "image"))
    text, image = plan(TEXT_FIRST, "image")
    cache = composer.read(composer.init_cache(), [text])
    held = composer._predict(cache, [image], x_t, {"image": jnp.asarray(0.3)}, ["image"])
    np.testing.assert_allclose(held["image"], whole.values["image"], rtol=1e-9, atol=1e-9)
    told = composer.logits(composer.init_cache(), text)
    exists = np.asarray(inputs["text"]["valid"])
    np.testing.assert_allclose(told[exists], whole.logits["text"][exists], rtol=1e-9)


@pytest.mark.parametrize("objective", [IMAGE_FIRST, MIXED])
def test_a_text_is_written_as_if_each_token_were_made_anew(objective: Transfusion) -> None:
    declaration, p = built(objective, UNTIED)
    model, b = declaration.merge(p), batch()
    made = objective.write(model, b, jax.random.key(0))
    inputs, ids = dict(b.inputs), jnp.zeros((ROWS, LENGTH), jnp.int32)
    clean = {"image": model.stems["image"].values(inputs["image"], jnp.float64)}
    swapped = objective.modalities[0] == "text"  # so that the image comes first
    for at in range(LENGTH):
        inputs["text"] = {"ids": ids, "valid": jnp.ones((ROWS, LENGTH), bool)}
        out = objective.run(
            model, inputs, clean, draws(objective, swapped, time=0.0), jax.random.key(0)
        )
        ids = ids.at[:, at].set(out.logits["text"][:, at].argmax(-1).astype(jnp.int32))
    for row in range(ROWS):
        written = np.asarray(made["written"][row])
        ends = np.flatnonzero(np.asarray(ids[row]) == 3)
        length = int(ends[0]) + 1 if len(ends) else LENGTH
        np.testing.assert_array_equal(written[:length], np.asarray(ids[row])[:length])
        assert not written[length:].any()
    inputs["text"] = b.inputs["text"]
    out = objective.run(
        model, inputs, clean, draws(objective, swapped, time=0.0), jax.random.key(0)
    )
    logs = jax.nn.log_softmax(out.logits["text"])
    cost = -np.take_along_axis(np.asarray(logs), np.asarray(inputs["text"]["ids"])[..., None], -1)[
        ..., 0
    ]
    np.testing.assert_allclose(made["cost"], np.where(VALID, cost, 0).sum(1), rtol=1e-8)
    np.testing.assert_array_equal(made["tokens"], VALID.sum(1))
    assert objective.writes() == ("image", "text") and TEXT_FIRST.writes() == ()


def drawn(guidance: float, ids: jax.Array, objective: Transfusion = TEXT_FIRST) -> np.ndarray:
    declaration, p = built(objective)
    inputs = batch().inputs
    given = {**inputs, "text": {**inputs["text"], "ids": ids}}
    objective = replace(objective, guidance=guidance, sampling_steps=4)
    keys = jax.random.split(jax.random.key(0), ROWS)
    spans = [Span("text", given["text"]), Span("image", given["image"], generated=True)]
    return np.asarray(Composer(objective, declaration.merge(p), spans).compose(keys)[0])


def test_guidance_leads_away_from_what_is_drawn_without_the_text() -> None:
    ids = batch().inputs["text"]["ids"]
    other = (ids + 1) % VOCABULARY
    # Without guidance (0) the text is not seen; with it, it is.
    np.testing.assert_array_equal(drawn(0.0, ids), drawn(0.0, other))
    assert not np.allclose(drawn(1.0, ids), drawn(1.0, other))
    assert not np.allclose(drawn(1.0, ids), drawn(3.0, ids))
    assert np.abs(drawn(3.0, ids)).max() <= 1 + 1e-6


def test_text_and_pictures_in_turn() -> None:
    """Given a text, a picture is drawn, a text written after it, and another picture drawn after both."""
    objective = replace(MIXED, sampling_steps=3)
    declaration, p = built(objective)
    model, inputs = declaration.merge(p), batch().inputs
    keys = jax.random.split(jax.random.key(0), ROWS)

    def made(ids: jax.Array) -> list[np.ndarray]:
        text = {**inputs["text"], "ids": ids}
        spans = [
            Span("text", text),
            Span("image", inputs["image"], generated=True),
            Span("text", text, generated=True),
            Span("image", inputs["image"], generated=True),
        ]
        return [np.asarray(m) for m in Composer(objective, model, spans).compose(keys)]

    first, text, second = made(inputs["text"]["ids"])
    assert first.shape == second.shape == (ROWS, 4, 12) and text.shape == (ROWS, LENGTH)
    assert not np.allclose(first, second)
    other = made((inputs["text"]["ids"] + 1) % VOCABULARY)
    assert not np.allclose(first, other[0]) and not np.allclose(second, other[2])
    # The first three spans are those of a sequence that ends with them.
    shorter = Composer(
        objective,
        model,
        [Span("text", inputs["text"]), Span("image", inputs["image"], generated=True)],
    )
    np.testing.assert_allclose(np.asarray(shorter.compose(keys)[0]), first, rtol=1e-8)


def renumbered(p: dict[str, Any], number: np.ndarray) -> dict[str, Any]:
    """Return the parameters of a model whose vocabulary has other numbers: `number[i]` is the old id of new i."""
    table, logits = "stems/text/embedding", "heads/head/adapter/logits/text/kernel"
    return {**p, table: p[table][number], logits: p[logits][:, number]}


def test_the_numbers_of_special_tokens_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding 9 and end 5 in place of 0 and 3, or 5 for both: texts and what is drawn after them are the same."""
    objective, number = replace(MIXED, sampling_steps=2), np.arange(VOCABULARY)
    number[[0, 9, 3, 5]] = [9, 0, 5, 3]
    _, p = built(objective)
    inputs, keys = batch().inputs, jax.random.split(jax.random.key(0), ROWS)

    def made(p: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, Any]:
        model, b = built(objective)[0].merge(p), batch()
        spans = [
            Span("image", inputs["image"]),
            Span("text", inputs["text"], generated=True),
            Span("image", inputs["image"], generated=True),
        ]
        b.inputs["text"]["ids"] = number[b.inputs["text"]["ids"]]
        text, image = Composer(objective, model, spans).compose(keys)
        return np.asarray(text), np.asarray(image), objective.write(model, b, keys[0])["wanted"]

    # So that some texts end early.
    p["heads/head/adapter/logits/text/kernel"] = (
        p["heads/head/adapter/logits/text/kernel"].at[:, 3].multiply(3)
    )
    text, image, _ = made(p)
    ended = (text == 3).any(axis=1)
    assert ended.any() and (text[ended] == 0).any()
    monkeypatch.setattr(Text, "token_ids", lambda _: TokenIds(VOCABULARY, pad=9, begin=9, end=5))
    found, drawn, wanted = made(renumbered(p, number))
    np.testing.assert_array_equal(found, number[text])
    np.testing.assert_allclose(drawn, image, rtol=1e-9)
    np.testing.assert_array_equal(wanted[~VALID], 9)
    monkeypatch.setattr(Text, "token_ids", lambda _: TokenIds(VOCABULARY, pad=5, begin=5, end=5))
    found, drawn, wanted = made(renumbered(p, number))
    after = np.cumsum(text == 3, axis=1) - (text == 3) > 0
    np.testing.assert_array_equal(found, np.where(after, 5, number[text]))
    np.testing.assert_allclose(drawn, image, rtol=1e-9)
    np.testing.assert_array_equal(wanted[~VALID], 5)


def test_colours_are_written_after_their_text() -> None:
    declaration, p = built(CHAMELEON)
    model, b = declaration.merge(p), batch()
    shown = CHAMELEON.show(model, b, jax.random.key(0))
    assert {v.shape for v in shown.values()} == {(ROWS, 2, 2, 3)} and len(shown) == 2
    given, drawn = shown.values()
    ids = np.asarray(b.inputs["colours"]["ids"])
    assert np.asarray(given)[..., 0].reshape(ROWS, 4).tolist() == (64 + 128 * (ids // 4)).tolist()
    assert set(np.unique(drawn)) <= {64, 192}


def test_one_of_two_spans_is_drawn_given_the_other_or_both_together() -> None:
    """UniDiffuser's three ways: joint, and each conditioned on the other."""
    objective = replace(UNIDIFFUSER, sampling_steps=3)
    declaration, p = built(objective)
    model, inputs = declaration.merge(p), batch().inputs
    keys = jax.random.split(jax.random.key(0), ROWS)

    def made(given: str, change: float) -> list[np.ndarray]:
        sound = {**inputs["sound"], "mel": inputs["sound"]["mel"] + change}
        arrays = {"image": inputs["image"], "sound": sound}
        spans = [Span(m, arrays[m], generated=m != given) for m in objective.modalities]
        return [np.asarray(x) for x in objective.compose(model, spans, keys)]

    image, sound = made("", 0.0)
    assert image.shape == (ROWS, SIZE, SIZE, 3) and sound.shape == (ROWS, 4, 4)
    np.testing.assert_array_equal(made("", 1.0)[0], image)
    [one], [other] = made("sound", 0.0), made("sound", 1.0)
    assert (one != other).any() and (one != image).any()
    with pytest.raises(UserError, match="need different modalities"):
        objective.compose(model, [Span("image", inputs["image"], generated=True)] * 2, keys)


def test_what_a_given_span_tells_is_what_it_tells_in_training() -> None:
    """Spans that see each other are predicted in one block, the given one at time 0."""
    declaration, p = built(UNIDIFFUSER)
    model, inputs = declaration.merge(p), batch().inputs
    x, drawn = noised(UNIDIFFUSER, model), draws(UNIDIFFUSER)
    drawn = replace(drawn, times={"image": drawn.times["image"], "sound": jnp.zeros(ROWS)})
    whole = UNIDIFFUSER.run(model, inputs, x, drawn, jax.random.key(0))
    spans = plan(UNIDIFFUSER, "image")
    composer = Composer(UNIDIFFUSER, model, spans)
    times = {"image": jnp.asarray(0.3), "sound": jnp.asarray(0.0)}
    held = composer._predict(composer.init_cache(), spans, x, times, ["image"])
    np.testing.assert_allclose(held["image"], whole.values["image"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["packed", "packed, either", "discrete, packed"])
def test_a_recurrence_reads_items_in_their_order_and_nothing_after(name: str) -> None:
    """Mixture-of-Mamba: the tokens of a picture, too, see those before them alone."""
    objective = CASES[name]
    swapped = (
        np.array([False, True, True, False]) if objective.reverse_prob else np.zeros(ROWS, bool)
    )
    block = {"name": "mamba", "state": 2}
    parts = ["in", "x", "dt", "out"]
    found = reach(
        objective,
        draws(objective, jnp.asarray(swapped)),
        {**block, "per_modality": {"parts": parts, "modalities": list(objective.modalities)}},
    )
    wanted, size = allowed(objective, swapped), found.shape[1]
    starts = np.cumsum([0, *(TOKENS[m] for m in objective.modalities)])
    for start, end in zip(starts[:-1], starts[1:], strict=True):
        within = np.tril(np.ones((end - start, end - start), bool))
        for row in range(ROWS):
            wanted[row, start:end, row, start:end] &= within
    exists = np.stack([allowed(objective, swapped)[b, :, b].any(axis=0) for b in range(ROWS)])
    assert size == wanted.shape[1]
    np.testing.assert_array_equal(found[exists], wanted[exists])


@pytest.mark.parametrize("name", ["image", "sound", "video"])
def test_a_stem_of_its_own_values_is_the_stem(name: str) -> None:
    """And of others it is another, at the same places."""
    stem = Declaration(MODALITIES[name].stem(WIDTH))
    p = jax.jit(stem.initialise)(0)
    arrays, call = batch().inputs[name], stem.merge(p)
    values = call.values(arrays, jnp.float32)
    whole, again = call(arrays), call(arrays, values)
    np.testing.assert_array_equal(whole.x_BSD, again.x_BSD)
    assert call.bound is None or float(jnp.abs(values).max()) <= call.bound
    other = call(arrays, values + 1)
    assert not np.allclose(other.x_BSD, whole.x_BSD)
    kernel = p["embed/kernel"].sum(axis=0)
    np.testing.assert_allclose(
        other.x_BSD - whole.x_BSD, jnp.broadcast_to(kernel, whole.x_BSD.shape), atol=1e-5
    )


def test_spans_of_text_video_and_sound_learn_together() -> None:
    objective = replace(
        TEXT_FIRST, modalities=("text", "video", "sound"), pack=2, prediction="flow"
    )
    declaration, p = built(objective)
    loss = objective(declaration.merge(p), batch(), jax.random.key(0))
    assert set(loss.metrics) >= {"text", "video", "sound"} and np.isfinite(loss.value)
    parts = [float(loss.metrics[m]) for m in objective.modalities]
    np.testing.assert_allclose(loss.value, parts[0] + 5 * (parts[1] + parts[2]), rtol=1e-6)


def test_a_unet_reads_the_noise_and_the_time() -> None:
    objective = replace(TEXT_FIRST, unet_channels=4)
    declaration, p = built(objective)
    model = declaration.merge(p)
    assert [n for n in declaration.specs if "/unet/" in n]
    loss = objective(model, batch(), jax.random.key(0))
    plain = {n: jnp.zeros_like(v) if "/unet/" in n else v for n, v in p.items()}
    without = objective(declaration.merge(plain), batch(), jax.random.key(0))
    assert abs(float(loss.value - without.value)) > 1e-3
    grad = jax.jit(
        jax.grad(lambda p: objective(declaration.merge(p), batch(), jax.random.key(0)).value)
    )(p)
    assert all(float(jnp.abs(g).max()) > 0 for n, g in grad.items() if "/unet/" in n)


@pytest.mark.parametrize(
    "words, said",
    [
        ({"modalities": ("text", "text")}, "modalities is .*names each modality once"),
        ({"modalities": ("image",)}, "'text' is not in modalities"),
        ({"max_time": 2}, "max_time is 2"),
        ({"pack": 0}, "pack is 0"),
        ({"weights": {"speech": 1.0}}, "'speech' is not in modalities"),
        ({"z_loss": -1.0}, "z_loss is -1.0"),
    ],
)
def test_settings_that_make_no_sense(words: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Transfusion(**words)


def test_modalities_that_are_not_what_the_config_says() -> None:
    for other in ("sound", "video"):
        with pytest.raises(UserError, match=f"channels is 4, but '{other}' holds no pictures"):
            built(replace(TEXT_FIRST, modalities=("text", other), unet_channels=4))
    with pytest.raises(UserError, match="modality 'image' has no token ids"):
        built(replace(TEXT_FIRST, discrete=("text", "image")))
    with pytest.raises(UserError, match="modality 'colours' has token ids"):
        built(replace(CHAMELEON, discrete=("text",)))
    declaration, p = built(replace(TEXT_FIRST, pack=3))
    with pytest.raises(UserError, match="4 rows do not make sequences of 3 items"):
        replace(TEXT_FIRST, pack=3)(declaration.merge(p), batch(), jax.random.key(0))
