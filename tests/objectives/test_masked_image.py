"""Masked image modelling: what is hidden, what the trunk sees, what the loss counts."""

from __future__ import annotations

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
from mmjax.modalities.base import Input
from mmjax.modalities.image import Image, ImageInput, patchify, unpatchify
from mmjax.model import ModelConfig, declare_model
from mmjax.nn.stream import Stream, no_aux
from mmjax.nn.towers import Widths
from mmjax.nn.trunk import GroupConfig
from mmjax.objectives.base import Embeds, able
from mmjax.objectives.masked_image import (
    Decoder,
    MaskedImage,
    masked_error,
    normalised_patches,
    visible,
)

ROWS, SIZE, PATCH, WIDTH = 4, 8, 2, 4
TOKENS = (SIZE // PATCH) ** 2
VALID = np.array([True, True, False, True])


pytestmark = pytest.mark.usefixtures("x64")


def images(rows: int = ROWS, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (rows, height, width, 3)).astype(np.uint8)


def patches(pixels: np.ndarray, patch: int = PATCH) -> np.ndarray:
    """Return `[B, S, p p 3]` cut out one by one."""
    rows = []
    for image in pixels:
        cut = []
        for top in range(0, image.shape[0], patch):
            for left in range(0, image.shape[1], patch):
                cut.append(image[top : top + patch, left : left + patch].ravel())
        rows.append(np.stack(cut))
    return np.stack(rows)


def targets(pixels: np.ndarray) -> np.ndarray:
    """Return each patch in [0, 1], less its mean, over the root of variance plus 1e-6."""
    x = patches(pixels / 255.0)
    out = np.empty_like(x)
    for index in np.ndindex(x.shape[:2]):
        out[index] = (x[index] - x[index].mean()) / np.sqrt(x[index].var() + 1e-6)
    return out


def numeric(function: Any, x: np.ndarray, step: float) -> np.ndarray:
    """Return the gradient of a NumPy function by central differences."""
    out = np.empty_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        out[index] = (function(up) - function(down)) / (2 * step)
    return out


# --- the pieces --------------------------------------------------------------------------------


@pytest.mark.parametrize(("patch", "height", "width"), [(2, 4, 6), (3, 6, 3), (4, 4, 4)])
def test_patchify_against_a_loop(patch: int, height: int, width: int) -> None:
    pixels = images(2, height, width)
    np.testing.assert_array_equal(patchify(jnp.asarray(pixels), patch), patches(pixels, patch))


@pytest.mark.parametrize(("patch", "height", "width"), [(2, 4, 6), (3, 6, 3), (4, 4, 4)])
def test_patches_go_back_where_they_came_from(patch: int, height: int, width: int) -> None:
    pixels = images(2, height, width)
    back = unpatchify(patchify(jnp.asarray(pixels), patch), height, width, patch)
    np.testing.assert_array_equal(back, pixels)


def test_targets_against_their_definition() -> None:
    pixels = images()
    pixels[0, :PATCH, :PATCH] = 77  # a blank patch: zeros, not NaN
    made = normalised_patches(jnp.asarray(pixels), PATCH, jnp.float64)
    np.testing.assert_allclose(made, targets(pixels), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(made[0, 0], 0, atol=1e-9)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_targets_are_float32_at_least(dtype: Any) -> None:
    shapes = jax.eval_shape(lambda x: normalised_patches(x, PATCH, dtype), images())
    assert shapes.dtype == jnp.float32


def error(predicted: np.ndarray, target: np.ndarray, hidden: np.ndarray) -> float:
    """Return mean over hidden patches of the mean squared difference."""
    costs = [
        ((predicted[i] - target[i]) ** 2).mean() for i in zip(*np.nonzero(hidden), strict=True)
    ]
    return sum(costs) / len(costs) if costs else 0.0


@given(hidden=st.lists(st.booleans(), min_size=6, max_size=6))
@settings(max_examples=20, deadline=None)
def test_error_counts_hidden_patches_only(hidden: list[bool]) -> None:
    rng = np.random.default_rng(0)
    predicted, target = rng.normal(size=(2, 2, 3, 5))
    where = np.array(hidden).reshape(2, 3)
    with jax.enable_x64(True):
        value = jax.jit(masked_error)(predicted, target, where)
    np.testing.assert_allclose(value, error(predicted, target, where), rtol=1e-12)


def test_gradients_of_the_pieces_by_finite_differences() -> None:
    rng = np.random.default_rng(0)
    predicted, target = rng.normal(size=(2, 2, 3, 5))
    hidden = np.array([[1, 0, 1], [0, 0, 1]], bool)
    got = jax.jit(jax.grad(masked_error))(predicted, target, hidden)
    expected = numeric(lambda p: error(p, target, hidden), predicted, 1e-5)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-10)
    assert not np.any(got[~hidden])
    pixels = images(1, 2, 4).astype(float)
    weight = rng.normal(size=targets(pixels).shape)
    got = jax.jit(jax.grad(lambda x: (normalised_patches(x, PATCH, jnp.float64) * weight).sum()))(
        pixels
    )
    expected = numeric(lambda x: (targets(x) * weight).sum(), pixels, 1e-3)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-8)


