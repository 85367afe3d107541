"""MBT on notes of 128 instruments: the recipe of `mbt_b.py` with smaller numbers.

python -m mmjax.datasets.build notes
python -m mmjax.train --config=configs/mbt_small.py --workdir=runs/mbt_small

The data force other modalities: the same note as a spectrogram and as a waveform.

Hardware: a CPU with 2 cores: 300 steps of 11.1 GFLOP, 80 seconds in all on idle cores. Results (one seed, of an earlier
version, without biases and tables of positions, by the loss of the mean of logits), top-1 at pitches never heard
(chance 0.8 %): both 97.8 %, spectrogram alone 83.6 %, waveform alone 14.5 %.
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mmjax.core.config import load_module

mbt = load_module(Path(__file__).with_name("mbt_b.py"))
VIEWS = {"spectrogram": {"frames": 40, "gain": 6.0}, "waveform": {"samples": 5376, "level": 0.1}}


def data(split: str) -> dict[str, Any]:
    return {"name": "tfds", "dataset": "notes", "split": split}


def on_notes(config: ConfigDict) -> ConfigDict:
    """The config with notes for its data, and the sizes that go with them."""
    config.steps = 300
    config.modalities = {
        "spectrogram": {
            "name": "spectrogram", "patch_frames": 4, "patch_mels": 64, "mels": 64, "rate": 11_025,
            "window": 512, "hop": 256, "low": 60.0, "high": 5500.0, "buckets": 10,
            "positions": "table",
        },
        "waveform": {
            "name": "waveform", "patch": 256, "rate": 11_025, "buckets": 21, "positions": "table",
        },
    }  # fmt: skip
    config.model.width = 128
    task = config.tasks.sounds
    task.source = data("train")
    task.inputs = VIEWS
    task.objective.update({"modalities": [*VIEWS], "classes": 128, "label": "program", "tokens": 4})
    task.evaluators = mbt.evaluators(data("test_pitch"), [*VIEWS])
    config.optimizer.update({"learning_rate": 5e-3, "warmup": 30})
    config.dtype.compute = "float32"
    config.checkpoint.every = 300
    config.evaluation.batch = 256
    return config


def get_config() -> ConfigDict:
    config = on_notes(mbt.get_config())
    config.model.groups = mbt.layers(2, 2, 4, 512, [*VIEWS])
    return config
