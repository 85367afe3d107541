"""IMP's head against NumPy: from a model's pooled tokens to vectors, temperature and loss.

The release (google-research/imp, `heads.py` and `objectives.py`) has, for each ordered pair of modalities, a dense
layer with bias, GELU by its tanh form, a second dense layer, a layer norm of eps 1e-6, and unit length; logits are
divided by `relu(t) + 1e-6`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.core.batch import Batch
from mmjax.core.parameters import Declaration
from mmjax.nn.towers import Widths
from mmjax.objectives.cross_modal import CrossModal, Space, Temperature

WIDTH, JOINT, ROWS = 6, 5, 4
PAIR = CrossModal(
    modalities=("vision", "text"), head="joint", embed_dim=JOINT, init_temperature=0.2
)


pytestmark = pytest.mark.usefixtures("x64")


class Heads:
    """A model that has this head alone."""

    def __init__(self, parameters: dict[str, np.ndarray]):
        parts = {
            name: Declaration(part) for name, part in PAIR.heads(Widths.same(WIDTH), {}).items()
        }
        own = {
            name: {n.removeprefix(f"{name}/"): v for n, v in parameters.items() if n.startswith(f"{name}/")}
            for name in parts
        }  # fmt: skip
        self.heads = {"joint": {name: parts[name].merge(own[name]) for name in parts}}


def parameters() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        f"{name}/{n}": rng.normal(size=spec.shape)
        for name, part in PAIR.heads(Widths.same(WIDTH), {}).items()
        for n, spec in Declaration(part).specs.items()
    }


def vector(p: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    up = x @ p[f"{name}/up/kernel"] + p[f"{name}/up/bias"]
    gelu = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    out = gelu @ p[f"{name}/out/kernel"] + p[f"{name}/out/bias"]
    spread = np.sqrt(out.var(axis=-1, keepdims=True) + 1e-6)
    normed = (out - out.mean(axis=-1, keepdims=True)) / spread
    normed = normed * p[f"{name}/norm/scale"] + p[f"{name}/norm/bias"]
    return normed / np.linalg.norm(normed, axis=-1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.4, -0.3, 0.0])
def test_pooled_tokens_to_the_loss(temperature: float) -> None:
    """At a temperature below 0, relu gives 1e-6: logits are huge, and the loss is that of the nearest vector."""
    p = {**parameters(), "temperature_vision_text/value": np.array(temperature)}
    model: Any = Heads(p)
    pooled = np.random.default_rng(1).normal(size=(2, ROWS, WIDTH))
    made = {
        f"{one} {two}": PAIR._vectors(model, jnp.asarray(x), one, two)[:, None]
        for x, (one, two) in zip(pooled, (("vision", "text"), ("text", "vision")), strict=True)
    }
    vision, text = vector(p, "vision_to_text", pooled[0]), vector(p, "text_to_vision", pooled[1])
    np.testing.assert_allclose(made["vision text"][:, 0], vision, rtol=1e-9)
    np.testing.assert_allclose(made["text vision"][:, 0], text, rtol=1e-9)
    batch: Any = Batch(valid=jnp.ones(ROWS, bool), inputs={"vision": {}, "text": {}}, fields={})
    logits = vision @ text.T / (max(temperature, 0.0) + 1e-6)
    losses = []
    for each in (logits, logits.T):
        top = each.max(axis=1)
        losses.append(top + np.log(np.exp(each - top[:, None]).sum(axis=1)) - np.diag(each))
    found = PAIR.compare(model, made, batch)
    assert float(found.value) == pytest.approx(np.mean(losses), rel=1e-7)
    reported = float(found.metrics["temperature vision text"])
    assert reported == pytest.approx(max(temperature, 0.0) + 1e-6, rel=1e-9)


def test_a_negative_temperature_has_no_gradient() -> None:
    part = Declaration(Temperature(0.2))
    assert float(part.initialise(0)["value"]) == pytest.approx(0.2)
    for value, slope in ((-0.5, 0.0), (0.5, 1.0)):
        given = {"value": jnp.asarray(value)}
        assert jax.grad(lambda p: part.merge(p)())(given)["value"] == slope


def test_a_space_ends_with_a_norm_at_one() -> None:
    start = Declaration(Space(WIDTH, JOINT)).initialise(0)
    assert set(start) == {
        f"{n}"
        for n in ("up/kernel", "up/bias", "out/kernel", "out/bias", "norm/scale", "norm/bias")
    }
    assert (start["norm/scale"] == 1).all() and not start["norm/bias"].any()
