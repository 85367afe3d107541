"""CrossModalNCE and MIL-NCE against loops; heads, instances that are missing, and a run with its evaluation."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toyrun
from flax import nnx
from toyrun import block

from mmjax.core.batch import Batch
from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.engine.steps import positions
from mmjax.modalities.base import PRESENT
from mmjax.nn.stream import Aux, Stream, no_aux
from mmjax.nn.towers import Widths
from mmjax.objectives.contrastive import info_nce
from mmjax.objectives.cross_modal import CrossModal, bag_logits

B, E = 5, 4
NAMES = ("vision", "sound", "text")
COUNTS = {"vision": 2, "sound": 1, "text": 3}
VALID = np.array([True, True, False, True, True])


pytestmark = pytest.mark.usefixtures("x64")


def rows_of(seed: int = 0, **counts: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    counts = counts or COUNTS
    present = {m: rng.random((B, n)) < 0.7 for m, n in counts.items()}
    for each in present.values():
        each[0] = True
    present["text"][3] = False  # an example without any text
    vectors = {
        f"{one} {two}": rng.normal(size=(B, counts[one], E))
        for one in NAMES
        for two in NAMES
        if one != two
    }
    return {"present": present, "vectors": vectors}


class Head(dict):
    """A model whose heads give these temperatures."""

    @property
    def heads(self) -> Any:
        return {"h": {f"temperature_{k}": (lambda v=v: jnp.asarray(v)) for k, v in self.items()}}


TEMPERATURES = {"vision_sound": 0.5, "vision_text": 0.7, "sound_text": 1.3}


def by_loops(
    rows: Any,
    weights: dict[str, float],
    concept: np.ndarray,
    temperatures: dict[str, float] = TEMPERATURES,
) -> float:
    """Compute as Miech et al. (2020), equation 1, for each pair in both directions; the mean over pairs, by weight."""
    total = part = 0.0
    for one, two in combinations(NAMES, 2):
        weight = weights.get(f"{one} {two}", 1.0)
        t = temperatures[f"{one}_{two}"]
        a, b = rows["vectors"][f"{one} {two}"], rows["vectors"][f"{two} {one}"]
        here, there = rows["present"][one], rows["present"][two]
        bag = np.full((B, B), -np.inf)
        for i, j in np.ndindex(B, B):
            each = [
                a[i, n] @ b[j, m] / t
                for n in range(a.shape[1])
                for m in range(b.shape[1])
                if here[i, n] and there[j, m]
            ]
            bag[i, j] = np.logaddexp.reduce(each) if each else -np.inf
        rows_ = [i for i in range(B) if VALID[i] and here[i].any() and there[i].any()]
        losses = []
        for logits in (bag, bag.T):
            for i in rows_:
                among = np.logaddexp.reduce([logits[i, j] for j in rows_])
                own = [logits[i, j] for j in rows_ if concept[j] == concept[i]]
                losses.append(among - np.mean(own))
        total, part = total + weight * np.sum(losses) / 2 / len(rows_), part + weight
    return float(total / part)


@pytest.mark.parametrize("weights", [{}, {"vision text": 2.0, "sound text": 0.0}])
@pytest.mark.parametrize("concept", [np.arange(B), np.array([7, 8, 7, 8, 7])])
def test_against_loops_with_its_gradient(weights: dict[str, float], concept: np.ndarray) -> None:
    objective = CrossModal(
        modalities=NAMES, weights=weights, positive_key="c", head="h", embed_dim=E
    )
    rows, model = rows_of(), Head(TEMPERATURES)
    inputs = {m: {PRESENT: jnp.asarray(p)} for m, p in rows["present"].items()}
    batch: Any = Batch(
        valid=jnp.asarray(VALID), fields={"c": jnp.asarray(concept)}, inputs=inputs,
    )  # fmt: skip

    def loss(vectors: Any) -> Any:
        made: Any = model
        return objective.compare(made, vectors, batch).value

    vectors = {n: jnp.asarray(v) for n, v in rows["vectors"].items()}
    value, gradient = jax.value_and_grad(loss)(vectors)
    assert float(value) == pytest.approx(by_loops(rows, weights, concept), rel=1e-12)
    way = {n: np.random.default_rng(9).normal(size=v.shape) for n, v in vectors.items()}
    step = 1e-6
    moved = [
        by_loops({**rows, "vectors": {n: v + s * step * way[n] for n, v in vectors.items()}}, weights, concept)
        for s in (1, -1)
    ]  # fmt: skip
    along = sum(float((gradient[n] * way[n]).sum()) for n in vectors)
    assert along == pytest.approx((moved[0] - moved[1]) / 2 / step, rel=1e-6)
    for name, g in gradient.items():
        one = name.split()[0]
        assert np.isfinite(g).all() and not g[~rows["present"][one]].any()


def test_one_instance_each_is_the_plain_loss() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, B, E))
    ones = jnp.ones((B, 1), bool)
    logits = bag_logits(jnp.asarray(a[:, None] / 0.3), jnp.asarray(b[:, None]), ones, ones)
    np.testing.assert_allclose(logits, a @ b.T / 0.3, rtol=1e-12)
    objective = CrossModal(modalities=("vision", "text"), head="h", embed_dim=E)
    rows = {"vision text": jnp.asarray(a[:, None]), "text vision": jnp.asarray(b[:, None])}
    model: Any = Head({"vision_text": 0.3})
    batch = Batch(valid=jnp.asarray(VALID), inputs={"vision": {}, "text": {}}, fields={})
    found = objective.compare(model, rows, batch)
    wanted = info_nce(
        jnp.asarray(a), jnp.asarray(b), jnp.asarray(1 / 0.3), jnp.arange(B), jnp.asarray(VALID)
    )
    assert float(found.value) == pytest.approx(float(wanted.loss), rel=1e-12)
    assert float(found.metrics["batch_recall vision text"]) == float(wanted.recall)


@pytest.mark.parametrize(
    ("space", "parts"),
    [
        ("disjoint", {"vision_to_sound", "vision_to_text", "sound_to_vision", "text_to_vision"}),
        ("linear", {"vision", "sound", "text"}),
    ],
)
def test_heads_are_of_the_pairs_that_count(space: str, parts: set[str]) -> None:
    objective = CrossModal(modalities=NAMES, weights={"sound text": 0.0}, space=space)
    temperatures = {"temperature_vision_sound", "temperature_vision_text"}
    assert set(objective.heads(Widths.same(8), {})) == {*parts, *temperatures}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"modalities": ("text",)}, "two different modalities"),
        ({"modalities": ("text", "text")}, "two different modalities"),
        ({"modalities": NAMES, "space": "linar"}, "Did you mean 'linear'"),
        ({"modalities": NAMES, "init_temperature": 0.0}, "must be above 0"),
        ({"modalities": NAMES, "weights": {"text vision": 1.0}}, "no pair 'text vision'.*'vision text'"),
        ({"modalities": NAMES[:2], "weights": {"vision sound": 0.0}}, "every pair has the weight 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(words: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        CrossModal(**words)


# --- the head ----------------------------------------------------------------------------------

WIDTH = 6


class Given:
    """A model whose trunk passes its tokens on: each instance is one token, its pooled vector."""

    def __init__(self, heads: Any):
        self.heads = {"h": heads}

    def tokens(self, modality: str, arrays: Any) -> Stream:
        return Stream(arrays["x"].reshape(-1, 1, WIDTH))

    def encode(self, streams: list[Stream], key: Any) -> tuple[Stream, Aux]:
        return streams[0], no_aux()


def in_space(p: dict[str, np.ndarray], part: str, x: np.ndarray) -> np.ndarray:
    """Return IMP's disjoint space (heads.py): two layers with a tanh GELU between, a LayerNorm; then of length one."""
    up = x @ p[f"{part}/up/kernel"] + p[f"{part}/up/bias"]
    up = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    out = up @ p[f"{part}/out/kernel"] + p[f"{part}/out/bias"]
    centred = out - out.mean(axis=-1, keepdims=True)
    normed = centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + 1e-6)
    made = normed * p[f"{part}/norm/scale"] + p[f"{part}/norm/bias"]
    return np.asarray(made / np.sqrt(np.square(made).sum(axis=-1, keepdims=True) + 1e-12))


