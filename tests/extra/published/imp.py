"""IMP: Akbari et al. (2023), and its release."""

from __future__ import annotations

from published.rows import ADAMW, Recipe, Row, missing, ours, same, setting

RELEASE = "google-research/imp/max"
EXPERIMENT, DATA = (
    f"[C] {RELEASE}/projects/imp/config/experiment.py",
    f"[C] {RELEASE}/projects/imp/config/data.py",
)
GARDEN, SETS = f"[C] {RELEASE}/modeling/garden", f"[C] {RELEASE}/data/datasets/config.py"
# Width, MLP, layers, heads; peak, part at the end, warm-up, steps; experts of the sparse model.
IMP = {
    "s": ((384, 1536, 12, 6), (8e-4, 0.0, 10_000, 200_000), 4),
    "b": ((768, 3072, 12, 12), (1e-3, 1e-3, 27_000, 500_000), 16),
    "l": ((1024, 4096, 24, 16), (5e-4, 2e-3, 55_000, 500_000), 16),
}
PRE_WARMUP = {"s": 0, "b": 2_000, "l": 5_000}
IMP_LOADERS = {  # interval, batch; modalities
    "image_text": (1, 8192, "vision text"), "images": (1, 8192, "vision"), "video_text": (12, 8192, "vision text"),
    "videos": (5, 2048, "vision"), "video_audio_text": (12, 8192, "vision spectrogram text"),
    "sounds": (8, 2048, "spectrogram"),
}  # fmt: skip
IMP_VISION = {  # frames, stride, size, drop, flip
    "image_text": (1, 1, 256, 0.0, True), "images": (1, 1, 256, 0.0, True),
    "video_text": (16, 2, 256, 0.75, False), "videos": (4, 2, 256, 0.0, True),
    "video_audio_text": (16, 2, 256, 0.75, False),
}  # fmt: skip


def imp(size: str, sparse: bool, mixed: bool) -> Recipe:
    (width, hidden, count, heads), (peak, final, warmup, steps), experts = IMP[size]
    optimization = f"{EXPERIMENT} {dict(s='Small', b='Base', l='Large')[size]}PreTrainOptimization"
    rows = same(optimization, {
        **ADAMW, "steps": steps, "optimizer.learning_rate": peak, "optimizer.decay": "cosine",
        "optimizer.end_lr_ratio": final,
        "optimizer.algorithm.b1": 0.9, "optimizer.algorithm.b2": 0.999, "optimizer.algorithm.eps": 1e-7,
        "optimizer.weight_decay": 1e-4, "optimizer.clip": 1.0, "schedule.rule": "interval",
    })  # fmt: skip
    ahead = PRE_WARMUP[size]
    rows += [
        Row(
            "optimizer.warmup",
            warmup,
            warmup - ahead,
            optimization,
            f"{ahead} steps of pre-warm-up",
            "includes the release's pre-warm-up",
        ),
        Row(
            "dtype.compute",
            "bfloat16",
            "float32",
            f"{EXPERIMENT} MODEL_DTYPE",
            "twice as fast",
            "--config.dtype.compute=float32",
        ),
    ]
    rows += same(f"{GARDEN}/config.py", {
        "model.width": width, "layers.count": count, "layers.num_heads": heads, "layers.mlp_dim": hidden,
        "layers.name": "transformer", "layers.mlp": "gelu", "layers.norm_position": "pre", "layers.bias": False,
        "layers.attention_bias": False, "layers.rotary": 0.0, "layers.norm": "layer", "layers.eps": 1e-6,
        "layers.qk_norm": sparse, "model.norm": "layer", "model.norm_eps": 1e-6, "model.per_modality.modalities": (),
        "layers.per_modality.parts": (),
    })  # fmt: skip
    rows += imp_experts(experts, count) if sparse else same(GARDEN, {"layers.experts": ()})
    rows += imp_modalities() + imp_tasks(1.0 if sparse else 0.2)
    rows += missing(
        EXPERIMENT, "the experiments `.img` and `.txt`", "the sizes M and XL to 11B, IMPeGe and SoftMoE-IMP",
        "several labels of an\n  example", "zero-shot classification with prompts, linear probes", "mean over 4 clips",
        "tasks are keyed by name", "a stem is one linear map", "every text ends with an end token",
        "padding never competes for experts", "colours are not augmented",
    )  # fmt: skip
    name = setting("imp:moe", size) if sparse else f"imp:{size}"
    return Recipe(setting(name, "mixed" if mixed else ""), ("imp",), tuple(rows))


