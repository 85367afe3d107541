"""Classification: the loss against NumPy and finite differences, labels that are no classes, learning."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.core import config as configs
from mmjax.core.batch import Batch
from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.core.sharding import MeshConfig, batch_sharding, make_mesh
from mmjax.modalities.base import Input
from mmjax.modalities.image import Image, ImageInput
from mmjax.model import ModelConfig, declare_model
from mmjax.nn.stream import Aux
from mmjax.nn.towers import Widths
from mmjax.nn.trunk import GroupConfig
from mmjax.objectives.classification import Classification, cross_entropy, is_right

WIDTH, SIZE, PATCH, CLASSES = 8, 8, 4, 5
INPUTS = {"image": Input("image", Image(patch=PATCH), ImageInput(size=SIZE))}
LAYER = {"name": "transformer", "num_heads": 2, "mlp_dim": 16}


def logits(rows: int, classes: int = CLASSES, seed: int = 0) -> np.ndarray:
    return 3 * np.random.default_rng(seed).normal(size=(rows, classes))


def reference(x: Any, label: Any, valid: Any, smoothing: float = 0.0) -> float:
    """Return the cross-entropy to the smoothed target, row by row."""
    losses = []
    for row, c in zip(x[valid], label[valid], strict=True):
        probability = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        target = np.full(len(row), smoothing / len(row))
        target[c] += 1 - smoothing
        losses.append(-(target * np.log(probability)).sum())
    return float(np.mean(losses)) if losses else 0.0


def numeric(f: Any, x: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """Return central differences."""
    slope = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        slope[index] = (f(up) - f(down)) / (2 * step)
    return slope


# --- the loss ----------------------------------------------------------------------------------


@given(
    labels=st.lists(st.integers(0, CLASSES - 1), min_size=6, max_size=6),
    valid=st.lists(st.booleans(), min_size=6, max_size=6),
    smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_against_numpy(labels: list[int], valid: list[bool], smoothing: float, seed: int) -> None:
    x, label, exists = logits(6, seed=seed), np.array(labels), np.array(valid)
    with jax.enable_x64(True):
        value = cross_entropy(jnp.asarray(x), label, exists, smoothing)
        assert value.dtype == jnp.float64
    np.testing.assert_allclose(value, reference(x, label, exists, smoothing), rtol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradient_by_finite_differences_and_in_closed_form(x64: None, smoothing: float) -> None:
    x, label = logits(4), np.array([0, 3, 3, 4])
    valid = np.array([True, False, True, True])
    found = jax.grad(cross_entropy)(jnp.asarray(x), label, valid, smoothing)
    expected = numeric(lambda z: reference(z, label, valid, smoothing), x)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    softmax = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    target = (1 - smoothing) * np.eye(CLASSES)[label] + smoothing / CLASSES
    np.testing.assert_allclose(found, (softmax - target) * valid[:, None] / 3, atol=1e-12)


def test_invalid_rows_change_nothing(x64: None) -> None:
    x, label = logits(6), np.array([0, 1, 2, 3, 4, 0])
    valid = np.array([1, 0, 1, 1, 0, 1], bool)
    wild, wrong = x.copy(), label.copy()
    wild[~valid] = 1e6
    wrong[~valid] = [-7, 99]  # whatever a blank row may hold
    one = jax.value_and_grad(cross_entropy)(jnp.asarray(x[valid]), label[valid], valid[valid])
    two = jax.value_and_grad(cross_entropy)(jnp.asarray(wild), wrong, valid)
    np.testing.assert_allclose(two[0], one[0], rtol=1e-12)
    np.testing.assert_allclose(two[1][valid], one[1], rtol=1e-12)
    np.testing.assert_array_equal(two[1][~valid], 0)


def test_no_valid_row_costs_nothing_and_moves_nothing() -> None:
    none = np.zeros(3, bool)
    value, slope = jax.value_and_grad(cross_entropy)(
        jnp.asarray(logits(3)), np.array([0, 1, 2]), none
    )
    assert value == 0
    np.testing.assert_array_equal(slope, 0)


def test_large_logits_do_not_overflow() -> None:
    x = np.array([[1e4, 0, -1e4], [-1e4, 1e4, 1e4]], np.float32)
    value, slope = jax.value_and_grad(cross_entropy)(
        jnp.asarray(x), np.array([0, 2]), np.ones(2, bool)
    )
    np.testing.assert_allclose(value, np.log(2) / 2, rtol=1e-6)
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("label", [-1, CLASSES, 10**6])
def test_a_label_out_of_range_that_reaches_the_device_is_not_finite(label: int) -> None:
    valid = np.ones(2, bool)
    assert np.isnan(cross_entropy(jnp.asarray(logits(2)), np.array([0, label]), valid))


# --- the objective -----------------------------------------------------------------------------


def declared(objective: Classification) -> Declaration:
    config = ModelConfig(WIDTH, (GroupConfig(1, (LAYER,)),))
    heads = [("head", objective.heads(Widths.same(WIDTH), INPUTS))]
    return declare_model(config, {"image": INPUTS["image"].modality}, heads)


def objective(**more: Any) -> Classification:
    return Classification(head="head", classes=CLASSES, **more)


def batch(rows: int = 6, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    pixels = jnp.asarray(rng.integers(0, 256, (rows, SIZE, SIZE, 3)), jnp.uint8)
    label = rng.integers(0, CLASSES, rows).astype(np.int32)
    valid = np.arange(rows) % 4 != 2
    return Batch(inputs={"image": {"pixels": pixels}}, fields={"label": label}, valid=valid)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_starts_at_the_loss_that_knows_nothing(smoothing: float) -> None:
    made = objective(smoothing=smoothing)
    model = declared(made).merge(declared(made).initialise(0))
    loss = made(model, batch(), jax.random.key(0))
    np.testing.assert_allclose(loss.value, np.log(CLASSES), rtol=1e-6)
    np.testing.assert_allclose(loss.metrics["baseline"], np.log(CLASSES), rtol=1e-6)


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_loss_and_accuracy_are_those_of_what_it_predicts(x64: None, norm: str) -> None:
    made = objective(init="lecun", norm=norm, smoothing=0.1)
    declaration = declared(made)
    model = declaration.merge(declaration.initialise(0, jnp.float64))
    rows = batch(8)
    found = np.asarray(made.predict(model, rows.inputs))
    assert found.shape == (8, CLASSES) and found.dtype == np.float64
    loss = made(model, rows, jax.random.key(3))
    label, valid = rows.fields["label"], rows.valid
    np.testing.assert_allclose(loss.value, reference(found, label, valid, 0.1), rtol=1e-12)
    right = (found.argmax(axis=1) == label)[valid]
    np.testing.assert_allclose(loss.metrics["accuracy"], right.mean())


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_model_that_says_the_same_of_every_class_is_never_right(value: float) -> None:
    """As at step 0, where the head is zero: the accuracy is not the share of class 0."""
    made = objective(init="zeros")
    p = declared(made).initialise(0)
    p["heads/head/classifier/logits/bias"] = jnp.full(CLASSES, value)
    rows = batch(8)
    rows.fields["label"][:] = 0
    loss = made(declared(made).merge(p), rows, jax.random.key(0))
    assert float(loss.metrics["accuracy"]) == 0


@pytest.mark.parametrize(
    ("logits", "label", "right"),
    [
        ([1.0, 3.0, 2.0], 1, True),
        ([1.0, 3.0, 2.0], 2, False),
        ([3.0, 3.0, 2.0], 0, False),
        ([3.0, 3.0, 2.0], 1, False),
        ([np.nan, 3.0, 2.0], 1, False),
        ([1.0, np.inf, 2.0], 1, True),
        ([1.0, 2.0, 3.0], -1, False),
        ([1.0, 2.0, 3.0], 3, False),
    ],
)
def test_a_label_is_right_where_its_logit_is_above_all_others(
    logits: list[float], label: int, right: bool
) -> None:
    found = is_right(jnp.array([logits]), jnp.array([label]))
    assert bool(found[0]) == right


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_prediction_is_a_linear_map_of_the_mean_token(x64: None, norm: str) -> None:
    made = objective(init="lecun", norm=norm)
    declaration = declared(made)
    parameters = declaration.initialise(1, jnp.float64)
    model = declaration.merge(parameters)
    arrays = batch().inputs
    stream, _ = model.encode([model.tokens("image", arrays["image"])], jax.random.key(0))
    x = np.asarray(stream.x_BSD).mean(axis=1)
    if norm == "layer":
        x = x - x.mean(axis=1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6)
    kernel = parameters["heads/head/classifier/logits/kernel"]
    bias = parameters["heads/head/classifier/logits/bias"]
    expected = x @ np.asarray(kernel) + np.asarray(bias)
    np.testing.assert_allclose(made.predict(model, arrays), expected, rtol=1e-10)


def test_what_the_trunk_adds_is_passed_on() -> None:
    """Auxiliary losses and proposed buffers of its layers."""
    made = objective()
    real = declared(made).merge(declared(made).initialise(0))
    aux = Aux(jnp.float32(0.25), proposals={"average": {"sum": jnp.ones(3)}})
    model: Any = SimpleNamespace(
        tokens=real.tokens, heads=real.heads, encode=lambda s, key: (real.encode(s, key)[0], aux)
    )
    loss = made(model, batch(), jax.random.key(0))
    np.testing.assert_allclose(loss.value, np.log(CLASSES) + 0.25, rtol=1e-6)
    assert list(loss.proposals) == ["average"]


def test_the_norm_is_a_parameter_of_its_own() -> None:
    plain, normed = declared(objective()).specs, declared(objective(norm="layer")).specs
    assert normed.keys() - plain.keys() == {
        "heads/head/classifier/norm/scale",
        "heads/head/classifier/norm/bias",
    }


def test_gradient_of_the_head_by_finite_differences(x64: None) -> None:
    made, rows = objective(init="lecun", smoothing=0.1), batch(4)
    declaration = declared(made)
    parameters = declaration.initialise(0, jnp.float64)
    name = "heads/head/classifier/logits/kernel"

    @jax.jit
    def loss(kernel: Any) -> Any:
        model = declaration.merge({**parameters, name: jnp.asarray(kernel)})
        return made(model, rows, jax.random.key(0)).value

    found = jax.grad(loss)(parameters[name])
    np.testing.assert_allclose(found, numeric(loss, np.array(parameters[name])), atol=1e-8)
    assert np.abs(found).max() > 1e-3


def test_low_precision_computes_its_loss_in_float32() -> None:
    made = objective(init="lecun")
    declaration = declared(made)
    model = declaration.merge(declaration.initialise(0), jnp.bfloat16)
    stream = model.tokens("image", batch().inputs["image"])
    assert stream.x_BSD.dtype == jnp.bfloat16
    assert made.predict(model, batch().inputs).dtype == jnp.float32
    loss = made(model, batch(), jax.random.key(0))
    assert {v.dtype for v in (loss.value, *loss.metrics.values())} == {jnp.dtype(jnp.float32)}


def test_learns_classes_that_can_be_seen() -> None:
    """Each class has a grey value; a few dozen plain gradient steps separate them."""
    made = objective()
    declaration = declared(made)
    label = (np.arange(20) % CLASSES).astype(np.int32)
    noise = np.random.default_rng(0).integers(0, 20, (20, SIZE, SIZE, 3))
    pixels = (label[:, None, None, None] * 50 + noise).astype(np.uint8)
    rows = Batch(
        inputs={"image": {"pixels": pixels}},
        fields={"label": label},
        valid=np.ones(20, bool),
    )

    @jax.jit
    def step(parameters: Any) -> Any:
        def loss(p: Any) -> Any:
            result = made(declaration.merge(p), rows, jax.random.key(0))
            return result.value, result.metrics["accuracy"]

        (_, right), slope = jax.value_and_grad(loss, has_aux=True)(parameters)
        return jax.tree.map(lambda p, g: p - 0.3 * g, parameters, slope), right

    parameters = declaration.initialise(0)
    accuracies = []
    for _ in range(60):
        parameters, right = step(parameters)
        accuracies.append(float(right))
    assert accuracies[0] <= 0.4 and accuracies[-1] >= 0.9, accuracies


def test_on_eight_devices_as_on_one(x64: None) -> None:
    made, rows = objective(init="lecun"), batch(16)
    declaration = declared(made)
    model = declaration.merge(declaration.initialise(0, jnp.float64))
    alone = made(model, rows, jax.random.key(0))
    mesh = make_mesh(MeshConfig())
    placed = jax.device_put(rows, batch_sharding(mesh, 16, "test"))
    with jax.set_mesh(mesh):
        spread = jax.jit(lambda r: made(model, r, jax.random.key(0)))(placed)
    np.testing.assert_allclose(spread.value, alone.value, rtol=1e-12)
    np.testing.assert_allclose(spread.metrics["accuracy"], alone.metrics["accuracy"])


# --- labels and settings -----------------------------------------------------------------------


@pytest.mark.parametrize("label", [0, CLASSES - 1, np.int64(2), np.array(3), np.uint8(1), True])
def test_classes_pass(label: Any) -> None:
    objective().check_example({"label": label})


@pytest.mark.parametrize("label", [-1, CLASSES, 2**40, np.int64(-3)])
def test_a_label_out_of_range_names_field_value_and_classes(label: Any) -> None:
    with pytest.raises(UserError, match=rf"'kind'.* {int(label)}, .*\[0, {CLASSES}\)"):
        objective(label="kind").check_example({"kind": label})


@pytest.mark.parametrize("label", [2.0, 2.7, b"2", "cat", None, np.array([1, 2]), np.float32(1)])
def test_a_label_that_is_no_integer(label: Any) -> None:
    with pytest.raises(UserError, match=r"field 'label' is .*a label is an integer from 0 to 4"):
        objective().check_example({"label": label})


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"classes": 1}, "classes is 1"),
        ({"smoothing": 1.0}, "smoothing is 1.0"),
        ({"smoothing": -0.1}, "smoothing is -0.1"),
        ({"norm": "layers"}, "norm is 'layers'. Did you mean 'layer'"),
        ({"init": "zero"}, "init is 'zero'. Did you mean 'zeros'"),
    ],
)
def test_settings_that_make_no_sense(more: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Classification(**{"classes": CLASSES, **more})


def test_a_config_block_names_it() -> None:
    block = {"name": "classification", "classes": 9, "label": "group", "modalities": ["image"]}
    made = configs.component("objectives", block, "tasks.x.objective")
    assert made.fields() == ("group",) and made.reads() == made.predicts() == ("image",)
    with pytest.raises(UserError, match=r"'tasks.x.objective.classes' is missing"):
        configs.component("objectives", {"name": "classification"}, "tasks.x.objective")