def test_error_is_computed_in_the_target_dtype() -> None:
    shapes = jax.eval_shape(
        masked_error,
        jax.ShapeDtypeStruct((2, 3, 5), jnp.bfloat16),
        jax.ShapeDtypeStruct((2, 3, 5), jnp.float32),
        jax.ShapeDtypeStruct((2, 3), jnp.bool_),
    )
    assert shapes.dtype == jnp.float32


@pytest.mark.parametrize(
    ("tokens", "ratio", "stay"),
    [(16, 0.75, 4), (64, 0.75, 16), (10, 0.5, 5), (2, 0.01, 1), (2, 0.99, 1), (9, 0.001, 8), (9, 0.999, 1)],
)  # fmt: skip
def test_number_of_visible_patches(tokens: int, ratio: float, stay: int) -> None:
    assert visible(tokens, ratio) == stay


@pytest.mark.parametrize(
    ("tokens", "ratio"), [(16, 0.0), (16, 1.0), (16, -0.5), (16, 1.5), (1, 0.5)]
)
def test_ratios_that_hide_nothing_or_all(tokens: int, ratio: float) -> None:
    with pytest.raises(UserError, match=f"ratio {ratio}, patches {tokens}"):
        visible(tokens, ratio)


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_predictions_come_out_in_image_order(data: st.DataObject) -> None:
    """A decoder whose parts pass everything on: token s must come out at s, a mask elsewhere."""
    index = np.array([data.draw(st.permutations(range(6))) for _ in range(2)])
    seen = (index[:, :2, None] + 1.0) * [1.0, 10.0]  # a token holds its patch's number
    coordinate = np.arange(6.0)[None, :, None] * [0.0, 100.0]
    parts = SimpleNamespace(
        embed=lambda x: x,
        mask=jnp.array([-1.0, -2.0]),
        positions=lambda coordinates: coordinates["here"],
        trunk=lambda stream, key: (stream, no_aux()),
        pixels=lambda x: x,
    )
    out, _ = Decoder.__call__(
        parts,  # type: ignore[arg-type]
        Stream(jnp.asarray(seen)),
        jnp.asarray(index),
        {"here": jnp.asarray(coordinate)},
        jax.random.key(0),
    )
    expected = np.broadcast_to([-1.0, -2.0], (2, 6, 2)).copy()
    for b in range(2):
        for s in index[b, :2]:
            expected[b, s] = [s + 1.0, 10.0 * (s + 1.0)]
    np.testing.assert_allclose(out, expected + coordinate)


# --- the objective on a model ------------------------------------------------------------------


def objective(ratio: float = 0.75) -> MaskedImage:
    return MaskedImage(
        mask_ratio=ratio, decoder_width=4, decoder_depth=1, decoder_heads=1, head="mim"
    )


def declared(ratio: float = 0.75) -> Declaration:
    image = Image(patch=PATCH, max_positions=4)
    inputs = {"image": Input("image", image, ImageInput(size=SIZE))}
    block = {"name": "transformer", "num_heads": 1, "mlp_dim": 4}
    config = ModelConfig(WIDTH, (GroupConfig(1, (block,)),))
    return declare_model(
        config, {"image": image}, [("mim", objective(ratio).heads(Widths.same(WIDTH), inputs))]
    )


def parameters(declaration: Declaration) -> Any:
    rng = np.random.default_rng(0)
    return {n: rng.normal(size=spec.shape) for n, spec in declaration.specs.items()}


