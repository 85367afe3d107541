"""The contrastive loss against its equation in NumPy, published values and numeric gradients."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.core.batch import Batch
from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.core.sharding import MeshConfig, batch_sharding, make_mesh
from mmjax.modalities.base import Input
from mmjax.modalities.image import Image, ImageInput
from mmjax.modalities.text import Text, TextInput
from mmjax.model import ModelConfig, declare_model
from mmjax.nn.stream import Aux, Stream
from mmjax.nn.towers import Widths
from mmjax.nn.trunk import GroupConfig
from mmjax.objectives.base import Loss
from mmjax.objectives.contrastive import (
    Contrastive,
    Scale,
    chunked_info_nce,
    info_nce,
    sigmoid_loss,
    unit,
)

nce = jax.jit(info_nce)
with_sigmoid = partial(sigmoid_loss, bias=np.float32(-1))
nce_gradient = jax.jit(
    jax.value_and_grad(lambda a, b, scale, *rest: info_nce(a, b, scale, *rest).loss, (0, 1, 2))
)


def vectors(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return two sets of unit vectors."""
    x = np.random.default_rng(seed).normal(size=(2, rows, 4))
    a, b = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return a, b


def reference(
    a: np.ndarray, b: np.ndarray, scale: float, concept: np.ndarray, valid: np.ndarray
) -> float:
    """Return row by row, in both directions: -mean over the positives of log softmax, over valid rows."""
    rows = np.flatnonzero(valid)
    total = 0.0
    for one, two in ((a, b), (b, a)):
        for i in rows:
            weight = {j: np.exp(scale * (one[i] @ two[j])) for j in rows}
            whole = sum(weight.values())
            positives = [j for j in rows if concept[j] == concept[i]]
            total -= sum(np.log(weight[j] / whole) for j in positives) / len(positives)
    return total / 2 / max(len(rows), 1)


