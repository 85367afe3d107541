"""Rows that are not valid have no effect: whatever they hold, every loss, metric and gradient keeps its bits."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toyrun

import mmjax
from mmjax.core import config as configs
from mmjax.core.batch import Batch
from mmjax.core.parameters import Declaration
from mmjax.engine.gradient import loss_and_gradient
from mmjax.evaluators.base import Computation, Embed, Predict, function
from mmjax.modalities.base import Input
from mmjax.modalities.image import Image, ImageInput
from mmjax.modalities.text import Text, TextInput
from mmjax.model import ModelConfig, declare_model
from mmjax.nn.towers import Widths
from mmjax.nn.trunk import GroupConfig
from mmjax.objectives.base import Objective
from mmjax.objectives.byol import Byol
from mmjax.objectives.classification import Classification
from mmjax.objectives.coca import Coca
from mmjax.objectives.contrastive import Contrastive
from mmjax.objectives.cross_modal import CrossModal
from mmjax.objectives.fusion import Fusion
from mmjax.objectives.masked_image import MaskedImage
from mmjax.objectives.simdino import Simdino
from mmjax.objectives.sum import Member, Sum
from mmjax.objectives.transfusion import Transfusion
from mmjax.task import Task, TaskConfig

ROWS, SIZE, LENGTH, WIDTH, CLASSES, VOCABULARY = 6, 4, 4, 8, 3, 11
VALID = np.array([True, True, False, True, False, True])
BOTH = ("image", "text")
DENSE: dict[str, Any] = {"name": "transformer", "num_heads": 2, "mlp_dim": 8}


def experts(router: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {**DENSE, "experts": {"count": 3, "router": router, **more}}


TOKENS = experts(
    {"name": "token_choice", "top_k": 2, "capacity": 0.5, "noise": 1.0},
    losses={"importance": 1.0, "load": 1.0, "balance": 1.0, "z": 1.0},
    local_entropy={"image": 1.0},
    global_entropy={"image": 1.0, "text": 1.0},
)
CHOICE = experts({"name": "expert_choice", "capacity": 0.5}, causal={"mlp_dim": 4})
SOFT = experts({"name": "soft", "slots_per_expert": 2})
# One trunk of all kinds, attention among them: what any of them lets through is seen.
MIXED = (GroupConfig(1, (TOKENS, CHOICE, SOFT)),)
CROSS = {**DENSE, "name": "cross_transformer"}
OBJECTIVES: dict[str, Objective] = {
    "byol": Byol(head="h", modality="views", hidden=8, embed_dim=4),
    "classification": Classification(head="h", classes=CLASSES, modalities=BOTH, init="lecun"),
    "coca": Coca(
        head="h", unimodal=(GroupConfig(1, (TOKENS,)),), multimodal=(GroupConfig(1, (CROSS, CHOICE)),),
        queries=2, pooler_heads=2, embed_dim=4, positive_key="concept",
    ),
    "contrastive": Contrastive(head="h", modalities=BOTH, embed_dim=4, positive_key="concept", joint_forward=True),
    "cross_modal": CrossModal(head="h", modalities=BOTH, embed_dim=4, positive_key="concept"),
    "fusion": Fusion(head="h", classes=CLASSES, modalities=BOTH, init="lecun"),
    "masked_image": MaskedImage(head="h", decoder_width=8, decoder_depth=1, decoder_heads=2),
    "simdino": Simdino(head="h", modality="views", hidden=8, embed_dim=4),
    "sum": Sum(
        head="h",
        members={
            "pairs": Member(Contrastive(modalities=BOTH, embed_dim=4, positive_key="concept")),
            "classes": Member(Classification(classes=CLASSES, modalities=BOTH, init="lecun"), 0.5),
        },
    ),
    "transfusion": Transfusion(head="h", pack=2, attend_across_items=True),
}  # fmt: skip
# Compiled quickly rather than to run quickly.
QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
MODALITIES = {
    "image": Image(patch=2, max_positions=2),
    "text": Text(vocabulary=VOCABULARY, max_positions=8),
}
INPUTS = {
    "image": Input("image", MODALITIES["image"], ImageInput(size=SIZE)),
    "text": Input("text", MODALITIES["text"], TextInput(length=LENGTH)),
}
VIEWS = Input("views", MODALITIES["image"], ImageInput(size=SIZE), instances=2)


def inputs(name: str) -> dict[str, Input]:
    return {"views": VIEWS} if OBJECTIVES[name].teachers() else INPUTS


def task(name: str) -> Task:
    source: Any = None
    return Task(name, TaskConfig({}, {}, {}, ROWS), inputs(name), OBJECTIVES[name], source)


def batch(seed: int, valid: np.ndarray = VALID) -> dict[str, Any]:
    """Return a batch whose valid rows are always the same; the content of the others depends on the seed."""
    fixed, other = np.random.default_rng(0), np.random.default_rng(seed)

    def rows(make: Any) -> jax.Array:
        x, y = make(fixed), make(other)
        return jnp.asarray(np.where(valid.reshape(-1, *[1] * (x.ndim - 1)), x, y))

    def pixels(*shape: int) -> jax.Array:
        return rows(lambda g: g.integers(0, 256, (ROWS, *shape, SIZE, SIZE, 3), np.uint8))

    return Batch(
        inputs={
            "image": {"pixels": pixels()},
            "views": {"pixels": pixels(2), "present": jnp.ones((ROWS, 2), bool)},
            "text": {
                "ids": rows(lambda g: g.integers(4, VOCABULARY, (ROWS, LENGTH), np.int32)),
                "valid": rows(lambda g: np.arange(LENGTH) < g.integers(1, LENGTH + 1, (ROWS, 1))),
            },
        },
        fields={
            "label": rows(lambda g: g.integers(0, CLASSES, ROWS, np.int32)),
            "concept": rows(lambda g: g.integers(0, 4, ROWS, np.int32)),
        },
        valid=jnp.asarray(valid),
    )  # fmt: skip


@cache
def built(name: str) -> tuple[Declaration, Any]:
    """Return the model's declaration, and `batch -> (loss, gradient)` with random parameters, compiled."""
    objective, read = OBJECTIVES[name], inputs(name)
    heads = objective.named_heads(Widths.same(WIDTH), read)
    modalities = {**MODALITIES, **{each: read[each].modality for each in read}}
    declaration = declare_model(ModelConfig(WIDTH, MIXED), modalities, heads)
    copied = frozenset(declaration.specs)
    declaration.teach({teacher: copied for teacher in objective.teachers()})
    rng = np.random.default_rng(3)
    p = {
        n: jnp.asarray(0.5 * rng.normal(size=s.shape), jnp.float32)
        for n, s in declaration.read.items()
    }

    def found(batch: Any) -> Any:
        return loss_and_gradient(task(name), declaration.merge, p, batch, jax.random.key(0))

    return declaration, jax.jit(found, compiler_options=QUICKLY)


