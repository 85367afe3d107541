"""CLIP's, SigLIP's and LiT's recipes: sizes as published, small from large, and each through training on real data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import toyrun
from etils import epath
from recipes import abstract, block, experiment, without_sizes

import mmjax
from mmjax import train
from mmjax.core import config as configs

LARGE = {"clip": "clip:l14", "siglip": "siglip:so400m", "lit": "lit:b16"}


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        # open_clip's models of these names, by `sum(p.numel() for p in model.parameters())`.
        ("clip:b32", 151.277313), ("clip:b16", 149.620737), ("clip:l14", 427.616513),
        ("siglip:b16", 203.155970), ("siglip:so400m", 877.360306),
        # A ViT-B/16, a text tower of as many layers and a table of 32,000 pieces; from memory 195.9 with BERT's table.
        ("lit:b16", 195.9),
    ],
)  # fmt: skip
def test_it_is_as_large_as_published(name: str, millions: float) -> None:
    specs = experiment(name).declaration.specs
    total = sum(math.prod(s.shape) for s in specs.values()) / 1e6
    assert total == pytest.approx(millions, rel=0.03)


@pytest.mark.parametrize("system", LARGE)
def test_the_small_recipe_differs_in_sizes_only(system: str) -> None:
    one, two = (without_sizes(block(name)) for name in (LARGE[system], f"{system}:small"))
    for made in (one, two):
        del made["mesh"]
    assert one == two


@pytest.mark.parametrize("system", LARGE)
def test_the_large_recipe_is_traced_whole(system: str) -> None:
    """Loss and gradient on the whole batch: shapes only."""
    made = experiment(LARGE[system])
    task = made.tasks["image_text"]
    parameters, batch = abstract(made, "image_text")

    def value(p: Any, batch: Any) -> Any:
        return task.loss(made.declaration.merge(p, "bfloat16"), batch, jax.random.key(0)).value

    gradient = jax.eval_shape(jax.grad(value), parameters, batch)
    assert {n: g.shape for n, g in gradient.items()} == {n: p.shape for n, p in parameters.items()}


@pytest.mark.parametrize("system", LARGE)
def test_it_trains_on_real_data(tmp_path: Path, system: str, emoji_dir: epath.Path) -> None:
    """Two steps with evaluation. The second moves both towers, but for LiT's of pictures, which keeps its bits."""
    made = configs.override(
        block(f"{system}:small"),
        (
            "steps=2", "checkpoint.every=1", "log.report=False", "optimizer.warmup=0", "tasks.image_text.batch=8",
            "tasks.image_text.objective.embed_dim=32", "model.towers.image.width=32", "model.towers.text.width=32",
        ),
    )  # fmt: skip
    records = train.train(made, epath.Path(tmp_path), False, jax.devices()[:1])
    assert records
    before, after = (toyrun.parameters_of(tmp_path, step) for step in (1, 2))
    same = {
        name.split("/")[0] if not name.startswith("stems") else "/".join(name.split("/")[:2])
        for name, value in after.items()
        if np.array_equal(value, before[name]) and value.any()
    }
    frozen = {"image", "stems/image"} if system == "lit" else set()
    assert {"image", "stems/image"} & same == frozen
    moved = {name.split("/")[0] for name, value in after.items() if np.any(value != before[name])}
    assert moved == {"image", "text", "stems", "heads"} - (frozen & {"image"})
    if system == "clip":
        picture = np.zeros((32, 32, 3), np.uint8)
        vectors = mmjax.load(str(tmp_path)).embed(image=[picture])
        assert vectors.shape == (1, 32) and np.linalg.norm(vectors) == pytest.approx(1, abs=1e-5)