def numeric(function: Any, x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Return the gradient of a NumPy function by central differences."""
    out = np.empty_like(x)
    for index in np.ndindex(x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[index] += sign * step
            ends.append(function(moved))
        out[index] = (ends[0] - ends[1]) / (2 * step)
    return out


# --- the loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "expected"), [(256, 5.795769), (1024, 7.115145)])
def test_the_values_of_open_clip(rows: int, expected: float) -> None:
    rng = np.random.RandomState(0)
    a, b = (rng.randn(rows, 512).astype(np.float32) for _ in range(2))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    value, *_ = nce(a, b, np.float32(1 / 0.07), np.arange(rows), np.ones(rows, bool))
    np.testing.assert_allclose(value, expected, atol=3e-6)


def test_one_positive_each_is_clip(x64: None) -> None:
    """Cross-entropy of rows and of columns to the diagonal (Radford et al. 2021, figure 3)."""
    a, b = vectors(6)
    logits = 9.0 * a @ b.T
    by_row = np.log(np.exp(logits).sum(axis=1)) - np.diag(logits)
    by_column = np.log(np.exp(logits).sum(axis=0)) - np.diag(logits)
    value, *_ = nce(a, b, 9.0, np.array([3, 1, 4, 0, 5, 9]), np.ones(6, bool))
    np.testing.assert_allclose(value, (by_row.mean() + by_column.mean()) / 2, rtol=1e-12)


@given(
    concepts=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    valid=st.lists(st.booleans(), min_size=6, max_size=6),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_several_positives_and_invalid_rows(
    concepts: list[int], valid: list[bool], seed: int
) -> None:
    a, b = vectors(6, seed=seed)
    concept, exists = np.array(concepts), np.array(valid)
    with jax.enable_x64(True):
        value, *_ = nce(a, b, 5.0, concept, exists)
        assert value.dtype == jnp.float64
    np.testing.assert_allclose(value, reference(a, b, 5.0, concept, exists), rtol=1e-12)


def test_invalid_rows_change_nothing(x64: None) -> None:
    a, b = vectors(8)
    concept = np.array([0, 1, 0, 2, 1, 3, 0, 2])
    valid = np.array([1, 1, 0, 1, 1, 0, 1, 0], bool)
    # An invalid row may hold what would be the best candidate of all.
    a[2] = b[2] = 100.0
    found = nce_gradient(a, b, 5.0, concept, valid)
    alone = nce_gradient(a[valid], b[valid], 5.0, concept[valid], valid[valid])
    np.testing.assert_allclose(found[0], alone[0], rtol=1e-12)
    for got, expected in zip(found[1][:2], alone[1][:2], strict=True):
        np.testing.assert_allclose(got[valid], expected, rtol=1e-9, atol=1e-14)
        np.testing.assert_array_equal(got[~valid], 0)
    np.testing.assert_allclose(found[1][2], alone[1][2], rtol=1e-9)
    recall = nce(a, b, 5.0, concept, valid)[1]
    assert recall == nce(a[valid], b[valid], 5.0, concept[valid], valid[valid])[1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_valid_row_costs_nothing_and_moves_nothing(x64: None, dtype: Any) -> None:
    a, b = (x.astype(dtype) for x in vectors(6))
    value, gradients = nce_gradient(a, b, dtype(5), np.zeros(6, int), np.zeros(6, bool))
    assert value == 0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)
    assert nce(a, b, dtype(5), np.zeros(6, int), np.zeros(6, bool))[1] == 0


def test_gradient_by_finite_differences(x64: None) -> None:
    a, b = vectors(6)
    concept = np.array([0, 1, 0, 2, 1, 3])
    valid = np.array([1, 1, 1, 1, 0, 1], bool)
    scale = np.array(5.0)
    _, gradients = nce_gradient(a, b, scale, concept, valid)
    expected = (
        numeric(lambda x: reference(x, b, 5.0, concept, valid), a),
        numeric(lambda x: reference(a, x, 5.0, concept, valid), b),
        numeric(lambda s: reference(a, b, float(s), concept, valid), scale),
    )
    for got, wanted in zip(gradients, expected, strict=True):
        assert np.abs(wanted).max() > 0.01
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-9)


@given(order=st.permutations(range(6)))
@settings(max_examples=25, deadline=None)
def test_the_order_of_the_rows_does_not_matter(order: list[int]) -> None:
    a, b = vectors(6)
    concept = np.array([0, 1, 0, 2, 1, 3])
    valid = np.array([1, 1, 1, 1, 0, 1], bool)
    with jax.enable_x64(True):
        before = nce(a, b, 5.0, concept, valid)
        after = nce(a[order], b[order], 5.0, concept[order], valid[order])
    np.testing.assert_allclose(after, before, rtol=1e-12)


def test_on_eight_devices_as_on_one(x64: None) -> None:
    a, b = vectors(32)
    concept, valid = np.arange(32) // 3, np.arange(32) % 5 != 1
    mesh = make_mesh(MeshConfig())
    rows = batch_sharding(mesh, 32, "test")
    placed = [jax.device_put(x, rows) for x in (a, b)] + [np.float64(5)]
    placed += [jax.device_put(x, rows) for x in (concept, valid)]
    assert len({s.device for s in placed[0].addressable_shards}) == 8
    assert placed[0].addressable_shards[0].data.shape == (4, 4)
    with jax.set_mesh(mesh):
        value, gradients = nce_gradient(*placed)
        recall = nce(*placed)[1]
    expected, expected_gradients = nce_gradient(a, b, 5.0, concept, valid)
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-14)
    assert recall == nce(a, b, 5.0, concept, valid)[1]


def test_recall_in_the_batch_by_hand() -> None:
    a = np.eye(4, dtype=np.float32)
    # Row 0 finds 0; 1 finds 2, of another concept; 2 finds 3, of its own; 3 finds 3.
    b = np.array([[9, 0, 0, 0], [0, 1, 0, 0], [0, 9, 1, 0], [0, 0, 9, 9]], np.float32)
    concept = np.array([0, 1, 2, 2])
    recall = nce(a, b, np.float32(1), concept, np.array([True] * 4)).recall
    assert float(recall) == 3 / 4
    recall = nce(a, b, np.float32(1), concept, np.array([True, True, True, False])).recall
    np.testing.assert_allclose(recall, 2 / 3, err_msg="without row 3, row 2 finds itself")
    recall = nce(a, b, np.float32(1), concept, np.array([True, True, False, False])).recall
    assert float(recall) == 1


@pytest.mark.parametrize("loss", [info_nce, partial(chunked_info_nce, chunk=2), with_sigmoid])
@pytest.mark.parametrize("value", [1.0, 0.0, np.nan])
def test_a_model_that_maps_all_to_one_point_finds_nothing_in_the_batch(
    loss: Any, value: float
) -> None:
    """Not the first row of a class, whose share the recall would else be at step 0."""
    call, alike = jax.jit(loss), np.full((6, 3), value, np.float32)
    for concept, wanted in (
        ([0, 0, 0, 1, 2, 3], 0),
        ([0] * 6, 1),  # a row whose candidates are all positives has nothing to confuse them with
    ):
        given = {"concept_B": np.array(concept), "valid_B": np.ones(6, bool)}
        assert float(call(alike, alike, np.float32(2), **given)[1]) == wanted


def test_unit_vectors_and_their_gradient_at_zero(x64: None) -> None:
    x = np.random.default_rng(0).normal(size=(3, 5))
    expected = x / np.sqrt((x**2).sum(axis=1, keepdims=True) + 1e-12)
    np.testing.assert_allclose(unit(jnp.asarray(x)), expected, rtol=1e-12)
    value, gradient = jax.jit(jax.value_and_grad(lambda x: unit(x).sum()))(np.zeros(5))
    assert value == 0
    np.testing.assert_allclose(gradient, np.full(5, 1e6), rtol=1e-9)


# --- the scale ---------------------------------------------------------------------------------


@jax.jit
def scale_of(log: Any) -> Any:
    return Declaration(Scale(2.0)).merge({"log": log})()


@pytest.mark.parametrize(
    ("log", "scale", "slope"),
    [(0.0, 1.0, 1.0), (np.log(50), 50.0, 50.0), (np.log(99.9), 99.9, 99.9), (5.0, 100.0, 100.0)],
)
def test_the_scale_is_exp_up_to_100(x64: None, log: float, scale: float, slope: float) -> None:
    value, gradient = jax.value_and_grad(scale_of)(log)
    np.testing.assert_allclose(value, scale, rtol=1e-12)
    np.testing.assert_allclose(gradient, slope, rtol=1e-12)


def at_log_scale(a: np.ndarray, b: np.ndarray, log: float) -> tuple[float, float]:
    """Return loss of the pairs and its slope by the parameter, six rows each a pair of its own."""

    def loss(log: Any) -> Any:
        return info_nce(a, b, scale_of(log), jnp.arange(6), jnp.ones(6, bool)).loss

    value, slope = jax.value_and_grad(loss)(log)
    return float(value), float(slope)


def test_over_its_bound_the_scale_can_come_back_and_go_no_further(x64: None) -> None:
    """Where a smaller scale is better, the slope is that of the loss at 100; where a larger one is, it is 0."""
    a, _ = vectors(6)
    wrong = np.roll(a, 1, axis=0)
    value, slope = at_log_scale(a, wrong, 4.7)
    ends = [
        reference(a, wrong, np.exp(np.log(100) + s), np.arange(6), np.ones(6))
        for s in (1e-6, -1e-6)
    ]
    assert value == pytest.approx(reference(a, wrong, 100.0, np.arange(6), np.ones(6)), rel=1e-9)
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5) and slope > 1
    close = np.sqrt(0.999) * a + np.sqrt(0.001) * np.roll(a, 1, axis=0)  # right, but not certain
    assert at_log_scale(a, close, 4.6)[1] < 0 == at_log_scale(a, close, 4.7)[1]


def test_descent_leads_back_below_the_bound(x64: None) -> None:
    a, _ = vectors(6)
    log = 4.7
    for _ in range(3):
        log -= 0.1 * np.sign(at_log_scale(a, np.roll(a, 1, axis=0), log)[1])
    assert log == pytest.approx(4.4)


def test_without_a_bound_the_scale_is_exp(x64: None) -> None:
    """A published SigLIP's, which `form: sigmoid` has."""
    made = Contrastive(modalities=("image", "text"), loss="sigmoid", init_temperature=0.005)
    scale = made.heads(Widths.same(4), {})["scale"]
    value, slope = jax.value_and_grad(lambda x: Declaration(scale).merge({"log": x})())(4.7215)
    assert float(value) == pytest.approx(112.337, rel=1e-4)
    assert float(slope) == pytest.approx(float(value), rel=1e-9)
    assert Contrastive(modalities=("image", "text")).heads(Widths.same(4), {})["scale"].bound == 100


def test_the_scale_begins_at_one_over_the_temperature_in_the_parameter_dtype() -> None:
    declaration = Declaration(Scale(1 / 0.07))
    np.testing.assert_allclose(np.exp(declaration.initialise(0)["log"]), 1 / 0.07, rtol=1e-6)
    assert declaration.specs["log"].keep_dtype and not declaration.specs["log"].decay


# --- the objective -----------------------------------------------------------------------------


class Table:
    """A model whose tokens are given: the objective's own steps stand alone."""

    def __init__(self, size: int, log_scale: Any):
        self.matrices = {
            m: np.random.default_rng(i).normal(size=(size, 3)) for i, m in enumerate("ab")
        }
        scale = Declaration(Scale(1.0)).merge({"log": jnp.asarray(log_scale)})
        project = {m: (lambda x, w=w: x @ w) for m, w in self.matrices.items()}
        self.heads = {"pair": _Parts(project, scale)}

    def tokens(self, modality: str, arrays: Any) -> Stream:
        return Stream(arrays["x"], arrays["valid"])

    def encode(self, streams: list[Stream], key: jax.Array) -> Any:
        (stream,) = streams
        return stream, Aux(jnp.float32(0.25))


class _Parts(dict):
    def __init__(self, parts: dict[str, Any], scale: Any):
        super().__init__(parts)
        self.scale = scale


def pair_batch(rows: int = 5) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    one = {"x": rng.normal(size=(rows, 2, 4)), "valid": np.ones((rows, 2), bool)}
    two = {"x": rng.normal(size=(rows, 3, 4)), "valid": rng.random((rows, 3)) < 0.6}
    valid = np.arange(rows) != 3
    fields = {"kind": np.array([7, 8, 7, 7, 9], np.int32)}
    return Batch(inputs={"a": one, "b": two}, valid=valid, fields=fields)


def run(model: Table, batch: Any, concept: str) -> tuple[Loss, jax.Array]:
    """Return the objective's loss, and its embeddings of `b`."""
    objective = Contrastive(modalities=("a", "b"), positive_key=concept, embed_dim=3, head="pair")
    given: Any = model

    @jax.jit
    def call(batch: Any) -> Any:
        loss = objective(given, batch, jax.random.key(0))
        return loss, objective.embed(given, "b", batch.inputs["b"])

    return call(batch)


def pooled(batch: Any, model: Table, modality: str) -> np.ndarray:
    arrays = batch.inputs[modality]
    rows = []
    for x, valid in zip(arrays["x"], arrays["valid"], strict=True):
        mean = x[valid].mean(axis=0) if valid.any() else np.zeros(4)
        joint = mean @ model.matrices[modality]
        rows.append(joint / np.sqrt(joint @ joint + 1e-12))
    return np.stack(rows)


@pytest.mark.parametrize("concept", ["kind", ""])
def test_the_objective_pools_projects_and_compares(x64: None, concept: str) -> None:
    model, batch = Table(4, np.log(4.0)), pair_batch()
    loss, embedded = run(model, batch, concept)
    concepts = batch.fields["kind"] if concept else np.arange(5)
    a, b = (pooled(batch, model, m) for m in "ab")
    expected = reference(a, b, 4.0, concepts, batch.valid)
    # Auxiliary losses of both passes are added.
    np.testing.assert_allclose(loss.value, expected + 0.5, rtol=1e-9)
    np.testing.assert_allclose(loss.metrics["scale"], 4.0, rtol=1e-9)
    np.testing.assert_allclose(loss.metrics["baseline"], np.log(4), rtol=1e-9)
    np.testing.assert_allclose(embedded, b, rtol=1e-9, atol=1e-12)


def test_the_baseline_is_what_equal_logits_cost(x64: None) -> None:
    model, batch = Table(4, np.log(4.0)), pair_batch()
    for arrays in batch.inputs.values():
        arrays["x"] = np.ones_like(arrays["x"])
        arrays["valid"] = np.ones_like(arrays["valid"])
    loss, _ = run(model, batch, "kind")
    np.testing.assert_allclose(loss.value - 0.5, loss.metrics["baseline"], rtol=1e-9)
    batch = replace(batch, valid=np.zeros(5, bool))
    assert run(model, batch, "kind")[0].metrics["baseline"] == 0


def test_what_it_reads_and_makes() -> None:
    objective = Contrastive(modalities=("image", "text"), positive_key="concept", embed_dim=3)
    assert objective.reads() == objective.embeds() == ("image", "text")
    assert objective.fields() == ("concept",)
    assert Contrastive(modalities=("image", "text")).fields() == ()
    assert set(objective.heads(Widths.same(4), {})) == {"image", "text", "scale"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modalities": ("image",)}, "two modalities"),
        ({"modalities": ("a", "b"), "init_temperature": 0.0}, "positive"),
        ({"modalities": ("a", "b"), "init_temperature": 0.005},
         "init_temperature is 0.005; under softmax it is at least 0.01"),
        ({"modalities": ("a", "b"), "poolers": {"a": "mode"}}, "poolers.a is 'mode'"),
        ({"modalities": ("a", "b"), "poolers": {"c": "mean"}}, "poolers names modality 'c'"),
        ({"modalities": ("a", "b"), "projections": {"a": "bias"}}, "projections.a is 'bias'"),
        ({"modalities": ("a", "b"), "map_heads": 0}, "map_heads is 0; it must be at least 1"),
    ],
)  # fmt: skip
def test_mistakes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Contrastive(**settings)