# Of the last pair, below 0: its temperature is 1e-6.
RAW = {"vision_sound": 0.5, "vision_text": 0.7, "sound_text": -0.3}


def test_from_pooled_vectors_to_the_loss_as_imp_has_it() -> None:
    """Spaces, temperatures `relu(t) + 1e-6` and MIL-NCE, in NumPy."""
    objective = CrossModal(modalities=NAMES, head="h", embed_dim=E)
    declaration = Declaration(nnx.Dict(objective.heads(Widths.same(WIDTH), {})))
    rng = np.random.default_rng(5)
    p = {n: rng.normal(size=s.shape) for n, s in declaration.specs.items()}
    p |= {f"temperature_{pair}/value": np.array(t) for pair, t in RAW.items()}
    pooled = {m: rng.normal(size=(B, COUNTS[m], WIDTH)) for m in NAMES}
    rows = rows_of()
    arrays = {
        m: {"x": jnp.asarray(pooled[m]), PRESENT: jnp.asarray(rows["present"][m])} for m in NAMES
    }
    batch: Any = Batch(valid=jnp.asarray(VALID), inputs=arrays, fields={})

    def loss(p: Any) -> jax.Array:
        model: Any = Given(declaration.merge(p))
        return objective(model, batch, jax.random.key(0)).value

    value, gradient = jax.value_and_grad(loss)({n: jnp.asarray(x) for n, x in p.items()})
    rows["vectors"] = {
        f"{one} {two}": in_space(p, f"{one}_to_{two}", pooled[one])
        for one in NAMES for two in NAMES if one != two
    }  # fmt: skip
    temperatures = {pair: max(t, 0) + 1e-6 for pair, t in RAW.items()}
    assert float(value) == pytest.approx(by_loops(rows, {}, np.arange(B), temperatures), rel=1e-9)
    slopes = {pair: float(gradient[f"temperature_{pair}/value"]) for pair in RAW}
    assert slopes["sound_text"] == 0 and slopes["vision_sound"] != 0 != slopes["vision_text"]