def imp_experts(experts: int, count: int) -> list[Row]:
    rows = same(f"[C] {RELEASE}/modeling/config.py, {EXPERIMENT}", {
        "layers.experts.count": experts, "layers.experts": tuple(range(count - 6, count)),
        "layers.experts.group_size": 2048, "layers.experts.losses": {}, "layers.experts.local_entropy": {},
        "layers.experts.global_entropy": {}, "layers.experts.router.name": "expert_choice",
        "layers.experts.router.capacity": 1.0, "layers.experts.router.score": "softmax",
    })  # fmt: skip
    words = "at least 256 groups of tokens compete"
    return rows + ours("no group spans two devices", words, {"layers.experts.min_groups": 256})


def imp_modalities() -> list[Row]:
    rows = same(f"{GARDEN}/imp.py setup, {EXPERIMENT} MAX_*", {
        "vision.tube": 4, "vision.patch": 16, "vision.max_time_positions": 16, "vision.max_positions": 32,
        "spectrogram.patch_frames": 16, "spectrogram.patch_mels": 16, "spectrogram.max_positions": 64,
        "text.max_positions": 4096, "text.vocabulary": 32_100,
    }, "modalities.")  # fmt: skip
    for name in ("vision", "spectrogram", "text"):
        embeddings = f"[C] {RELEASE}/modeling/embeddings.py"
        values = {"positions": "learned", "positions_scale": 1.0}
        rows += same(embeddings, values, f"modalities.{name}.")
    return rows + same(f"{DATA} _audio_override, [C] {RELEASE}/data/config.py Spectrogram", {
        "mels": 128, "sample_rate": 16_000, "window": 2048, "hop": 1024, "low": 80.0, "high": 7600.0,
    }, "modalities.spectrogram.")  # fmt: skip


def imp_tasks(initial: float) -> list[Row]:
    rows = list[Row]()
    for task, (interval, batch, names) in IMP_LOADERS.items():
        at, modalities = f"tasks.{task}.", tuple(names.split())
        rows += same(f"{DATA} ..._PRETRAIN_LOADERS", {"interval": interval, "batch": batch}, at)
        if task in IMP_VISION:
            keys = ("frames", "stride", "size", "token_drop", "flip")
            vision = dict(zip(keys, IMP_VISION[task], strict=True))
            rows += same(
                f"{DATA} _vision_override, {SETS}", {**vision, "crop": 0.5}, f"{at}inputs.vision."
            )
        if "spectrogram" in modalities:
            rows += same(
                f"{DATA} AUDIO_NUM_SECONDS",
                {"frames": 128, "token_drop": 0.0},
                f"{at}inputs.spectrogram.",
            )
        if "text" in modalities:
            texts = {"length": 16, "instances": 5 if task == "image_text" else 0}
            rows += same(f"{SETS} max_num_sentences", texts, f"{at}inputs.text.")
            rows += same(f"[C] {RELEASE}/optimization/objectives.py CrossModalNCE, {GARDEN}/config.py", {
                "name": "cross_modal", "modalities": modalities, "weights": {}, "space": "disjoint", "embed_dim": 1024,
                "init_temperature": initial, "head": "joint", "positive_key": "",
            }, f"{at}objective.")  # fmt: skip
        else:
            rows += same(f"[C] {RELEASE}/modeling/heads.py", {
                "name": "classification", "modalities": modalities, "smoothing": 0.0, "norm": "none", "init": "lecun",
            }, f"{at}objective.")  # fmt: skip
    return [
        *rows,
        *same(f"{SETS} EXAMPLE_7", {"tasks.videos.objective.classes": 700}),
        Row(
            "tasks.images.objective.classes",
            21_843,
            1000,
            f"{SETS} EXAMPLE_3",
            "ImageNet-21k for a placeholder",
            "one label of 21,843",
        ),
        Row(
            "tasks.sounds.objective.classes",
            309,
            50,
            f"{SETS} EXAMPLE_5",
            "VGGSound for a placeholder",
            "sounds one of 309",
        ),
    ]