def real_model() -> tuple[Declaration, Contrastive, dict[str, Any]]:
    block = {"name": "transformer", "num_heads": 1, "mlp_dim": 4}
    modalities: dict[str, Any] = {
        "image": Image(patch=2, max_positions=4),
        "text": Text(vocabulary=16, max_positions=8),
    }
    inputs = {
        "image": Input("image", modalities["image"], ImageInput(size=4)),
        "text": Input("text", modalities["text"], TextInput(length=3)),
    }
    objective = Contrastive(modalities=("image", "text"), embed_dim=3, head="pair")
    heads = [("pair", objective.heads(Widths.same(4), inputs))]
    config = ModelConfig(4, (GroupConfig(1, (block,)),))
    rng = np.random.default_rng(0)
    batch = Batch(
        inputs={
            "image": {"pixels": rng.integers(0, 256, (6, 4, 4, 3)).astype(np.uint8)},
            "text": {
                "ids": rng.integers(0, 16, (6, 3)).astype(np.int32),
                "valid": np.array([[1, 1, 1], [1, 0, 0]] * 3, bool),
            },
        },
        fields={},
        valid=np.arange(6) != 4,
    )
    return declare_model(config, modalities, heads), objective, batch


@pytest.mark.parametrize("log", [np.log(1 / 0.07), 4.7])
def test_on_a_real_model_all_parameters_learn_also_a_scale_over_its_bound(log: float) -> None:
    declaration, objective, batch = real_model()
    rng = np.random.default_rng(0)
    p: dict[str, Any] = {
        n: rng.normal(size=s.shape).astype("f") for n, s in declaration.specs.items()
    }
    p["heads/pair/scale/log"] = np.float32(log)

    @jax.jit
    def step(p: Any) -> Any:
        def loss(p: Any) -> Any:
            made = objective(declaration.merge(p), batch, jax.random.key(0))
            return made.value, made.metrics

        return jax.value_and_grad(loss, has_aux=True)(p)

    (_, metrics), gradient = step(p)
    np.testing.assert_allclose(metrics["scale"], min(np.exp(log), 100), rtol=1e-6)
    assert not {n for n, g in gradient.items() if not np.any(g)}