def test_the_baseline_is_of_the_rows_that_have_both() -> None:
    """What equal vectors cost: log of how many rows a pair compares, mean over the pairs by weight."""
    weights = {"vision text": 2.0}
    objective = CrossModal(modalities=NAMES, weights=weights, head="h", embed_dim=E)
    present = {m: np.ones((B, n), bool) for m, n in COUNTS.items()}
    present["text"][[0, 3]] = False  # of the four valid rows, two have no text
    vectors = {
        f"{one} {two}": np.ones((B, COUNTS[one], E)) for one in NAMES for two in NAMES if one != two
    }
    inputs = {m: {PRESENT: jnp.asarray(x)} for m, x in present.items()}
    batch: Any = Batch(valid=jnp.asarray(VALID), fields={}, inputs=inputs)
    model: Any = Head(TEMPERATURES)
    loss = objective.compare(model, vectors, batch)
    expected = (np.log(4) + 2 * np.log(2) + np.log(2)) / 4
    assert float(loss.metrics["baseline"]) == pytest.approx(expected, rel=1e-12)
    assert float(loss.value) == pytest.approx(expected, rel=1e-9)
    counts = {n: float(part.count) for n, part in loss.parts.items()}
    assert counts == {"": pytest.approx((4 + 2 * 2 + 2) / 4)} and loss.parts[""].compares
    nobody = replace(batch, inputs={m: {PRESENT: x & False} for m, x in present.items()})
    empty = objective.compare(model, vectors, nobody)
    assert bool(empty.is_empty(batch.valid)) and float(empty.metrics["baseline"]) == 0


# --- in a run ----------------------------------------------------------------------------------

PAIR = (
    "tasks.one.objective={'name': 'cross_modal', 'modalities': ['toy', 'other', 'third'], 'embed_dim': 4, "
    "'positive_key': 'label'}"
)
MODALITIES = (
    "modalities={'toy': {'name': 'toy'}, 'other': {'name': 'toy'}, 'third': {'name': 'toy'}}"
)
INPUTS = (
    "tasks.one.inputs={'toy': {'tokens': 2, 'instances': 2}, 'other': {'tokens': 1, 'instances': 3}, "
    "'third': {'tokens': 2}}"
)
EVALUATORS = (
    "tasks.one.evaluators={'r': {'name': 'retrieval', 'source': {'name': 'toy', 'count': 12}, 'positive_key': 'label', "
    "'modalities': ['toy', 'third'], 'unique': 'none'}}"
)


def test_three_modalities_with_instances_train_and_are_retrieved(tmp_path: Path) -> None:
    with jax.enable_x64(False):
        words = (PAIR, MODALITIES, INPUTS, EVALUATORS, "steps=6", "limits.divergence=0")
        records = toyrun.run(tmp_path / "run", *words)
        assert records is not None
        names = {r["name"] for r in records if r["task"] == "one"}
        ways = ("toy to third", "third to toy")
        assert names == {f"{way} R@{k}" for way in ways for k in (1, 5, 10)}
        from mmjax.experiment import make_experiment

        experiment = make_experiment(block(*words))
        task = experiment.tasks["one"]
        shapes = task.rows().shapes().inputs
        assert shapes["toy"]["rows"].shape == (2, 2, 6) and shapes["other"][PRESENT].shape == (3,)
        assert positions(task, experiment.declaration, task.rows().batch(4)) == 4 * (
            2 * 2 + 3 * 1 + 2
        )


def test_micro_batches_keep_its_value(tmp_path: Path) -> None:
    from harness import deterministic

    with jax.enable_x64(False):
        losses = []
        for parts in (1, 2):
            workdir = tmp_path / str(parts)
            toyrun.run(
                workdir, PAIR, MODALITIES, INPUTS, "steps=2", f"tasks.one.microbatches={parts}",
                "tasks.one.evaluators={}",
            )  # fmt: skip
            losses.append([x["loss"] for x in deterministic(workdir) if x["kind"] == "train"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
