"""CLIP, SigLIP and LiT: sizes as in open_clip's model configs, the rest from memory."""

from __future__ import annotations

from typing import Any

from mmjax.optim.rules import RuleConfig
from published.rows import PLAIN, Recipe, Row, missing, ours, same

CODE = "[C] open_clip/src/open_clip/model_configs"
CLIP, SIGLIP, LIT = (
    f"[K] {paper}" for paper in ("Radford et al. 2021", "Zhai et al. 2023", "Zhai et al. 2022")
)
OBJECTIVE = "tasks.image_text.objective."
# Patch; width, heads, layers of the pictures' tower and of the texts'; joint space; rate.
CLIPS: dict[str, Any] = {
    "b32": (32, (768, 12, 12), (512, 8, 12), 512, 5e-4),
    "b16": (16, (768, 12, 12), (512, 8, 12), 512, 5e-4),
    "l14": (14, (1024, 16, 24), (768, 12, 12), 768, 4e-4),
}
# Patch; width, MLP, heads, layers; tokens of a text.
SIGLIPS = {"b16": (16, 768, 3072, 12, 12, 64), "so400m": (14, 1152, 4304, 16, 27, 16)}


def tower(
    source: str, name: str, width: int, hidden: int, heads: int, count: int, **keys: Any
) -> list[Row]:
    """Return rows of a tower of a ViT's layers; `keys` are those that differ from a plain one."""
    plain = {
        "first_norm": False, "causal": False, "norm": "layer", "norm_eps": 1e-6, "layers.eps": 1e-6,
        "layers.mlp": "gelu", "layers.bias": True, "layers.attention_bias": True, "layers.qk_norm": False,
        "layers.norm": "layer", "layers.norm_position": "pre", "layers.rotary": 0.0, "layers.experts": (),
        "layers.name": "transformer", "reads": (), "context": "",
    }  # fmt: skip
    sizes = {
        "width": width, "layers.mlp_dim": hidden, "layers.num_heads": heads, "layers.count": count,
    }  # fmt: skip
    return same(source, {**plain, **sizes, **keys}, f"model.towers.{name}.")


def data(source: str, patch: int, words: int, length: int, has_class_token: bool) -> list[Row]:
    return same(source, {
        "modalities.image.patch": patch, "modalities.image.max_positions": 224 // patch,
        "modalities.image.positions": "table", "modalities.image.class_token": has_class_token,
        "modalities.image.tower": "image", "modalities.text.tower": "text", "modalities.text.vocabulary": words,
        "modalities.text.max_positions": length, "modalities.text.positions": "table",
        "tasks.image_text.inputs.image.size": 224, "tasks.image_text.inputs.text.length": length,
        f"{OBJECTIVE}name": "contrastive", f"{OBJECTIVE}modalities": ("image", "text"),
        f"{OBJECTIVE}joint_forward": False, **PLAIN,
    })  # fmt: skip


def clip(size: str) -> Recipe:
    patch, image, text, joint, rate = CLIPS[size]
    keys = {"norm_eps": 1e-5, "layers.eps": 1e-5, "layers.mlp": "quick_gelu"}
    rows = data(CODE, patch, 49_408, 77, True)
    for name, (width, heads, count), own in (
        ("image", image, {"first_norm": True}),
        ("text", text, {"causal": True}),
    ):
        rows += tower(CODE, name, width, 4 * width, heads, count, **keys, **own)
    rows += same(CLIP, {
        "steps": 390_625, "tasks.image_text.batch": 32_768, "optimizer.learning_rate": rate,
        "optimizer.warmup": 2_000, "optimizer.decay": "cosine", "optimizer.end_lr_ratio": 0.0,
        "optimizer.weight_decay": 0.2, "optimizer.algorithm.name": "adamw", "optimizer.algorithm.b1": 0.9,
        "optimizer.algorithm.b2": 0.98, "optimizer.algorithm.eps": 1e-6,
        f"{OBJECTIVE}embed_dim": joint, f"{OBJECTIVE}init_temperature": 0.07, f"{OBJECTIVE}loss": "softmax",
        f"{OBJECTIVE}poolers": {"image": "class", "text": "last"}, f"{OBJECTIVE}projections": {},
    })  # fmt: skip
    rows += ours(
        "not at hand", "The crop of pictures is ours", {"tasks.image_text.inputs.image.crop": 0.9}
    )
    rows += ours(
        "not at hand",
        "under a compute dtype of bfloat16, and clipping of the gradient",
        {"dtype.compute": "bfloat16", "optimizer.clip": 1.0},
    )
    rows += missing(
        CLIP, "the last epoch of L/14 at 336 pixels", "zero-shot classification of ImageNet"
    )
    return Recipe(f"clip:{size}", ("clip",), tuple(rows))