def same_bits(one: Any, other: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), one, other)


def test_every_shipped_objective_is_looked_at() -> None:
    folder = Path(mmjax.__file__).parent / "objectives"
    assert set(OBJECTIVES) == {p.stem for p in folder.glob("*.py")} - {"__init__", "base"}
    assert set(OBJECTIVES) <= set(configs.names("objectives"))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_invalid_rows_hold_changes_no_bit(name: str) -> None:
    _, call = built(name)
    loss, gradient = jax.device_get(call(batch(1)))
    assert np.isfinite(loss.value)
    assert loss.value > 0 or (name == "simdino" and loss.value < 0)
    assert any(n.startswith("dropped") for n in loss.metrics)
    assert all(np.isfinite(g).all() for g in gradient.values())
    assert sum(bool(np.any(g)) for g in gradient.values()) > 10
    for seed in (2, 3):
        same_bits((loss, gradient), jax.device_get(call(batch(seed))))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_without_a_valid_row_loss_and_gradient_are_zero(name: str) -> None:
    loss, gradient = jax.device_get(built(name)[1](batch(1, np.zeros(ROWS, bool))))
    assert loss.value == 0
    assert not any(np.any(g) for g in gradient.values())
    assert all(np.isfinite(m).all() for m in loss.metrics.values())


@pytest.mark.parametrize(
    ("name", "computation"),
    [("contrastive", Embed("image")), ("classification", Predict(("image", "text")))],
)
def test_nor_does_it_change_what_evaluation_computes(name: str, computation: Computation) -> None:
    """Such as the last batch of a split, which blank rows fill up."""
    declaration, _ = built(name)
    rng = np.random.default_rng(4)
    p = {
        n: jnp.asarray(rng.normal(size=s.shape), jnp.float32) for n, s in declaration.specs.items()
    }
    of = function(task(name), computation)
    call = jax.jit(
        lambda b: of(declaration.merge(p), b, jax.random.key(0)), compiler_options=QUICKLY
    )
    one, other = (jax.device_get(call(batch(seed))) for seed in (1, 2))
    same_bits({n: x[VALID] for n, x in one.items()}, {n: x[VALID] for n, x in other.items()})


EXPERTS = (
    "model.layers=[{'repeat': 1, 'blocks': [{'name': 'transformer', 'num_heads': 2, 'mlp_dim': 8, 'experts': "
    "{'count': 2, 'router': {'name': 'expert_choice', 'capacity': 0.6}}}]}]"
)
PAIR = (
    "modalities={'toy': {'name': 'toy'}, 'other': {'name': 'toy'}}",
    "tasks={'one': {'source': {'name': 'toy'}, 'batch': 8, 'inputs': {'toy': {}, 'other': {}}, "
    "'objective': {'name': 'contrastive', 'modalities': ['toy', 'other'], 'embed_dim': 4}}}",
)


def test_five_values_are_embedded_as_the_model_has_these_five(tmp_path: Path) -> None:
    """Not as five of eight of which three are blank."""
    toyrun.run(tmp_path / "run", EXPERTS, *PAIR, "steps=1")
    model = mmjax.load(str(tmp_path / "run"))
    values = np.random.default_rng(0).normal(size=(5, 2, 6)).astype(np.float32)
    objective = model.tasks["one"].objective
    alone = jax.jit(lambda x: objective.embed(model.module, "toy", {"rows": x}))(values)
    np.testing.assert_allclose(model.embed(toy=list(values)), alone, atol=1e-6)
    padded = np.concatenate([values, np.zeros((3, 2, 6), np.float32)])
    other = jax.jit(lambda x: objective.embed(model.module, "toy", {"rows": x}))(padded)[:5]
    assert np.abs(np.asarray(other - alone)).max() > 1e-3
