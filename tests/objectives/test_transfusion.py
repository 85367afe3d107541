"""Transfusion: what sees what, what the loss is a mean of, and what is drawn from a text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import UserError
from mmjax.layers.trunk import GroupConfig
from mmjax.modalities.image import Image, ImageInput
from mmjax.modalities.text import Text, TextInput
from mmjax.modality import Input
from mmjax.model import ModelConfig, declare_model
from mmjax.objective import row_keys
from mmjax.objectives.transfusion import Transfusion
from mmjax.parameters import Declaration

ROWS, SIZE, LENGTH, WIDTH, VOCABULARY = 3, 4, 5, 8, 11
VALID = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], bool)
TEXT_FIRST = Transfusion(head="head")
IMAGE_FIRST = replace(TEXT_FIRST, order=("image", "text"))


@pytest.fixture(autouse=True)
def _x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def built(objective: Transfusion) -> tuple[Declaration, dict[str, Any]]:
    """The model's declaration, and random parameters."""
    modalities = {
        "image": Image(patch=2, buckets=2),
        "text": Text(vocabulary=VOCABULARY, buckets=8),
    }
    inputs = {
        "image": Input("image", modalities["image"], ImageInput(size=SIZE)),
        "text": Input("text", modalities["text"], TextInput(length=LENGTH)),
    }
    block = {"name": "transformer", "heads": 2, "hidden": 8}
    config = ModelConfig(WIDTH, (GroupConfig(2, (block,)),))
    declaration = declare_model(config, modalities, [("head", objective.heads(WIDTH, inputs))])
    rng = np.random.default_rng(0)
    return declaration, {
        n: jnp.asarray(rng.normal(size=s.shape)) for n, s in declaration.specs.items()
    }


def batch(rows: int = ROWS) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {
        "inputs": {
            "image": {
                "pixels": jnp.asarray(rng.integers(0, 256, (rows, SIZE, SIZE, 3)), jnp.uint8)
            },
            "text": {
                "ids": jnp.asarray(rng.integers(0, VOCABULARY, (rows, LENGTH))),
                "valid": jnp.asarray(VALID[:rows]),
            },
        },
        "fields": {},
        "valid": jnp.array([True, True, False])[:rows],
    }


def reached(objective: Transfusion, output: int) -> tuple[np.ndarray, np.ndarray]:
    """Which text tokens and which image patches an output (0: logits, 1: prediction) of row 1 depends on."""
    declaration, p = built(objective)
    inputs = batch()["inputs"]
    table = p["stems/text/embedding"]
    # Each place of the text has a vocabulary entry of its own, so that gradients by entries are by places.
    inputs["text"]["ids"] = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
    x = jax.random.normal(jax.random.key(0), (ROWS, SIZE, SIZE, 3))

    def outputs(table: jax.Array, x: jax.Array) -> jax.Array:
        model = declaration.merge({**p, "stems/text/embedding": table})
        times, keep = jnp.full(ROWS, 0.3), jnp.ones(ROWS, bool)
        found = objective._run(model, inputs, x, times, keep, jax.random.key(1))[output][1]
        return found.sum(-1) if output == 0 else found.sum(-1).ravel()

    by_table, by_x = jax.jit(jax.jacrev(outputs, argnums=(0, 1)))(table, x)
    patches = np.abs(by_x[:, 1]).reshape(-1, 2, 2, 2, 2, 3).sum((2, 4, 5)).reshape(-1, 4)
    return np.abs(by_table[:, :LENGTH]).sum(-1) > 0, patches > 0


def test_what_sees_what_where_the_text_comes_first() -> None:
    of_text, of_image = reached(TEXT_FIRST, 0)
    # The logits of token i see the tokens before it and nothing of the image.
    np.testing.assert_array_equal(of_text, np.tril(np.ones((LENGTH, LENGTH)), -1))
    assert not of_image.any()
    of_text, of_image = reached(TEXT_FIRST, 1)
    assert of_text.all() and of_image.all()


def test_what_sees_what_where_the_image_comes_first() -> None:
    of_text, of_image = reached(IMAGE_FIRST, 0)
    np.testing.assert_array_equal(of_text, np.tril(np.ones((LENGTH, LENGTH)), -1))
    assert of_image.all()
    of_text, of_image = reached(IMAGE_FIRST, 1)
    assert not of_text.any() and of_image.all()


