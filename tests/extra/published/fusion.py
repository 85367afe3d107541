"""MBT: Nagrani et al. (2021), and scenic's; Zorro: Recasens et al. (2023)."""

from __future__ import annotations

from published.rows import PLAIN, Recipe, Row, missing, ours, same

SCENIC = "[C] scenic/projects/mbt"
MBT_CONFIG, MBT_MODEL = f"{SCENIC}/configs/audioset/balanced_audioset_base.py", f"{SCENIC}/model.py"
VIT = {
    "model.width": 768, "layers.count": 12, "layers.num_heads": 12, "layers.mlp_dim": 3072, "layers.bias": True,
    "layers.attention_bias": True, "layers.qk_norm": False, "layers.norm": "layer", "layers.eps": 1e-6,
    "layers.mlp": "gelu", "layers.norm_position": "pre", "layers.rotary": 0.0, "model.norm": "layer",
    "model.norm_eps": 1e-6,
    "layers.experts": (), "modalities.video.positions": "table",
    "modalities.spectrogram.positions": "table",
}  # fmt: skip


def clips() -> list[Row]:
    """Return the rows of inputs and optimizer that MBT's recipe and Zorro's have in common."""
    rows = same(MBT_CONFIG, {
        "modalities.video.tube": 2, "modalities.video.patch": 16, "modalities.video.max_time_positions": 16,
        "modalities.video.max_positions": 14, "modalities.spectrogram.patch_frames": 16,
        "modalities.spectrogram.patch_mels": 16, "modalities.spectrogram.mels": 128,
        "modalities.spectrogram.max_positions": 50, "tasks.sounds.inputs.video.frames": 32,
        "tasks.sounds.inputs.video.stride": 2, "tasks.sounds.inputs.video.size": 224,
        "tasks.sounds.inputs.video.flip": True, "tasks.sounds.inputs.video.token_drop": 0.0,
        "tasks.sounds.inputs.spectrogram.frames": 800, "tasks.sounds.batch": 64, "optimizer.decay": "cosine",
        "optimizer.end_lr_ratio": 0.0, "optimizer.weight_decay": 0.0, "optimizer.clip": 1.0, **PLAIN,
        "modalities.spectrogram.sample_rate": 16_000, "modalities.spectrogram.hop": 160,
    })  # fmt: skip
    # 50 epochs, and 2.5, of the 180,000 clips of VGGSound.
    rows += same(f"{MBT_CONFIG}, [P] table 1", {"steps": 140_000, "optimizer.warmup": 7_000})
    rows += [
        Row(
            "optimizer.algorithm.name", "muon", "momentum", MBT_CONFIG, "not implemented",
            "The optimizer is Muon at 1e-3",
        ),
        Row("optimizer.learning_rate", 1e-3, 0.5, MBT_CONFIG, "of momentum", "theirs is momentum at 0.5"),
        Row("dtype.compute", "bfloat16", "float32", MBT_CONFIG, "twice as fast", "computes in bfloat16"),
        Row("tasks.sounds.objective.classes", 309, 527, MBT_CONFIG, "one label of a clip", "several to a clip"),
    ]  # fmt: skip
    rows += ours("no scale jitter", "no scale jitter", {"tasks.sounds.inputs.video.crop": 0.7})
    rows += ours("not in the release", "Spectrograms have windows of 50 ms", {
        "modalities.spectrogram.window": 800, "modalities.spectrogram.low": 60.0,
        "modalities.spectrogram.high": 7600.0,
    })  # fmt: skip
    return rows


def mbt() -> Recipe:
    rows = clips() + same(f"{MBT_CONFIG}, {MBT_MODEL} EncoderBlock", {
        **VIT, "layers.name": "bottleneck", "layers.modalities": ("video", "spectrogram"),
        "layers.fuse": (False,) * 8 + (True,) * 4,
    })  # fmt: skip
    rows += same(f"{MBT_CONFIG}, {MBT_MODEL} MBT and loss_function", {
        "name": "fusion", "modalities": ("video", "spectrogram"), "tokens": 4, "mask": "full", "smoothing": 0.3,
        "readout": "mean", "loss": "each", "shared": True, "init": "zeros", "norm": "none",
    }, "tasks.sounds.objective.")  # fmt: skip
    rows += missing(
        MBT_CONFIG,
        "in the place of a class token",
        "mean over 4",
        "SpecAugment, mixup (0.5) or stochastic\n  depth (0.3)",
        "theirs from a ViT-B/16 of ImageNet-21k",
        "lacks the second frame of a tube",
        "fixed units",
    )
    return Recipe("mbt:b", ("mbt",), tuple(rows))


def zorro() -> Recipe:
    paper, port = "[K] Recasens et al. 2023", "[C] zorro-pytorch"
    rows = clips() + same(
        paper, {**VIT, "layers.name": "transformer", "layers.per_modality.parts": ()}
    )
    rows += same(port, {
        "name": "fusion", "modalities": ("video", "spectrogram"), "mask": "zorro", "readout": "each", "shared": False,
    }, "tasks.sounds.objective.")  # fmt: skip
    rows.append(
        Row(
            "tasks.sounds.objective.tokens",
            8,
            16,
            port,
            "the paper's number is unknown here",
            "There are 8 fusion tokens",
        )
    )
    rows += ours("unknown here", "labels are not smoothed", {
        "smoothing": 0.0, "loss": "each", "init": "zeros", "norm": "none",
    }, "tasks.sounds.objective.")  # fmt: skip
    rows += missing(
        paper,
        "fourth, global output",
        "contrastive pretraining between the pure outputs",
        "queries that attend again",
    )
    return Recipe("zorro:b", ("zorro", "mbt"), tuple(rows))