class Watched:
    """A model whose decoder's inputs and predictions are kept; `plant` replaces the predictions."""

    def __init__(self, model: Any, plant: Any = None):
        self._model, self._plant = model, plant
        self.heads = {"mim": SimpleNamespace(decoder=self._decode)}
        self.kept: dict[str, Any] = {}

    def tokens(self, modality: str, arrays: Any) -> Stream:
        self.kept["all"] = self._model.tokens(modality, arrays)
        return self.kept["all"]

    def encode(self, streams: Any, key: jax.Array) -> Any:
        self.kept["given"] = streams[0]
        return self._model.encode(streams, key)

    def _decode(self, seen: Stream, index: jax.Array, coordinates: Any, key: jax.Array) -> Any:
        decoder = self._model.heads["mim"].decoder
        predicted, aux = decoder(seen, index, coordinates, key)
        if self._plant is not None:
            predicted = self._plant
        self.kept |= {"index": index, "predicted": predicted}
        return predicted, aux


@partial(jax.jit, static_argnames="ratio")
def watch(p: Any, pixels: Any, valid: Any, plant: Any, seed: Any, ratio: float) -> Any:
    model: Any = Watched(declared(ratio).merge(p), plant)
    batch = Batch(inputs={"image": {"pixels": pixels}}, valid=valid, fields={})
    return objective(ratio)(model, batch, jax.random.key(seed)), model.kept


def run(
    pixels: Any, ratio: float = 0.75, plant: Any = None, seed: int = 0, valid: Any = VALID
) -> Any:
    """Return the loss and what passed."""
    loss, kept = watch(parameters(declared(ratio)), pixels, valid, plant, seed, ratio)
    return loss, SimpleNamespace(**kept)


@pytest.mark.parametrize(("ratio", "stay"), [(0.75, 4), (0.5, 8)])
def test_the_trunk_is_given_the_first_patches_of_a_random_order(ratio: float, stay: int) -> None:
    _, kept = run(images(), ratio)
    index = np.asarray(kept.index)
    np.testing.assert_array_equal(np.sort(index, axis=1), np.tile(np.arange(TOKENS), (ROWS, 1)))
    assert kept.given.x_BSD.shape == (ROWS, stay, WIDTH)
    assert kept.given.layout == (("image", stay),)
    for b in range(ROWS):
        expected = np.asarray(kept.all.x_BSD)[b, index[b, :stay]]
        np.testing.assert_array_equal(kept.given.x_BSD[b], expected)


