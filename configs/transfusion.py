"""Transfusion (Zhou et al. 2024): text by its next token, images by diffusion, in one sequence.

    mmjax build emoji
    mmjax train --config=transfusion:7b --workdir=runs/transfusion-7b
    mmjax train --config=transfusion:small --workdir=runs/transfusion-small

Settings: `7b` is of the paper's size, `small` the same recipe with smaller numbers; each also with `-alternating`.

The trunk is Llama's of 7 billion, with rotary embeddings and no others; sequences have 4,096 positions, here 14
captioned images that do not see each other and whose captions share 512 (36 for a caption; with captions of 25 tokens 4
% are padding); 4 million tokens to a batch, for 500,000 steps (2 trillion), at 3e-4 falling to 1.5e-5. Images are 256
pixels a side and become 256 tokens through U-Net adapters; of each five captions four come before the image and one
after it, whose noise is then limited to half of the time. `7b-alternating` alternates two tasks on the same trunk, text
by its next token and images drawn from texts, with neither loss in the other's step; sequences of captions alone hold
128 in 3,456. MonoFormer (Zhao et al. 2024) shares a trunk in this way too, and is another model: 1.1 billion started
from TinyLlama, latents of an autoencoder, text loss 0.01, both kinds of example in one batch 9:1, a token for the time,
learned variance, 1e-4.

What differs, or is ours:

- Images are pixels in patches of 16; theirs are latents of an autoencoder, 32 a side with patches of 2.
- Time is continuous, and images are drawn by DDIM in 250 steps; theirs has 1,000 steps, drawn by ancestral sampling.
- A text has up to 255 tokens and its image follows or precedes it in a fixed place; theirs opens and closes images by
  tokens of their own (BOI, EOI), by which the model itself changes from writing to drawing.
- Missing: text alone, which is half of their data.

Data are the drawings and names that the data sets here hold. For your own, set `tasks.*.source` and
`tasks.*.evaluators.*.source` (records with `image`, an encoded picture, and `caption`), and `modalities.text.tokenizer`
with its number of pieces in `modalities.text.vocabulary`.

Hardware: 256 chips of TPU v5p, by the plan in `plans/`; results: none, the paper's size has not been trained here.
`small`: a CPU with 2 cores, 500 steps of 23 GFLOP, 5 minutes in all, measured beside other work. Results (one seed, of
an earlier version with learned positions), on drawings never seen: 0.098 of the noise's variance, 2.87 nats for a piece
of text and 2.92 where it follows its picture (knowing nothing: 1, 7.62 and 5.1); on concepts never seen 0.097, and text
no better than its frequencies (5.5 nats). What it draws are blobs of colour on white yet, and no caption is right.
"""

from dataclasses import dataclass
from typing import Any, Literal

from ml_collections import ConfigDict


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A size of Transfusion and its tasks.

    Attributes:
      size: size of the model; `small` has smaller pictures and shorter texts too.
      tasks: both losses in one task, or two tasks that alternate.
    """

    size: Literal["7b", "small"]
    tasks: Literal["transfusion", "alternating"] = "transfusion"


# Sequences of 4,096 positions, 14 images of 256 and 512 for their captions; or of 3,456, 128 captions of 27.
CAPTIONED = {"pack": 14, "capacity": {"text": 512}, "window": 56}
CAPTIONS = {"pack": 128, "capacity": {"text": 3456}, "window": 1024}
SEQUENCES = 1024  # of a batch


def data(split: str) -> dict[str, Any]:
    return {"name": "tfds", "dataset": "emoji", "split": split}


def layers(repeat: int, heads: int, hidden: int, **more: Any) -> list[dict[str, Any]]:
    """Return Llama's block, with `more` of its settings."""
    block = {
        "name": "transformer", "num_heads": heads, "mlp_dim": hidden, "norm": "rms", "mlp": "swiglu",
        "rotary": 10_000.0, "eps": 1e-5, **more,
    }  # fmt: skip
    return [{"repeat": repeat, "blocks": [block]}]


