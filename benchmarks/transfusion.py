"""A training step of Transfusion, text by its next token and a picture by flow, against that of transfusion-pytorch.

Nothing where the port is not installed; it wants the emoji data set, of which nothing but the row's form is used.

The same: rows, tokens of a row in the trunk (asserted), width, layers, heads, the MLP's hidden size (gated), rotary
embeddings, normalised queries and keys, size of the vocabulary, patches and their positions, flow in pictures with its
weight, the mask, AdamW on all parameters, float32. Every text token is valid. Of a row's tokens the port spends nine on
marks of its own and the picture's shape, where we have one; so eight fewer are text.

Different: the port conditions each layer on the time (adaptive norms, three matrices of width by 4 width per part and
token), attends over layers, joins later layers with earlier ones and gates heads. That is more work and more
parameters, both of which are reported; hence the ratio of seconds per FLOP of matrix products, beside that of seconds.

The config is not read but for its seed. In each pair both halves run in one process, and which comes first alternates.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from benchmarks import _transfusion_pytorch
from benchmarks._pairs import Effort, Quantity, millis, quantity, ratios, rounds
from benchmarks._steps import Steps, random_batch
from benchmarks._transfusion_pytorch import Sizes
from mmjax.core.config import Block
from mmjax.experiment import Experiment

ROWS, LENGTH, SIDE = 8, 96, 11  # rows, text tokens, patches on a side of a picture
PATCH, VOCABULARY, WEIGHT = 4, 2048, 5.0
WIDTH, LAYERS, HEADS, HIDDEN = 256, 4, 4, 682
TASK = "captions"


def measure(effort: Effort) -> list[Quantity]:
    """Return ratios, peer to ours, and what both do."""
    if not _transfusion_pytorch.is_installed():
        return []
    seed = effort.block.get("seed", 0)
    steps = Steps(block(seed))
    experiment, batch = steps.experiment, random_batch(steps.experiment, TASK, seed)
    tokens = row_tokens(experiment)
    sizes = Sizes(tokens, WIDTH, LAYERS, HEADS, HIDDEN, VOCABULARY, PATCH, WEIGHT)
    peer = _transfusion_pytorch.peer(sizes, batch.rows)
    assert peer.tokens == tokens, f"{peer.tokens} tokens in the port's trunk, {tokens} in ours"
    flops = experiment.flops[TASK], peer.flops
    specs = experiment.declaration.specs.values()
    parameters = sum(int(np.prod(spec.shape)) for spec in specs), peer.parameters
    calls = {"our step": lambda: steps.run([(TASK, batch)], untimed=0), "peer's step": peer.step}
    times = rounds(calls, effort.pairs, effort.steps)
    slower = ratios(times, "peer's step", "our step", "above 1", "peer's step to ours")
    per_flop = [ratio * flops[0] / flops[1] for ratio in slower.values]
    counts = {"tokens of a row": (tokens, peer.tokens), "parameters": parameters}
    gigas = {"GFLOP of matrix products": tuple(f / 1e9 for f in flops)}
    return [
        slower,
        quantity("peer's step to ours, per FLOP", per_flop),
        *millis(times),
        *(
            quantity(f"{what}, {whose}", [count] * effort.pairs)
            for what, both in (counts | gigas).items()
            for whose, count in zip(("ours", "peer's"), both, strict=True)
        ),
    ]


def block(seed: int) -> Block:
    """Return the config of our half."""
    layer = {
        "name": "transformer", "num_heads": HEADS, "mlp_dim": HIDDEN, "norm": "rms", "mlp": "swiglu",
        "rotary": 10_000.0, "qk_norm": True,
    }  # fmt: skip
    objective = {"name": "transfusion", "modalities": ["text", "image"], "prediction": "flow"}
    task = {
        "source": {"name": "tfds", "dataset": "emoji", "split": "train"},
        "inputs": {"text": {"length": LENGTH}, "image": {"size": SIDE * PATCH}},
        "objective": {**objective, "weight": WEIGHT, "condition_dropout": 0.0},
        "batch": ROWS,
    }
    return {
        "steps": 1,
        "seed": seed,
        "modalities": {
            "text": {
                "name": "text",
                "tokenizer": "emoji/1.0.0/tokenizer.model",
                "vocabulary": VOCABULARY,
                "max_positions": LENGTH,
            },
            "image": {"name": "image", "patch": PATCH, "max_positions": SIDE},
        },
        "model": {"width": WIDTH, "layers": [{"repeat": LAYERS, "blocks": [layer]}]},
        "tasks": {TASK: task},
        "optimizer": {"algorithm": {"name": "adamw"}, "learning_rate": 1e-3, "clip": 0.0},
        "evaluation": {"every": 0},
    }


def row_tokens(experiment: Experiment) -> int:
    """Return tokens of a row in our trunk: those of both stems, and the text's begin token."""
    shapes = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct((1, *s.shape), s.dtype),
        experiment.tasks[TASK].rows().shapes().inputs,
    )

    def streams(inputs: Any) -> list[Any]:
        model = experiment.declaration.merge(experiment.declaration.initialise(0))
        return [model.tokens(name, arrays).x_BSD for name, arrays in inputs.items()]

    made = jax.eval_shape(streams, shapes)
    return 1 + sum(x.shape[1] for x in made)