@pytest.mark.parametrize("target", ["epsilon", "v", "flow"])
@pytest.mark.parametrize("objective", [TEXT_FIRST, IMAGE_FIRST])
def test_the_loss_against_its_formula(objective: Transfusion, target: str) -> None:
    objective = replace(objective, target=target, drop=0.5)
    declaration, p = built(objective)
    model, b, key = declaration.merge(p), batch(), jax.random.key(3)
    x = np.asarray(b["inputs"]["image"]["pixels"]) / 127.5 - 1
    t, e, keep = (np.asarray(a) for a in objective._draw(row_keys(b, key), jnp.asarray(x)))
    if target == "flow":
        alpha, sigma = 1 - t, t
    else:
        alpha = np.cos((t + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)
        sigma = np.sqrt(1 - alpha**2)
    alpha, sigma = (a[:, None, None, None] for a in (alpha, sigma))
    x_t = alpha * x + sigma * e
    wanted = {"epsilon": e, "v": alpha * e - sigma * x, "flow": e - x}[target]
    logits, predicted, _ = objective._run(
        model, b["inputs"], jnp.asarray(x_t), jnp.asarray(t), jnp.asarray(keep), key
    )
    logs = np.asarray(logits) - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.asarray(b["inputs"]["text"]["ids"])
    told = [-logs[r, i, ids[r, i]] for r in (0, 1) if keep[r] for i in range(LENGTH) if VALID[r, i]]
    image = np.mean([np.square(predicted[r] - wanted[r]).mean() for r in (0, 1)])
    loss = objective(model, b, key)
    text = np.mean(told) if told else 0.0
    np.testing.assert_allclose(loss.metrics["image"], image, rtol=1e-8)
    np.testing.assert_allclose(loss.metrics["text"], text, rtol=1e-8)
    np.testing.assert_allclose(loss.value, text + 5 * image, rtol=1e-8)


def test_an_image_before_its_text_is_never_noisier_than_the_limit() -> None:
    keys = jax.random.split(jax.random.key(0), 200)
    x = jnp.zeros((200, 1, 1, 3))
    t, e, keep = IMAGE_FIRST._draw(keys, x)
    assert 0.45 < t.max() <= 0.5 and t.min() < 0.05 and keep.all()
    t, e, keep = TEXT_FIRST._draw(keys, x)
    assert t.max() > 0.9 and 0.02 < 1 - keep.mean() < 0.2
    assert abs(e.std() - 1) < 0.1


def test_a_row_without_its_text_draws_as_if_there_were_none() -> None:
    declaration, p = built(TEXT_FIRST)
    model, inputs = declaration.merge(p), batch()["inputs"]
    x = jax.random.normal(jax.random.key(0), (ROWS, SIZE, SIZE, 3))

    def drawn(ids: jax.Array, keep: bool) -> np.ndarray:
        given = {**inputs, "text": {**inputs["text"], "ids": ids}}
        times, sees = jnp.full(ROWS, 0.3), jnp.full(ROWS, keep)
        return np.asarray(TEXT_FIRST._run(model, given, x, times, sees, jax.random.key(1))[1])

    ids = inputs["text"]["ids"]
    np.testing.assert_array_equal(drawn(ids, False), drawn((ids + 1) % VOCABULARY, False))
    assert not np.allclose(drawn(ids, True), drawn((ids + 1) % VOCABULARY, True))


def test_guidance_leads_away_from_what_is_drawn_without_the_text() -> None:
    declaration, p = built(TEXT_FIRST)
    model, inputs = declaration.merge(p), batch()["inputs"]

    def drawn(guidance: float, ids: jax.Array) -> np.ndarray:
        given = {**inputs, "text": {**inputs["text"], "ids": ids}}
        objective = replace(TEXT_FIRST, guidance=guidance, steps=4)
        return np.asarray(objective.sample(model, given, (ROWS, SIZE, SIZE, 3), jax.random.key(0)))

    ids = inputs["text"]["ids"]
    other = (ids + 1) % VOCABULARY
    # Without guidance (0) the text is not seen; with it, it is.
    np.testing.assert_array_equal(drawn(0.0, ids), drawn(0.0, other))
    assert not np.allclose(drawn(1.0, ids), drawn(1.0, other))
    assert not np.allclose(drawn(1.0, ids), drawn(3.0, ids))
    assert np.abs(drawn(3.0, ids)).max() <= 1 + 1e-6


def test_an_order_that_names_other_things() -> None:
    with pytest.raises(UserError, match="order is .*names 'text' and 'image'"):
        Transfusion(order=("text", "text"))
    with pytest.raises(UserError, match="limit is 2"):
        Transfusion(limit=2)