def test_embeddings_of_a_real_model_are_unit_vectors_whatever_the_other_rows() -> None:
    declaration, objective, batch = real_model()
    rng = np.random.default_rng(0)
    p = {n: rng.normal(size=s.shape).astype("f") for n, s in declaration.specs.items()}
    embed = jax.jit(
        lambda p, x, dtype: objective.embed(declaration.merge(p, dtype), "text", x),
        static_argnums=2,
    )
    texts = batch.inputs["text"]
    whole = embed(p, texts, None)
    assert whole.shape == (6, 3)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), np.ones(6), rtol=1e-5)
    other = {"ids": texts["ids"][::-1].copy(), "valid": texts["valid"]}
    other["ids"][1] = texts["ids"][1]
    np.testing.assert_allclose(embed(p, other, None)[1], whole[1], rtol=1e-5)
    narrow = embed(p, texts, jnp.bfloat16)
    assert narrow.dtype == jnp.float32, "unit vectors are float32 in any compute dtype"
    np.testing.assert_allclose(np.linalg.norm(narrow, axis=1), np.ones(6), rtol=1e-5)


def test_poolers_and_projections_are_by_modality() -> None:
    """A vector of the first token as it is, and one of the last that exists with a bias."""
    text = SimpleNamespace(modality=SimpleNamespace())
    image = SimpleNamespace(modality=SimpleNamespace(class_token=True))
    objective = Contrastive(
        modalities=("image", "text"), embed_dim=4, head="pair",
        poolers={"image": "class", "text": "last"}, projections={"image": "none", "text": "affine"},
    )  # fmt: skip
    inputs: Any = {"image": image, "text": text}
    parts = objective.heads(Widths.same(4), inputs)
    assert set(parts) == {"text", "scale"} and parts["text"].bias is not None
    rng = np.random.default_rng(0)
    x, kernel, bias = (rng.normal(size=s).astype("f") for s in ((2, 3, 4), (4, 4), 4))
    valid = np.array([[1, 1, 0], [1, 1, 1]], bool)
    head = {"text": lambda v: v @ kernel + bias}
    model: Any = SimpleNamespace(
        heads={"pair": head},
        tokens=lambda m, arrays: Stream(jnp.asarray(x), jnp.asarray(valid), layout=((m, 3),)),
        encode=lambda streams, key: (streams[0], None),
    )
    expected = {"image": x[:, 0], "text": np.stack([x[0, 1], x[1, 2]]) @ kernel + bias}
    for modality, v in expected.items():
        v = v / np.linalg.norm(v, axis=1, keepdims=True)
        np.testing.assert_allclose(objective.embed(model, modality, {}), v, rtol=1e-4, atol=1e-6)
    with pytest.raises(
        UserError,
        match="projections.image is 'none', and the width of 'image' is 6 where embed_dim is 4",
    ):
        objective.heads(Widths.same(6), inputs)
    with pytest.raises(UserError, match="poolers.image is 'class', and 'image' has no class token"):
        objective.heads(Widths.same(4), {**inputs, "image": text})
