"""Soft prompts: tokens that a task's tower reads before the others, and that nothing pools."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.core.errors import UserError
from mmjax.modalities.base import Input
from mmjax.modalities.image import Image, ImageInput
from mmjax.modalities.text import Text, TextInput
from mmjax.model import ModelConfig, declare_model
from mmjax.nn.masks import code
from mmjax.nn.soft_prompt import SoftPrompt
from mmjax.nn.stream import Stream
from mmjax.nn.towers import Widths
from mmjax.nn.trunk import GroupConfig
from mmjax.objectives.classification import Classification

WIDTH, PROMPT = 4, 3
BLOCK = {"name": "transformer", "num_heads": 2, "mlp_dim": 5}
CONFIG = ModelConfig(WIDTH, (GroupConfig(1, (BLOCK,)),))
MODALITIES: dict[str, Any] = {
    "image": Image(patch=2, max_positions=2),
    "text": Text(vocabulary=16, max_positions=8),
}
INPUTS = {
    "image": Input("image", MODALITIES["image"], ImageInput(size=4)),
    "text": Input("text", MODALITIES["text"], TextInput(length=3)),
}
RNG = np.random.default_rng(0)
ARRAYS = {
    "image": {"pixels": RNG.integers(0, 256, (2, 4, 4, 3)).astype(np.uint8)},
    "text": {
        "ids": RNG.integers(0, 16, (2, 3)).astype(np.int32),
        "valid": np.array([[True, True, False], [True, False, False]]),
    },
}


def model_of(objective: Classification) -> tuple[Any, dict[str, np.ndarray]]:
    heads = objective.heads(Widths.same(WIDTH), INPUTS)
    declaration = declare_model(CONFIG, MODALITIES, [("h", heads)])
    values = {n: RNG.normal(size=s.shape).astype(np.float32) for n, s in declaration.specs.items()}
    return declaration, values


@pytest.mark.parametrize("first", ["image", "text"])
def test_the_tower_reads_the_prompt_and_the_head_pools_the_others(first: str) -> None:
    """Against tokens put together by hand, of which those after the prompt are averaged."""
    modalities = (first, "text" if first == "image" else "image")
    objective = Classification(classes=3, modalities=modalities, prompt=PROMPT, head="h")
    declaration, values = model_of(objective)
    model = declaration.merge(values)
    prompt = values["heads/h/prompt/tokens"]
    assert prompt.shape == (PROMPT, WIDTH)
    streams = [model.tokens(m, ARRAYS[m]) for m in modalities]
    x = np.concatenate([np.stack([prompt, prompt]), *(s.x_BSD for s in streams)], axis=1)
    valid = np.concatenate([np.ones((2, PROMPT), bool), *(s.mask_BS() for s in streams)], axis=1)
    out = np.asarray(model.trunk(Stream(jnp.asarray(x), jnp.asarray(valid)), None)[0].x_BSD)
    logits = []
    for row, exists in zip(out, valid, strict=True):
        tokens = [token for i, token in enumerate(row) if i >= PROMPT and exists[i]]
        kernel, bias = (values[f"heads/h/classifier/logits/{n}"] for n in ("kernel", "bias"))
        logits.append(np.mean(tokens, axis=0) @ kernel + bias)
    predicted = np.asarray(objective.predict(model, ARRAYS))
    np.testing.assert_allclose(predicted, logits, rtol=1e-4, atol=1e-4)
    other = declaration.merge({**values, "heads/h/prompt/tokens": RNG.normal(size=prompt.shape)})
    assert np.abs(np.asarray(objective.predict(other, ARRAYS)) - predicted).max() > 1e-3


def test_the_prompt_has_a_gradient() -> None:
    objective = Classification(classes=3, modalities=("image",), prompt=PROMPT, head="h")
    declaration, values = model_of(objective)

    def total(p: Any) -> Any:
        return objective.predict(declaration.merge(p), ARRAYS)[:, 0].sum()

    gradient = np.asarray(jax.grad(total)(values)["heads/h/prompt/tokens"])
    assert np.all(np.abs(gradient).max(axis=1) > 1e-6)


def test_without_one_there_are_no_parameters_of_it() -> None:
    declaration, _ = model_of(Classification(classes=3, modalities=("image",), head="h"))
    assert not [name for name in declaration.specs if "prompt" in name]
    with pytest.raises(UserError, match="prompt is -1"):
        Classification(classes=3, prompt=-1)


def test_a_prompt_comes_off_where_it_was_put() -> None:
    module = SoftPrompt(PROMPT, WIDTH)
    declaration = declare_model(CONFIG, MODALITIES, [("h", {"prompt": module})])
    values = {n: RNG.normal(size=s.shape).astype(np.float32) for n, s in declaration.specs.items()}
    prompt = declaration.merge(values).heads["h"].prompt
    x = jnp.asarray(RNG.normal(size=(2, 4, WIDTH)).astype(np.float32))
    valid = jnp.array([[True] * 4, [True, False, True, False]])
    stream = Stream(x, valid, layout=(("text", 4),))
    longer = prompt.before(stream)
    assert longer.layout == (("text", 7),) and longer.x_BSD.shape == (2, 7, WIDTH)
    back = prompt.after(longer)
    assert np.array_equal(back.x_BSD, x) and np.array_equal(back.valid_BS, valid)
    assert back.layout == stream.layout
    attributes = {"modality": jnp.full((1, 4), code("text"))}
    with pytest.raises(ValueError, match="plain tokens of one modality"):
        prompt.before(replace(stream, attributes=attributes))