def task(share: int, modalities: list[str], objective: dict[str, Any]) -> dict[str, Any]:
    inputs = {"text": {"field": "caption", "length": 255}, "image": {"size": 256, "crop": 0.7}}
    splits = {"drawings": data("test_drawing"), "concepts": data("test_concept")}
    evaluators = {n: {"name": "held_out_loss", "source": s} for n, s in splits.items()}
    if objective.get("reverse_prob"):
        evaluators |= {f"written_{n}": {"name": "captions", "source": s} for n, s in splits.items()}
    return {
        "source": data("train"),
        "inputs": {name: inputs[name] for name in modalities},
        "objective": {"name": "transfusion", "modalities": modalities, **objective},
        "batch": SEQUENCES * objective["pack"],
        "weight": share,
        "evaluators": evaluators,
    }


def recipe(tasks: str = "transfusion") -> ConfigDict:
    """Return the config at the paper's size, with the tasks of a setting."""
    draw = {
        "weight": 5.0,
        "prediction": "epsilon",
        "condition_dropout": 0.1,
        "unet_channels": 128,
        "guidance": 5.0,
    }
    draw["sampling_steps"] = 250

    config = ConfigDict(sort_keys=False)
    config.steps = 500_000
    config.seed = 0
    config.modalities = {
        # Rotary embeddings alone encode where a token is. No tokenizer: give Llama 2's, of 32,000 pieces.
        "text": {"name": "text", "tokenizer": "", "vocabulary": 32_000, "positions": "none"},
        "image": {"name": "image", "patch": 16, "positions": "none"},
    }
    config.model = {
        "width": 4096,
        "layers": layers(32, 32, 11_008),
        "norm": "rms",
        "norm_eps": 1e-5,
        "remat": "full",
    }
    config.tasks = {
        "captions": task(
            1, ["text", "image"], {**CAPTIONED, **draw, "reverse_prob": 0.2, "max_time": 0.5}
        ),
    }
    if tasks == "alternating":
        # What is written and what is drawn are two tasks: one's loss is not in the other's step.
        config.tasks = {
            "write": task(1, ["text"], CAPTIONS),
            "draw": task(1, ["text", "image"], {**CAPTIONED, **draw, "weights": {"text": 0.0}}),
        }
    config.optimizer = {
        "algorithm": {"name": "adamw", "b1": 0.9, "b2": 0.95, "eps": 1e-8},
        "learning_rate": 3e-4, "warmup": 4000, "decay": "cosine", "end_lr_ratio": 0.05,
        "weight_decay": 0.1, "clip": 1.0,
    }  # fmt: skip
    config.dtype = {"compute": "bfloat16"}
    config.mesh = {"data": 1, "fsdp": -1}
    config.checkpoint = {"every": 5_000, "keep": 2}
    config.evaluation = {"every": 0, "batch": 2048}
    return config


def get_config(setting: Setting) -> ConfigDict:
    """Return the config of a setting."""
    config = recipe(setting.tasks)
    if setting.size == "7b":
        return config
    make_small(config)
    config.model.layers = layers(4, 4, 344)
    for task in config.tasks.values():
        if "image" in task.inputs:
            task.objective.unet_channels = 16
            task.batch = 32
        else:
            task.objective.update({"pack": 16, "capacity": {"text": 85}, "window": 128})
            task.batch = 128
    return config


def make_small(config: ConfigDict) -> ConfigDict:
    """Set the numbers of `small` but for its layers, of any recipe of these tasks."""
    config.steps = 500
    config.modalities.text.update({"tokenizer": "emoji/1.0.0/tokenizer.model", "vocabulary": 2048})
    if "image" in config.modalities:
        config.modalities.image.patch = 4
    config.model.update({"width": 128, "remat": "none"})
    for task in config.tasks.values():
        task.batch = 64
        task.inputs.text.length = 12
        # A caption has 4.1 tokens on average, that of its end among them, and one more before it.
        task.objective.update({"pack": 4, "capacity": {"text": 24}, "window": 32})
        if "image" in task.inputs:
            task.inputs.image.size = 32
            task.objective.sampling_steps = 50
    config.optimizer.update({"learning_rate": 2e-3, "warmup": 50})
    config.dtype.compute = "float32"
    config.checkpoint.every = 250
    config.evaluation.batch = 256
    return config
