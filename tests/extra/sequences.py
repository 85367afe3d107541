"""Parts that the tests of interleaved sequences share: modalities, a batch, and a small model of an objective."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.core.batch import Batch
from mmjax.core.parameters import Declaration
from mmjax.generation.spans import Span
from mmjax.modalities.base import Input
from mmjax.modalities.colours import Colours
from mmjax.modalities.image import Image, ImageInput
from mmjax.modalities.spectrogram import Spectrogram, SpectrogramInput
from mmjax.modalities.text import Text, TextInput
from mmjax.modalities.video import Video, VideoInput
from mmjax.model import ModelConfig, declare_model
from mmjax.nn.towers import Widths
from mmjax.nn.trunk import GroupConfig
from mmjax.objectives.transfusion import Draws, Transfusion

ROWS, SIZE, LENGTH, WIDTH, VOCABULARY = 4, 4, 5, 8, 11
VALID = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]], bool)
BLOCK = {"name": "transformer", "num_heads": 2, "mlp_dim": 8}
UNTIED = {**BLOCK, "per_modality": {"parts": ["query", "mlp"], "modalities": ["text", "image"]}}
MODALITIES = {
    "image": Image(patch=2, max_positions=2),
    "text": Text(vocabulary=VOCABULARY, max_positions=8),
    "colours": Colours(levels=2, max_positions=4),
    "video": Video(tube=1, patch=2, max_positions=2, max_time_positions=2),
    "sound": Spectrogram(patch_frames=2, patch_mels=2, mels=4, max_positions=2),
}
INPUTS = {
    "image": Input("image", MODALITIES["image"], ImageInput(size=SIZE)),
    "text": Input("text", MODALITIES["text"], TextInput(length=LENGTH)),
    "colours": Input("colours", MODALITIES["colours"], ImageInput(size=2)),
    "video": Input("video", MODALITIES["video"], VideoInput(size=SIZE, frames=2)),
    "sound": Input("sound", MODALITIES["sound"], SpectrogramInput(frames=4)),
}
TOKENS = {"text": LENGTH + 1, "image": 4, "colours": 5, "sound": 4}
TEXT_FIRST = Transfusion(head="head")
IMAGE_FIRST = replace(TEXT_FIRST, modalities=("image", "text"))
MIXED = replace(TEXT_FIRST, reverse_prob=0.5)
CHAMELEON = replace(TEXT_FIRST, modalities=("text", "colours"), discrete=("text", "colours"))
UNIDIFFUSER = replace(
    TEXT_FIRST, modalities=("image", "sound"), discrete=(), bidirectional_spans=True
)


def built(objective: Transfusion, *blocks: Any) -> tuple[Declaration, dict[str, Any]]:
    """Return the model's declaration, and random parameters."""
    modalities = {m: MODALITIES[m] for m in objective.modalities}
    config = ModelConfig(WIDTH, (GroupConfig(2, blocks or (BLOCK,)),))
    heads = objective.heads(Widths.same(WIDTH), {m: INPUTS[m] for m in objective.modalities})
    declaration = declare_model(config, modalities, [("head", heads)])
    rng = np.random.default_rng(0)
    return declaration, {
        n: jnp.asarray(rng.normal(size=s.shape)) / (4 if "unet" in n else 1)
        for n, s in declaration.specs.items()
    }


def batch(rows: int = ROWS) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (rows, SIZE, SIZE, 3))
    return Batch(
        inputs={
            "image": {"pixels": jnp.asarray(pixels, jnp.uint8)},
            "text": {
                "ids": jnp.asarray(rng.integers(4, VOCABULARY, (rows, LENGTH)), jnp.int32),
                "valid": jnp.asarray(VALID[:rows]),
            },
            "colours": {
                "ids": jnp.asarray(rng.integers(0, 8, (rows, 4)), jnp.int32),
                "valid": jnp.ones((rows, 4), bool),
            },
            "video": {
                "pixels": jnp.asarray(rng.integers(0, 256, (rows, 2, SIZE, SIZE, 3)), jnp.uint8)
            },
            "sound": {
                "mel": jnp.asarray(rng.normal(size=(rows, 4, 4)), jnp.float32),
                "valid": jnp.array([[True, True], [True, False], [True, True], [True, True]])[:rows],
            },
        },
        fields={},
        valid=jnp.array([True, True, False, True])[:rows],
    )  # fmt: skip


def draws(
    objective: Transfusion, swapped: Any = False, keep: Any = True, time: float = 0.3
) -> Draws:
    times = {m: jnp.full(ROWS, time) for m in objective.continuous}
    return Draws(
        times,
        {},
        jnp.broadcast_to(jnp.asarray(keep), ROWS),
        jnp.broadcast_to(jnp.asarray(swapped), ROWS),
    )


def noised(objective: Transfusion, model: Any) -> dict[str, jax.Array]:
    inputs = batch().inputs
    return {m: 0.5 * model.stems[m].values(inputs[m], jnp.float64) for m in objective.continuous}


def plan(objective: Transfusion, made: str) -> list[Span]:
    inputs = batch().inputs
    return [Span(m, inputs[m], generated=m == made) for m in objective.modalities]
