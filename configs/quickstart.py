"""Six tasks on one trunk: drawings, clips, speech and notes with their texts, classes, and masked drawings.

mmjax build quickstart
mmjax train --config=quickstart --workdir=runs/quickstart
mmjax train --config=quickstart:30min --workdir=runs/quickstart-30min

Settings: `30min` is the same model and tasks, for longer. `30min-noto` is also evaluated on one more vendor's drawings,
which need `pip install 'mmjax[noto]'` and `mmjax build emoji_noto`.

Hardware: a CPU with 2 cores: 900 steps of 5 to 14 GFLOP, 3 to 4 minutes with all evaluation, up to a minute more where
nothing is compiled yet. Results (three seeds): recall at 10 of 51 % on drawings never seen (chance 4 %) and 52 % on
clips of them; speech in voices never heard, recall at 1 of 7 % among 1,614 names (chance 0.06 %); 128 instruments at
pitches never heard 31 % (chance 0.8 %); 99 classes of drawings 31 % (majority 14 %); masked image error 0.53 (a patch's
mean: 0.66). `30min`: 5,000 steps, 21 to 26 minutes beside other work. Results (three seeds): recall at 10 of 74 % on
drawings never seen (chance 4 %), 46 % on another vendor's (chance 0.6 %) and 37 % on concepts never seen (chance 3.5
%); groups 55 % (majority 21 %); speech in voices never heard, recall at 1 of 44 % (chance 0.06 %); 128 instruments at
pitches never heard 99 %.
"""

from dataclasses import dataclass
from typing import Any, Literal

from ml_collections import ConfigDict


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The length of the run, and one more vendor to evaluate it on.

    Attributes:
      length: `short` for 900 steps, `30min` for 5,000.
      noto: whether drawings of Noto are evaluated too, after the longer run alone.
    """

    length: Literal["short", "30min"] = "short"
    noto: bool = False

    def __post_init__(self) -> None:
        if self.noto and self.length == "short":
            raise ValueError("Another vendor's drawings are for the longer run.")


JOINT = 96  # one space for pictures, clips, speech and text


def data(dataset: str, split: str) -> dict[str, Any]:
    return {"name": "tfds", "dataset": dataset, "split": split}


def clips(split: str, count: int = 1) -> dict[str, Any]:
    return {
        "name": "moving_emoji", "split": split, "actors": 1, "frames": 8, "size": 32,
        "clips": count,
    }  # fmt: skip


def contrastive(modality: str, concept: str) -> dict[str, Any]:
    return {
        "name": "contrastive", "modalities": [modality, "text"], "positive_key": concept, "embed_dim": JOINT,
        "head": "joint",
    }  # fmt: skip


def text(length: int) -> dict[str, Any]:
    return {"field": "caption", "length": length}


def get_config(setting: Setting = Setting()) -> ConfigDict:
    """Return the config of a setting."""
    drawings, concepts = data("emoji", "test_drawing"), data("emoji", "test_concept")
    line_art = data("emoji_line", "test_line")
    picture = {"size": 32, "crop": 0.7}
    layer = {"name": "transformer", "num_heads": 4, "mlp_dim": 512}

    config = ConfigDict(sort_keys=False)
    config.steps = 900
    config.seed = 0
    config.modalities = {
        "image": {"name": "image", "patch": 8, "max_positions": 16},
        "video": {"name": "video", "tube": 2, "patch": 8, "max_time_positions": 4, "max_positions": 16},
        "spectrogram": {
            "name": "spectrogram", "patch_frames": 4, "patch_mels": 64, "sample_rate": 11025, "window": 512,
            "high": 5500.0, "max_positions": 16,
        },
        "waveform": {"name": "waveform", "patch": 256, "sample_rate": 11025, "max_positions": 32},
        "text": {"name": "text", "tokenizer": "emoji/1.0.0/tokenizer.model"},
    }  # fmt: skip
    config.model = {"width": 128, "layers": [{"repeat": 4, "blocks": [layer]}]}
    config.tasks = {
        "image_text": {
            "source": data("emoji", "train"),
            "inputs": {"image": picture, "text": text(12)},
            "objective": contrastive("image", "concept"),
            "batch": 96,
            "weight": 3,
            "evaluators": {
                "drawings": {"name": "retrieval", "source": drawings},
                "concepts": {"name": "retrieval", "source": concepts},
                "line_art": {"name": "retrieval", "source": line_art},
                "groups": {"name": "zero_shot", "source": drawings, "names": data("emoji", "train")},
            },
        },
        "video_text": {
            "source": clips("train", 4),
            "inputs": {"video": {"size": 32, "frames": 4, "stride": 2}, "text": text(12)},
            "objective": contrastive("video", "pair"),
            "batch": 64,
            "weight": 2,
            "evaluators": {
                "drawings": {"name": "retrieval", "source": clips("test_drawing"), "positive_key": "pair"},
            },
        },
        "speech_text": {
            "source": data("speech", "train"),
            "inputs": {"spectrogram": {"frames": 64, "gain_db": 6.0}, "text": text(12)},
            "objective": contrastive("spectrogram", "concept"),
            "batch": 64,
            "weight": 3,
            "evaluators": {
                "voices": {"name": "retrieval", "source": data("speech", "test_voice")},
            },
        },
        "image_classes": {
            "source": data("emoji", "train"),
            "inputs": {"image": picture},
            "objective": {"name": "classification", "classes": 99, "label": "subgroup"},
            "batch": 64,
            "weight": 1,
            "evaluators": {
                "drawings": {"name": "accuracy", "source": drawings},
                "concepts": {"name": "accuracy", "source": concepts},
            },
        },
        "instruments": {
            "source": data("notes", "train"),
            "inputs": {
                "spectrogram": {"frames": 40, "gain_db": 6.0},
                "waveform": {"samples": 5376, "rms": 0.1},
            },
            "objective": {
                "name": "classification", "classes": 128, "label": "program",
                "modalities": ["spectrogram", "waveform"],
            },
            "batch": 64,
            "weight": 1,
            "evaluators": {
                "pitches": {"name": "accuracy", "source": data("notes", "test_pitch")},
            },
        },
        "masked_image": {
            "source": data("emoji", "train"),
            "inputs": {"image": {"size": 64, "crop": 0.7, "flip": True}},
            "objective": {"name": "masked_image", "decoder_width": 64, "decoder_depth": 1, "decoder_heads": 2},
            "batch": 64,
            "weight": 1,
            "evaluators": {"concepts": {"name": "held_out_loss", "source": concepts}},
        },
    }  # fmt: skip
    config.schedule = {"rule": "shares"}
    config.optimizer = {
        "algorithm": {"name": "muon"},
        "learning_rate": 2e-3,
        "warmup": 50,
        "weight_decay": 0.1,
        "clip": 1.0,
    }
    config.checkpoint = {"every": 300, "keep": 2}
    config.evaluation = {"every": 0, "batch": 256}
    if setting.length == "30min":
        config.steps = 5000
        config.checkpoint.every = 500
    if setting.noto:
        for split in ("test_vendor", "test_vendor_concept"):
            source = data("emoji_noto", split)
            config.tasks.image_text.evaluators[split] = {"name": "retrieval", "source": source}
    return config