def test_masks_differ_by_example_and_by_key_and_are_fixed_by_it() -> None:
    first, again, other = (np.asarray(run(images(), seed=s)[1].index) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len({tuple(row) for row in first}) == ROWS


def test_every_patch_is_hidden_as_often_as_any_other() -> None:
    hidden = np.zeros(TOKENS)
    for seed in range(40):
        index = np.asarray(run(images(), seed=seed)[1].index)
        for row in index:
            hidden[row[4:]] += 1
    # 160 draws at 0.75: 120 expected, standard deviation 5.5.
    assert hidden.sum() == 160 * 12
    assert np.all(np.abs(hidden - 120) < 5 * 5.5)


def test_predictions_do_not_depend_on_hidden_pixels() -> None:
    declaration = declared()
    p = parameters(declaration)
    weight = np.random.default_rng(2).normal(size=(ROWS, TOKENS, PATCH**2 * 3))

    @jax.jit
    @jax.grad
    def gradient(pixels: Any) -> Any:
        model: Any = Watched(declaration.merge(p))
        batch = Batch(inputs={"image": {"pixels": pixels}}, valid=VALID, fields={})
        objective()(model, batch, jax.random.key(0))
        return (model.kept["predicted"] * weight).sum()

    index = np.asarray(run(images())[1].index)
    moved = np.abs(patches(np.asarray(gradient(images().astype(float))))).max(axis=-1)
    for b in range(ROWS):
        np.testing.assert_array_equal(moved[b, index[b, 4:]], 0)
        assert moved[b, index[b, :4]].min() > 0


def hidden_patches(index: np.ndarray, stay: int = 4) -> np.ndarray:
    hidden = np.ones((ROWS, TOKENS), bool)
    for b in range(ROWS):
        hidden[b, index[b, :stay]] = False
    return hidden


def test_the_loss_is_the_error_of_hidden_patches_of_valid_rows() -> None:
    loss, kept = run(images())
    hidden = hidden_patches(np.asarray(kept.index)) & VALID[:, None]
    expected = error(np.asarray(kept.predicted), targets(images()), hidden)
    np.testing.assert_allclose(loss.value, expected, rtol=1e-9)
    baseline = error(np.zeros_like(kept.predicted), targets(images()), hidden)
    np.testing.assert_allclose(loss.metrics["baseline"], baseline, rtol=1e-9)
    np.testing.assert_allclose(loss.metrics["baseline"], 1, rtol=1e-3)


def test_right_where_hidden_costs_nothing_and_right_elsewhere_helps_nothing() -> None:
    pixels = images()
    hidden = hidden_patches(np.asarray(run(pixels)[1].index))[..., None]
    right, junk = targets(pixels), np.full((ROWS, TOKENS, PATCH**2 * 3), 3.0)
    loss, _ = run(pixels, plant=np.where(hidden, right, junk))
    np.testing.assert_allclose(loss.value, 0, atol=1e-12)
    loss, _ = run(pixels, plant=np.where(hidden, junk, right))
    # The mean of (3 - t)^2 with mean 0 and variance 1.
    np.testing.assert_allclose(loss.value, 10, rtol=1e-3)


def test_invalid_rows_change_nothing() -> None:
    pixels = images()
    other = np.where(VALID[:, None, None, None], pixels, 255 - pixels // 2)
    before, after = run(pixels)[0], run(other)[0]
    assert before.value == after.value
    assert before.metrics["baseline"] == after.metrics["baseline"]


@jax.jit
@jax.value_and_grad
def learn(p: Any, valid: Any) -> Any:
    batch = Batch(inputs={"image": {"pixels": images()}}, valid=valid, fields={})
    return objective()(declared().merge(p), batch, jax.random.key(0)).value


def test_no_valid_row_costs_nothing_and_moves_nothing() -> None:
    value, gradient = learn(parameters(declared()), np.zeros(ROWS, bool))
    assert value == 0
    for name, g in gradient.items():
        np.testing.assert_array_equal(g, 0, err_msg=name)


def test_blank_patches_cost_nothing_to_the_baseline() -> None:
    pixels = images()
    pixels[:, :, : SIZE // 2] = 255
    loss, kept = run(pixels, valid=np.ones(ROWS, bool))
    hidden = hidden_patches(np.asarray(kept.index))
    drawn = np.zeros((SIZE // PATCH, SIZE // PATCH), bool)
    drawn[:, SIZE // PATCH // 2 :] = True
    share = (hidden & drawn.ravel()).sum() / hidden.sum()
    np.testing.assert_allclose(loss.metrics["baseline"], share, rtol=1e-3)


def test_every_parameter_learns() -> None:
    gradient = learn(parameters(declared()), VALID)[1]
    assert {n for n, g in gradient.items() if not np.any(g)} == set()


@pytest.mark.parametrize("is_right", [True, False])
def test_what_it_shows_fills_hidden_patches_only(is_right: bool) -> None:
    """A prediction equal to the targets gives the picture back; one of zeros, each patch's mean."""
    pixels = images()
    _, kept = run(pixels)
    plant = targets(pixels) if is_right else np.zeros((ROWS, TOKENS, PATCH**2 * 3))

    @jax.jit
    def show(p: Any, plant: Any) -> Any:
        model: Any = Watched(declared().merge(p), plant)
        batch = Batch(inputs={"image": {"pixels": pixels}}, valid=VALID, fields={})
        return objective().show(model, batch, jax.random.key(0))

    made = show(parameters(declared()), plant)
    assert tuple(made) != () and set(made) == set(objective().shows())
    assert {(v.shape, v.dtype) for v in made.values()} == {(pixels.shape, np.dtype(np.uint8))}
    whole, seen, predicted, means = (patches(np.asarray(made[n])) for n in objective().shows())
    hidden = hidden_patches(np.asarray(kept.index))
    np.testing.assert_array_equal(whole, patches(pixels))
    mean = np.round(patches(pixels).mean(axis=-1, keepdims=True)) + 0 * whole
    for filled, filling in (
        (seen, 153 + 0 * whole),
        (means, mean),
        (predicted, whole if is_right else mean),
    ):
        np.testing.assert_array_equal(filled[~hidden], whole[~hidden])
        assert np.abs(filled[hidden].astype(int) - filling[hidden]).max() <= 1


def test_what_it_reads_and_makes() -> None:
    assert objective().reads() == ("image",) and not isinstance(objective(), Embeds)
    assert MaskedImage(modality="depth").reads() == ("depth",)
    assert objective().fields() == ()
    with pytest.raises(UserError, match="MaskedImage is none that embeds"):
        able(objective(), Embeds)


def test_a_class_token_is_refused() -> None:
    image = Input("image", Image(patch=2, max_positions=4, class_token=True), ImageInput(size=4))
    with pytest.raises(
        UserError, match="a class token is no patch; remove 'class_token' of modalities.image"
    ):
        MaskedImage().check_inputs({"image": image})
