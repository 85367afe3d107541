"""Fusion: what each output may see, and what the loss is made of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.core.batch import Batch
from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.modalities.base import Input
from mmjax.modalities.image import Image, ImageInput
from mmjax.modalities.text import Text, TextInput
from mmjax.model import ModelConfig, declare_model
from mmjax.nn.towers import Widths
from mmjax.nn.trunk import GroupConfig
from mmjax.objectives.fusion import Fusion

ROWS, WIDTH, CLASSES = 4, 8, 3
ZORRO = Fusion(head="head", classes=CLASSES, modalities=("image", "text"))
FULL = replace(ZORRO, mask="full")
MBT = replace(FULL, readout="mean")
RELEASED = replace(MBT, loss="each", shared=True)  # scenic's, with class tokens
PLAIN = {"name": "transformer", "num_heads": 2, "mlp_dim": 8}
BOTTLENECK = {"name": "bottleneck", "modalities": ["image", "text"], "num_heads": 2, "mlp_dim": 8}


pytestmark = pytest.mark.usefixtures("x64")


def built(objective: Fusion, block: dict[str, Any]) -> Any:
    """Return a function of inputs to logits by output, jitted, and the model."""
    modalities = {
        "image": Image(patch=2, max_positions=2),
        "text": Text(vocabulary=9, max_positions=8),
    }
    inputs = {
        "image": Input("image", modalities["image"], ImageInput(size=4)),
        "text": Input("text", modalities["text"], TextInput(length=5)),
    }
    config = ModelConfig(WIDTH, (GroupConfig(2, (block,)),))
    declaration: Declaration = declare_model(
        config, modalities, [("head", objective.heads(Widths.same(WIDTH), inputs))]
    )
    rng = np.random.default_rng(0)
    p = {n: jnp.asarray(rng.normal(size=s.shape)) for n, s in declaration.specs.items()}
    call = jax.jit(
        lambda given: objective.outputs(declaration.merge(p), given, jax.random.key(0))[0]
    )
    return call, declaration.merge(p)


def batch(seed: int = 1) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return Batch(
        inputs={
            "image": {"pixels": jnp.asarray(rng.integers(0, 256, (ROWS, 4, 4, 3)), jnp.uint8)},
            "text": {
                "ids": jnp.asarray(rng.integers(0, 9, (ROWS, 5))),
                "valid": jnp.asarray(np.arange(5) < rng.integers(1, 6, (ROWS, 1))),
            },
        },
        fields={"label": jnp.asarray(rng.integers(0, CLASSES, ROWS))},
        valid=jnp.array([True, True, False, True]),
    )


def test_zorros_unimodal_outputs_are_the_same_to_the_bit_whatever_the_other_modality_holds() -> (
    None
):
    call, _ = built(ZORRO, PLAIN)
    one, other = batch(1).inputs, batch(2).inputs
    before, after = call(one), call({**one, "image": other["image"]})
    np.testing.assert_array_equal(before["text"], after["text"])
    assert not np.allclose(before["image"], after["image"])
    assert not np.allclose(before["fusion"], after["fusion"])
    # Nor when it is missing: no valid token of it, or no token at all.
    missing = {**one, "text": {**one["text"], "valid": jnp.zeros((ROWS, 5), bool)}}
    np.testing.assert_array_equal(before["image"], call(missing)["image"])
    alone = call({"image": one["image"]})
    np.testing.assert_allclose(before["image"], alone["image"], rtol=1e-11)
    assert set(alone) == {"image", "fusion"}


def test_under_full_fusion_they_are_not() -> None:
    call, _ = built(FULL, PLAIN)
    one, other = batch(1).inputs, batch(2).inputs
    before, after = call(one), call({**one, "image": other["image"]})
    assert not np.allclose(before["text"], after["text"])


@pytest.mark.parametrize(
    ("objective", "block"),
    [
        (ZORRO, PLAIN), (MBT, BOTTLENECK), (replace(ZORRO, smoothing=0.2), PLAIN),
        (RELEASED, BOTTLENECK), (replace(RELEASED, smoothing=0.3), BOTTLENECK),
    ],
)  # fmt: skip
def test_the_loss_is_that_of_what_is_read(objective: Fusion, block: dict[str, Any]) -> None:
    call, model = built(objective, block)
    b = batch()
    logits = {name: np.asarray(x) for name, x in call(b.inputs).items()}
    label = np.asarray(b.fields["label"])
    rows = [0, 1, 3]

    def entropy(x: np.ndarray) -> float:
        s = objective.smoothing
        told = [(1 - s) * x[r, label[r]] + s * x[r].mean() for r in rows]
        return float(np.mean([np.log(np.exp(x[r]).sum()) for r in rows]) - np.mean(told))

    if objective.readout == "each":
        assert set(logits) == {"image", "text", "fusion"}
        expected = np.mean([entropy(x) for x in logits.values()])
    else:
        assert set(logits) == {"image", "text"}
        both = (logits["image"] + logits["text"]) / 2
        apart = (entropy(logits["image"]) + entropy(logits["text"])) / 2
        assert abs(entropy(both) - apart) > 1e-3  # so that one taken for the other shows
        expected = entropy(both) if objective.loss == "mean_logits" else apart
        np.testing.assert_allclose(objective.predict(model, b.inputs), both, rtol=1e-10)
    loss = objective(model, b, jax.random.key(0))
    np.testing.assert_allclose(loss.value, expected, rtol=1e-10)


def test_one_modality_is_classified_by_its_own_output_and_several_by_fusion() -> None:
    call, model = built(ZORRO, PLAIN)
    inputs = batch().inputs
    outputs = call(inputs)
    np.testing.assert_allclose(ZORRO.predict(model, inputs), outputs["fusion"], rtol=1e-10)
    alone = ZORRO.predict(model, {"text": inputs["text"]})
    np.testing.assert_allclose(alone, outputs["text"], rtol=1e-10)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mask": "zoro"}, "mask is 'zoro'.*'zorro'"),
        ({"readout": "all"}, "readout is 'all'"),
        ({"tokens": 0}, "tokens is 0"),
        ({"modalities": ()}, "modalities is empty"),
        ({"modalities": ("image", "fusion")}, "the name 'fusion' is that of its own tokens"),
        ({"classes": 1}, "classes is 1"),
    ],
)
def test_settings_that_say_nothing(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        replace(ZORRO, **change)


def test_a_shared_classifier_is_one() -> None:
    """It reads every modality; otherwise there is a classifier for each."""
    for objective, names in ((RELEASED, {"shared"}), (MBT, {"image", "text"})):
        classifiers = objective.heads(Widths.same(WIDTH), {})["fused"].classifiers
        assert set(classifiers) == names
    call, model = built(RELEASED, BOTTLENECK)
    logits = call(batch().inputs)
    assert set(logits) == {"image", "text"}
    kernel = model.heads["head"].fused.classifiers["shared"].logits.kernel[...]
    assert kernel.shape == (WIDTH, CLASSES)


def test_a_loss_of_fusion_that_is_not_there() -> None:
    with pytest.raises(UserError, match="loss is 'eech'. Did you mean 'each'"):
        replace(MBT, loss="eech")
