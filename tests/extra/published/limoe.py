"""LIMoE: Mustafa et al. (2022)."""

from __future__ import annotations

from published.rows import PLAIN, Recipe, Row, missing, ours, same, setting

LIMOE = {
    "b16": (16, 768, 3072, 12, 12),
    "l16": (16, 1024, 4096, 16, 24),
    "h14": (14, 1280, 5120, 16, 32),
}
MEMORY, ABSTRACT, VMOE = (
    "[K] Mustafa et al. 2022",
    "[P] Mustafa et al. 2022, abstract",
    "[C] google-research/vmoe",
)


def limoe(size: str, losses: str) -> Recipe:
    patch, width, hidden, heads, count = LIMOE[size]
    first = count - 24 if size == "h14" else 0
    recalled = "From memory are batch"
    rows = same(f"{VMOE} vmoe/nn/vit_moe.py; sizes: {ABSTRACT}", {
        "model.width": width, "layers.count": count, "layers.num_heads": heads, "layers.mlp_dim": hidden,
        "layers.name": "transformer", "layers.bias": True, "layers.attention_bias": True, "layers.qk_norm": False,
        "layers.norm": "layer", "layers.eps": 1e-6, "layers.mlp": "gelu", "layers.norm_position": "pre",
        "layers.rotary": 0.0,
        "model.norm": "layer", "model.norm_eps": 1e-6, "modalities.image.patch": patch, "layers.per_modality.parts": (),
        "modalities.image.max_positions": 224 // patch, "modalities.image.positions": "table",
        "modalities.text.positions": "table", "tasks.image_text.inputs.image.size": 224, **PLAIN,
    })  # fmt: skip
    rows += [Row(r.key, r.here, r.published, r.source, "the paper is not at hand", recalled) for r in same(MEMORY, {
        "steps": 781_250, "tasks.image_text.batch": 16_384, "optimizer.learning_rate": 1e-3,
        "optimizer.warmup": 10_000, "tasks.image_text.objective.name": "contrastive",
        "tasks.image_text.objective.loss": "softmax", "tasks.image_text.objective.modalities": ("image", "text"),
        "tasks.image_text.objective.joint_forward": True,
    })]  # fmt: skip
    rows += [
        Row(
            "optimizer.algorithm.name", "adamw", "adafactor", MEMORY, "Adafactor here has no momentum",
            "The optimizer is AdamW",
        ),
        Row("optimizer.decay", "cosine", "rsqrt", MEMORY, "not implemented", "with a cosine decay"),
    ]  # fmt: skip
    rows += ours("goes with AdamW", "The optimizer is AdamW", {
        "optimizer.algorithm.b1": 0.9, "optimizer.algorithm.b2": 0.999, "optimizer.algorithm.eps": 1e-8,
        "optimizer.end_lr_ratio": 0.0, "optimizer.weight_decay": 0.01, "optimizer.clip": 1.0,
    })  # fmt: skip
    rows += ours("unknown here", "the crop and the 16 tokens of a text are ours", {
        "tasks.image_text.inputs.image.crop": 0.7, "tasks.image_text.inputs.text.length": 16,
        "modalities.text.max_positions": 16, "modalities.text.vocabulary": 32_000, "dtype.compute": "bfloat16",
        "tasks.image_text.objective.embed_dim": width, "tasks.image_text.objective.init_temperature": 0.1,
    })  # fmt: skip
    rows += limoe_experts(losses, tuple(range(first + 1, count, 2)))
    rows += missing(
        MEMORY,
        "zero-shot classification of ImageNet with prompts",
        "10-shot accuracy",
        "retrieval on COCO",
    )
    name = setting(f"limoe:{size}", "" if losses == "entropies" else losses)
    return Recipe(name, ("limoe",), tuple(rows))


def limoe_experts(losses: str, sparse: tuple[int, ...]) -> list[Row]:
    if losses == "dense":
        return same(MEMORY, {"layers.experts": ()})
    recalled, weights = "From memory are batch", "The weights of all losses"
    entropies = losses == "entropies"
    rows = [Row(r.key, r.here, r.published, r.source, "the paper is not at hand", recalled) for r in same(MEMORY, {
        "layers.experts": sparse, "layers.experts.count": 32, "layers.experts.router.name": "token_choice",
        "layers.experts.router.top_k": 1, "layers.experts.router.capacity": 1.05,
        "layers.experts.router.batch_priority": True,
        "layers.experts.router.noise": 1.0, "layers.experts.group_size": 2048,
        # log 9 and log 20
        "layers.experts.entropy_floor": {"text": 2.197, "image": 2.996} if entropies else {},
    })]  # fmt: skip
    rows += ours(
        "no group spans two devices", "At least 256 groups", {"layers.experts.min_groups": 256}
    )
    return rows + ours("weights are unknown here", weights, {
        "layers.experts.losses": {} if losses == "none" else {"importance": 0.01, "load": 0.01, "z": 0.001},
        "layers.experts.local_entropy": {"text": 0.01} if entropies else {},
        "layers.experts.global_entropy": {"text": 0.01, "image": 0.01} if entropies else {},
    })  # fmt: skip
