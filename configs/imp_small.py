"""IMP on drawings, clips of them, spoken names and notes: the recipe of `imp_b.py` with smaller numbers.

python -m mmjax.datasets.build emoji speech notes
python -m mmjax.train --config=configs/imp_small.py --workdir=runs/imp_small

Settings: `imp_small.py:released` (the default), `:mixed` (videos in three shapes), `:moe` (`imp_moe_b.py`: four experts
in each of the last two layers), `:moe-mixed`, and `:apart`, which has an encoder for each modality. Clips are drawings
that move; the third modality of a clip is its name, spoken. Examples of one concept are positives of each other, as
names repeat here, and nothing is mirrored. Positions begin at 0.05 of IMP's size: as large as the content, they keep
contrastive learning still for its first hundreds of steps.

Hardware: a CPU with 2 cores: 360 steps of 6.3 GFLOP in 1 to 3 minutes, measured beside other work. Results of 360 steps
by Muon (three seeds; `benchmarks/results/imp.md` has those of the other settings; of an earlier version, which
classified clips of four frames with half of their tokens dropped), on drawings never seen: picture to text, recall at
10 of 25.6 % (chance 4.1 %); clip to text 12.7 %; 99 classes of pictures 23.0 % (chance 1 %); 128 instruments, pitches
never heard, 7.4 % (0.8 %); the direction of a clip, of eight, 16.7 %.
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mmjax.blocks.transformer import PARTS
from mmjax.core.config import load_module
from mmjax.core.errors import UserError, nearest

imp = load_module(Path(__file__).with_name("imp_b.py"))
SETTINGS = ("released", "mixed", "moe", "moe-mixed", "apart")


def shapes(frames: int, drop: float, long: float, large: float) -> dict[str, Any]:
    """Buckets of 16 tokens each."""
    views: dict[str, Any] = {
        "released": {"frames": frames, "size": 32, "drop": drop},
        "long": {"frames": 2 * frames, "stride": 1, "size": 32, "drop": long},
        "large": {"frames": frames, "size": 48, "drop": large},
    }
    buckets: dict[str, Any] = {name: {"inputs": {"vision": view}} for name, view in views.items()}
    buckets["released"]["share"] = 2
    return buckets


BUCKETS = {
    "videos": shapes(2, 0.0, 0.5, 0.556),  # of 16, 32 and 36 tokens
    "video_text": shapes(4, 0.5, 0.75, 0.778),  # of 32, 64 and 72
    "video_audio_text": shapes(4, 0.5, 0.75, 0.778),
}


def data(dataset: str, split: str) -> dict[str, Any]:
    return {"name": "tfds", "dataset": dataset, "split": split}


def clips(split: str) -> dict[str, Any]:
    return {
        "name": "moving_emoji", "split": split, "actors": 1, "frames": 8, "size": 48, "clips": 4,
    }  # fmt: skip


def spoken(split: str, voices: str) -> dict[str, Any]:
    """Clips with the names of what they show, spoken."""
    right = data("speech", voices)
    return {"name": "joined", "left": clips(split), "right": right, "by": "concept", "take": ["audio"]}  # fmt: skip


SOURCES = {
    "image_text": (data("emoji", "train"), data("emoji", "test_drawing")),
    "images": (data("emoji", "train"), data("emoji", "test_drawing")),
    "video_text": (clips("train"), clips("test_drawing")),
    "videos": (clips("train"), clips("test_drawing")),
    "video_audio_text": (spoken("train", "train"), spoken("test_drawing", "test_voice")),
    "sounds": (data("notes", "train"), data("notes", "test_pitch")),
}
CLASSES = {"images": ("subgroup", 99), "videos": ("direction", 8), "sounds": ("program", 128)}
NUMBERS = {  # batch, interval
    "image_text": (64, 1), "images": (64, 2), "video_text": (32, 2), "videos": (32, 4), "video_audio_text": (32, 2),
    "sounds": (64, 4),
}  # fmt: skip


def on_emoji(name: str, task: ConfigDict) -> None:
    """The data of a task, and the sizes that go with them."""
    task.batch, task.share = NUMBERS[name]
    task.source, test = SOURCES[name]
    task.evaluators.test.source = test
    if "vision" in task.inputs:
        frames = {1: 1, 4: 2, 16: 4}[task.inputs.vision.frames]
        task.inputs.vision.update({"frames": frames, "size": 32, "flip": False})
        if "drop" in task.inputs.vision:
            task.inputs.vision.drop = 0.5
    if "spectrogram" in task.inputs:
        task.inputs.spectrogram.update({"frames": 40 if name == "sounds" else 64, "gain": 6.0})
    if "text" in task.inputs:
        task.inputs.text.length = 12
        if "instances" in task.inputs.text:
            task.inputs.text.instances = 0  # a drawing has one name
        task.objective.update({"joint": 96, "concept": "concept", "initial": 0.1})
    if name in CLASSES:
        task.objective.label, task.objective.classes = CLASSES[name]


def apart(config: ConfigDict) -> None:
    """A copy of all of the trunk for each modality, of the same size."""
    names = list(config.modalities)
    config.model.norm_modalities = names
    for block in (b for group in config.model.groups for b in group["pattern"]):
        block |= {"untie": [p for p in PARTS if p != "qk_norm"], "modalities": names}


def get_config(setting: str = "released") -> ConfigDict:
    """The config; `setting` is one of `SETTINGS`."""
    if setting not in SETTINGS:
        raise UserError(f"There is no setting '{setting}'.{nearest(setting, SETTINGS)}")
    experts, mixed = 4 if "moe" in setting else 0, "mixed" if "mixed" in setting else "released"
    config: ConfigDict = imp.recipe("b", experts, mixed)
    config.steps = 900
    config.modalities.vision.update({"tube": 2, "patch": 8, "time_buckets": 4, "buckets": 12})
    config.modalities.spectrogram.update(
        {
            "patch_frames": 4, "patch_mels": 64, "mels": 64, "rate": 11_025, "window": 512, "hop": 256,
            "low": 60.0, "high": 5500.0, "buckets": 16,
        }
    )  # fmt: skip
    config.modalities.text.update(
        {"tokenizer": "emoji/1.0.0/tokenizer.model", "vocabulary": 2048, "buckets": 128}
    )
    for modality in config.modalities.values():
        # As large as the content, positions keep contrastive learning from its first hundreds of steps.
        modality.positions_scale = 0.05
    groups = imp.layers(4, 4, 512, experts)
    for routed in (b["experts"] for g in groups for b in g["pattern"] if "experts" in b):
        routed["groups"] = 1
    config.model.update({"width": 128, "groups": groups, "remat": "none"})
    if setting == "apart":
        apart(config)
    for name, task in config.tasks.items():
        on_emoji(name, task)
        if "buckets" in task:
            task.buckets = BUCKETS[name]
    config.optimizer.update({"learning_rate": 2e-3, "warmup": 50})
    config.dtype.compute = "float32"
    config.mesh = {"data": -1}
    config.checkpoint.every = 300
    config.evaluation.batch = 256
    return config
