"""MBT (Nagrani et al. 2021): video and sound of one event, fused through 4 tokens from layer 8 on.

    mmjax train --config=mbt:b --workdir=runs/mbt-b

    mmjax build notes
    mmjax train --config=mbt:small --workdir=runs/mbt-small

Settings: `b` is of the paper's size. `small` classifies notes by 128 instruments; these data force other modalities:
the same note as a spectrogram and as a waveform.

Sizes are those of the paper's B/16 and of its release (scenic, `projects/mbt`): two ViTs of 12 layers with biases, one
of each modality, the last 4 of which fuse; 32 frames of 224 pixels, every other of 25 a second, in tubes of 2 x 16 x
16; 8 seconds of spectrogram, 800 x 128, in patches of 16 x 16; a table of positions for each; batches of 64, 50 epochs
with a warm-up of 2.5, label smoothing 0.3, no weight decay. One classifier reads both modalities; the loss is the mean
of theirs, and a prediction the mean of their logits.

What differs, or is ours:

- The data are clips of one class each, such as VGGSound's 309; AudioSet's 527, several to a clip, want another loss.
- The classifier reads the mean of a modality's tokens, in the place of a class token. (The released configuration
  reads the mean of all tokens of both.)
- The optimizer is Muon at 1e-3; theirs is momentum at 0.5. The model computes in bfloat16, theirs in float32.
- Of the augmentations there are crops and mirrorings: no scale jitter, colours, SpecAugment, mixup (0.5) or stochastic
  depth (0.3). Spectrograms have windows of 50 ms, since 128 bands need them, and fixed units.
- Evaluation sees the middle of a clip, theirs the mean over 4.
- Layers are initialised randomly, theirs from a ViT-B/16 of ImageNet-21k. `init_from` can take the layers of such a
  ViT, biases and norms included. It takes neither its patches' kernel, which lacks the second frame of a tube, nor its
  table of positions, which has one frame and a class token.

The data set is not among those that can be built here. Give ArrayRecord files `train*.array_record*` and
`test*.array_record*` in `~/data/vggsound`, or set `tasks.sounds.source` and `tasks.sounds.evaluators.*.source`. The
records are `tf.train.Example` messages with `video`, the JPEG frames of a clip, 25 a second and all of one size;
`audio`, the bytes of a WAV file; and `label`, an integer below 309 (`tasks.sounds.objective.classes`).

Hardware: 16 chips of TPU v5e, by the plan in `plans/`; results: none, the paper's size has not been trained here.
`small`: a CPU with 2 cores, 300 steps of 11.1 GFLOP, 80 seconds in all on idle cores. Results (one seed, of an earlier
version, without biases and tables of positions, by the loss of the mean of logits), top-1 at pitches never heard
(chance 0.8 %): both 97.8 %, spectrogram alone 83.6 %, waveform alone 14.5 %.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ml_collections import ConfigDict


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A size of MBT; `small` has data of its own."""

    size: Literal["b", "small"]


VIEWS = {
    "video": {"frames": 32, "stride": 2, "size": 224, "crop": 0.7, "flip": True},
    "spectrogram": {"frames": 800},
}


def data(split: str) -> dict[str, Any]:
    return {"name": "array_record", "path": "~/data/vggsound", "glob": f"{split}*.array_record*"}


def evaluators(source: dict[str, Any], modalities: Sequence[str]) -> dict[str, Any]:
    """Return accuracy given both modalities, and given each of them alone."""
    given = {"both": [], **{name: [name] for name in modalities}}
    return {
        name: {"name": "accuracy", "source": source, "modalities": only}
        for name, only in given.items()
    }


def layers(
    apart: int, fused: int, heads: int, hidden: int, modalities: Sequence[str]
) -> list[dict[str, Any]]:
    """Return layers in which modalities keep apart, then those in which fusion tokens pass between them."""
    block = {
        "name": "bottleneck", "modalities": list(modalities), "num_heads": heads, "mlp_dim": hidden,
        "bias": True, "attention_bias": True,
    }  # fmt: skip
    return [
        {"repeat": repeat, "blocks": [{**block, "fuse": fuse}]}
        for repeat, fuse in ((apart, False), (fused, True))
    ]


def recipe(groups: list[dict[str, Any]]) -> ConfigDict:
    """Return the config at the paper's size, with such layers."""
    config = ConfigDict(sort_keys=False)
    config.steps = 140_000
    config.seed = 0
    config.modalities = {
        "video": {
            "name": "video", "tube": 2, "patch": 16, "max_time_positions": 16, "max_positions": 14,
            "positions": "table",
        },
        "spectrogram": {
            "name": "spectrogram", "patch_frames": 16, "patch_mels": 16, "mels": 128, "sample_rate": 16_000,
            "window": 800, "hop": 160, "low": 60.0, "high": 7600.0, "max_positions": 50,
            "positions": "table",
        },
    }  # fmt: skip
    config.model = {"width": 768, "layers": groups, "remat": "none"}
    config.tasks = {
        "sounds": {
            "source": data("train"),
            "inputs": VIEWS,
            "objective": {
                "name": "fusion", "modalities": [*VIEWS], "classes": 309, "label": "label", "tokens": 4,
                "mask": "full", "readout": "mean", "loss": "each", "shared": True, "smoothing": 0.3,
            },
            "batch": 64,
            "evaluators": evaluators(data("test"), [*VIEWS]),
        },
    }  # fmt: skip
    config.optimizer = {
        "algorithm": {"name": "muon"}, "learning_rate": 1e-3, "warmup": 7_000, "decay": "cosine", "end_lr_ratio": 0.0,
        "weight_decay": 0.0, "clip": 1.0,
    }  # fmt: skip
    config.dtype = {"compute": "bfloat16"}
    config.mesh = {"data": -1}
    config.checkpoint = {"every": 5_000, "keep": 2}
    config.evaluation = {"every": 0, "batch": 64}
    return config


def get_config(setting: Setting) -> ConfigDict:
    """Return the config of a setting."""
    if setting.size == "small":
        return on_notes(recipe(layers(2, 2, 4, 512, [*NOTES])))
    return recipe(layers(8, 4, 12, 3072, [*VIEWS]))


# --- small -------------------------------------------------------------------------------------

NOTES = {"spectrogram": {"frames": 40, "gain_db": 6.0}, "waveform": {"samples": 5376, "rms": 0.1}}


def notes(split: str) -> dict[str, Any]:
    return {"name": "tfds", "dataset": "notes", "split": split}


def on_notes(config: ConfigDict) -> ConfigDict:
    """Give the config notes for its data, and the sizes that go with them."""
    config.steps = 300
    config.modalities = {
        "spectrogram": {
            "name": "spectrogram", "patch_frames": 4, "patch_mels": 64, "mels": 64, "sample_rate": 11_025,
            "window": 512, "hop": 256, "low": 60.0, "high": 5500.0, "max_positions": 10,
            "positions": "table",
        },
        "waveform": {
            "name": "waveform", "patch": 256, "sample_rate": 11_025, "max_positions": 21, "positions": "table",
        },
    }  # fmt: skip
    config.model.width = 128
    task = config.tasks.sounds
    task.source = notes("train")
    task.inputs = NOTES
    task.objective.update({"modalities": [*NOTES], "classes": 128, "label": "program", "tokens": 4})
    task.evaluators = evaluators(notes("test_pitch"), [*NOTES])
    config.optimizer.update({"learning_rate": 5e-3, "warmup": 30})
    config.dtype.compute = "float32"
    config.checkpoint.every = 300
    config.evaluation.batch = 256
    return config