def adafactor(source: str, words: str = "The optimizer is AdamW") -> list[Row]:
    why = "Adafactor here has no momentum"
    return [Row("optimizer.algorithm.name", "adamw", "adafactor", source, why, words)]


def siglip(size: str) -> Recipe:
    patch, width, hidden, heads, count, length = SIGLIPS[size]
    rows = data(CODE, patch, 32_000, length, False)
    for name in ("image", "text"):
        rows += tower(CODE, name, width, hidden, heads, count)
    rows += same(CODE, {
        f"{OBJECTIVE}embed_dim": width, f"{OBJECTIVE}init_temperature": 0.1, f"{OBJECTIVE}bias": -10.0,
        f"{OBJECTIVE}loss": "sigmoid", f"{OBJECTIVE}poolers": {"image": "map", "text": "last"},
        f"{OBJECTIVE}map_heads": heads, f"{OBJECTIVE}map_mlp": hidden,
        f"{OBJECTIVE}projections": {"image": "none", "text": "affine"},
    })  # fmt: skip
    rows += same(SIGLIP, {
        "tasks.image_text.batch": 32_768, "optimizer.learning_rate": 1e-3, "optimizer.weight_decay": 1e-4,
        "optimizer.algorithm.b2": 0.95, "optimizer.clip": 1.0, "optimizer.decay": "cosine",
        "optimizer.end_lr_ratio": 0.0,
    })  # fmt: skip
    rows += adafactor(SIGLIP)
    rows += ours("not at hand", "Warm-up, steps and the crop are ours", {
        "steps": 274_658, "optimizer.warmup": 20_000, "tasks.image_text.inputs.image.crop": 0.7,
    })  # fmt: skip
    rows += ours("AdamW's", "The optimizer is AdamW", {
        "optimizer.algorithm.b1": 0.9, "optimizer.algorithm.eps": 1e-8, "dtype.compute": "bfloat16",
    })  # fmt: skip
    rows += missing(SIGLIP, "training on WebLI", "zero-shot classification of ImageNet")
    return Recipe(f"siglip:{size}", ("siglip",), tuple(rows))


def lit() -> Recipe:
    rows = data(LIT, 16, 32_000, 16, True)
    for name in ("image", "text"):
        rows += tower(LIT, name, 768, 3072, 12, 12)
    frozen = (RuleConfig("(image|stems/image)/.*", freeze=True),)
    rows += same(LIT, {
        "steps": 55_000, "tasks.image_text.batch": 16_384, "optimizer.learning_rate": 1e-3,
        "optimizer.warmup": 10_000, "optimizer.decay": "cosine", "optimizer.end_lr_ratio": 0.0,
        "optimizer.weight_decay": 1e-4, "optimizer.clip": 1.0, "optimizer.rules": frozen,
        f"{OBJECTIVE}embed_dim": 768, f"{OBJECTIVE}init_temperature": 0.1, f"{OBJECTIVE}loss": "softmax",
        f"{OBJECTIVE}poolers": {"image": "class", "text": "last"},
        f"{OBJECTIVE}projections": {"image": "none", "text": "affine"},
    })  # fmt: skip
    rows += adafactor(LIT)
    rows += ours("AdamW's", "The optimizer is AdamW", {
        "optimizer.algorithm.b1": 0.9, "optimizer.algorithm.b2": 0.999, "optimizer.algorithm.eps": 1e-8,
        "dtype.compute": "bfloat16",
    })  # fmt: skip
    rows += ours("not at hand", "The crop is ours", {"tasks.image_text.inputs.image.crop": 0.7})
    rows += missing(
        LIT, "weights learned from ImageNet-21k", "zero-shot classification of ImageNet"
    )
    return Recipe("lit:b16", ("lit",), tuple(rows))
