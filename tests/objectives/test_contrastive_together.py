"""Both modalities in one pass: nothing changes but what they compete for, which is experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from mmjax.core.batch import Batch
from mmjax.core.parameters import Declaration
from mmjax.modalities.image import Image
from mmjax.modalities.text import Text
from mmjax.model import ModelConfig, declare_model
from mmjax.nn.towers import Widths
from mmjax.nn.trunk import GroupConfig
from mmjax.objectives.contrastive import Contrastive

ROWS = 4
TIGHT = {  # of 4 rows with 4 tokens and 3, half find a slot, the first that ask
    "count": 2, "router": {"name": "token_choice", "capacity": 0.5}, "group_size": 64,
    "losses": {"importance": 1.0},
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("x64")


def pair(experts: dict[str, Any] | None) -> tuple[Declaration, dict[str, Any], dict[str, Any]]:
    """Return a model of one layer, parameters, and a batch."""
    image, text = Image(patch=4, max_positions=2), Text(vocabulary=32, max_positions=4)
    block: dict[str, Any] = {"name": "transformer", "num_heads": 2, "mlp_dim": 16}
    if experts:
        block["experts"] = experts
    config = ModelConfig(width=8, layers=(GroupConfig(repeat=1, blocks=(block,)),))
    heads = Contrastive(modalities=("image", "text"), embed_dim=4).heads(Widths.same(8), {})
    declaration = declare_model(config, {"image": image, "text": text}, [("pair", heads)])
    rng = np.random.default_rng(1)
    parameters = {
        n: rng.normal(size=p.shape) * (1 if len(p.shape) < 2 else p.shape[-2] ** -0.5)
        for n, p in declaration.specs.items()
    }
    inputs = {
        "image": {"pixels": rng.integers(0, 256, (ROWS, 8, 8, 3)).astype(np.uint8)},
        "text": {
            "ids": rng.integers(0, 32, (ROWS, 3)).astype(np.int32),
            "valid": np.ones((ROWS, 3), bool),
        },
    }
    return declaration, parameters, Batch(inputs=inputs, valid=np.ones(ROWS, bool), fields={})


def represented(
    declaration: Declaration, parameters: Any, batch: Any, together: bool
) -> tuple[np.ndarray, np.ndarray]:
    objective = Contrastive(
        modalities=("image", "text"), embed_dim=4, joint_forward=together, head="pair"
    )

    @jax.jit
    def call(p: Any, batch: Any) -> Any:
        return objective.represent(declaration.merge(p), batch, jax.random.key(0)).rows

    image, text = call(parameters, batch)
    return np.asarray(image), np.asarray(text)


def value_and_gradient(
    declaration: Declaration, parameters: Any, batch: Any, together: bool
) -> Any:
    objective = Contrastive(
        modalities=("image", "text"), embed_dim=4, joint_forward=together, head="pair"
    )

    @jax.jit
    @jax.value_and_grad
    def call(p: Any) -> Any:
        return objective(declaration.merge(p), batch, jax.random.key(0)).value

    return call(parameters)


def test_without_experts_nothing_changes() -> None:
    """Each attends to its own tokens: the mask is what makes it so."""
    made = pair(None)
    (one, gradient), (other, gradients) = (value_and_gradient(*made, t) for t in (True, False))
    np.testing.assert_allclose(one, other, rtol=1e-12)
    assert max(np.abs(g).max() for g in gradient.values()) > 0.01
    for name, expected in gradients.items():
        np.testing.assert_allclose(gradient[name], expected, rtol=1e-9, atol=1e-12, err_msg=name)


def test_tokens_of_both_compete_for_experts() -> None:
    """Other texts leave other slots to the same pictures; apart, pictures know nothing of texts."""
    declaration, parameters, batch = pair(TIGHT)
    text = batch.inputs["text"]
    changed = {**text, "ids": (text["ids"] + 7) % 32}
    others = replace(batch, inputs={**batch.inputs, "text": changed})
    moved = {
        together: np.abs(
            represented(declaration, parameters, batch, together)[0]
            - represented(declaration, parameters, others, together)[0]
        ).max()
        for together in (True, False)
    }
    assert moved[False] == 0 and moved[True] > 1e-3, moved
