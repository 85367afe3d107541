"""A training step of a ViT classifier against a plain one in Flax and against timm's in PyTorch.

PyTorch's is skipped if timm is not installed. The same: pictures (uint8) and labels, patches of 16, layers, width,
heads, MLP, no biases but those of patches, last norm and classes, GELU in its tanh form, mean of the tokens, 1,000
classes, AdamW on all parameters without clipping, float32. Asserted before anything is timed: with the same parameters
all give the same loss, and nearly after a step.

Ours is the library's own step: it takes a batch from the host, keeps two steps in flight, looks at the health of the
gradient and reports metrics. The config is not read but for its seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np

from benchmarks import _vit_flax
from benchmarks._pairs import Effort, Quantity, millis, ratios, rounds
from benchmarks._steps import Steps, random_batch
from mmjax.core.config import Block
from mmjax.core.parameters import Arrays
from mmjax.engine.loader import HostBatch
from mmjax.nn.positions import grid

# width, layers, heads
SIZES = {"Ti": (192, 12, 3), "S": (384, 12, 6)}
SHAPES = (("Ti", 64, 64), ("Ti", 224, 16), ("S", 64, 32), ("S", 224, 16))  # size, pixels, batch
PATCH, CLASSES, RATE = 16, 1000, 1e-3
TASK = "images"
OURS, FLAX, TORCH = "ours", "Flax", "PyTorch"


def measure(effort: Effort) -> list[Quantity]:
    """Return ratios, ours to each peer."""
    seed = effort.block.get("seed", 0)
    result = []
    for size, pixels, batch in SHAPES:
        what = f"ViT-{size}/{PATCH}, {pixels} px, batch {batch}"
        steps = Steps(block(size, pixels, batch, seed))
        rows = random_batch(steps.experiment, TASK, seed)
        calls = {OURS: _ours(steps, rows), **peers(steps, size, pixels, rows)}
        assert_equal({name: [call() for _ in range(2)] for name, call in calls.items()})
        times = rounds(calls, effort.pairs, effort.steps)
        wanted = {FLAX: "at most 1.03", TORCH: "below 1"}
        result += [
            ratios(times, OURS, name, wanted[name], f"{what}: {OURS} to {name}")
            for name in calls
            if name != OURS
        ]
        result += millis(times, f"{what}: ")
    return result


def assert_equal(losses: Mapping[str, list[float]]) -> None:
    """Compare the loss of all with the same parameters, and after a step of training.

    That step moves our positions otherwise: they are sums of a row's and a column's, normalised, where the peers have
    a table.
    """
    for name, values in losses.items():
        for value, ours, close in zip(values, losses[OURS], (1e-4, 0.03), strict=True):
            np.testing.assert_allclose(value, ours, rtol=close, err_msg=name)
        assert values[1] < 0.9 * values[0], f"{name} does not learn: {values}"


def block(size: str, pixels: int, batch: int, seed: int) -> Block:
    width, layers, heads = SIZES[size]
    layer = {"name": "transformer", "num_heads": heads, "mlp_dim": 4 * width}
    task = {
        "source": {"name": "tfds", "dataset": "emoji", "split": "train"},
        "inputs": {"image": {"size": pixels}},
        "objective": {
            "name": "classification", "classes": CLASSES, "label": "subgroup", "init": "lecun",
        },
        "batch": batch,
    }  # fmt: skip
    return {
        "steps": 1_000_000,  # the rate stays as it is, or nearly
        "seed": seed,
        "modalities": {"image": {"name": "image", "patch": PATCH, "max_positions": pixels // PATCH}},
        "model": {"width": width, "layers": [{"repeat": layers, "blocks": [layer]}]},
        "tasks": {TASK: task},
        "optimizer": {
            "algorithm": {"name": "adamw"}, "learning_rate": RATE, "clip": 0.0, "decay": "constant",
            "weight_decay": 0.0,
        },
        "evaluation": {"every": 0},
    }  # fmt: skip


def _ours(steps: Steps, batch: HostBatch) -> Callable[[], float]:
    def step() -> float:
        return float(steps.run([(TASK, batch)], untimed=0).metrics["loss"])

    return step


def peers(steps: Steps, size: str, pixels: int, batch: HostBatch) -> dict[str, Callable[[], float]]:
    """Return steps of the others, which begin with our parameters."""
    width, layers, heads = SIZES[size]
    sizes = {
        "width": width,
        "layers": layers,
        "num_heads": heads,
        "mlp_dim": 4 * width,
        "patch": PATCH,
    }
    ours = by_layer(steps.parameters, layers, pixels // PATCH)
    given = batch.rows.inputs["image"]["pixels"], batch.rows.fields["subgroup"]
    model = _vit_flax.ViT(**sizes, classes=CLASSES)
    flax = _vit_flax.training(model, _vit_flax.parameters(ours, sizes, pixels // PATCH), RATE)
    result = {FLAX: lambda: flax(*given)}
    if find_spec("timm") is not None:
        from benchmarks import _vit_timm

        torch = _vit_timm.training(ours, sizes, pixels, CLASSES, RATE)
        result[TORCH] = lambda: torch(*given)
    return result


def by_layer(parameters: Arrays, layers: int, side: int, task: str = TASK) -> dict[str, Any]:
    """Return our parameters in the words of the peers: layers apart, positions as one table."""
    p = {name: np.asarray(value) for name, value in parameters.items()}
    position = "stems/image/positions"
    places = grid(y=side, x=side)
    total = sum(
        p[f"{position}/tables/{axis}"][(np.asarray(places[axis][0]) * side + 1e-3).astype(int)]
        for axis in ("y", "x")
    )
    centred = total - total.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)
    inner = {
        "attention_norm": "attention_norm/scale", "query": "attention/query", "key": "attention/key",
        "value": "attention/value", "out": "attention/out", "mlp_norm": "mlp_norm/scale", "up": "mlp/up/kernel",
        "down": "mlp/down/kernel",
    }  # fmt: skip
    return {
        "stem": p["stems/image/embed/kernel"],
        "stem_bias": p["stems/image/embed/bias"],
        "positions": scaled * p[f"{position}/norm/scale"] + p[f"{position}/norm/bias"],
        "layers": [
            {name: p[f"trunk/groups/0/blocks/0/{path}"][index] for name, path in inner.items()}
            for index in range(layers)
        ],
        "norm_scale": p["trunk/norm/scale"],
        "norm_bias": p["trunk/norm/bias"],
        "classes": p[f"heads/{task}/classifier/logits/kernel"],
        "classes_bias": p[f"heads/{task}/classifier/logits/bias"],
    }
