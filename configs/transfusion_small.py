"""Transfusion on drawings and their English names: the recipe of `transfusion_7b.py` with smaller numbers.

python -m mmjax.data.build emoji
python -m mmjax.train --config=configs/transfusion_small.py --workdir=runs/transfusion_small

Hardware: a CPU with 2 cores. Results: to be measured.
"""

from pathlib import Path

from ml_collections import ConfigDict

from mmjax.config import load_module

transfusion = load_module(Path(__file__).with_name("transfusion_7b.py"))


def make_small(config: ConfigDict) -> ConfigDict:
    """Smaller numbers, of any recipe of these tasks."""
    config.steps = 500
    config.modalities.text.update({"vocabulary": 2048, "buckets": 32})
    if "image" in config.modalities:
        config.modalities.image.update({"patch": 4, "buckets": 8})
    config.model.update({"width": 128, "remat": "none"})
    for task in config.tasks.values():
        task.batch = 64
        task.inputs.text.length = 12
        task.objective.pack = 4
        if "image" in task.inputs:
            task.inputs.image.size = 32
            task.objective.steps = 50
    config.optimizer.update({"learning_rate": 2e-3, "warmup": 50})
    config.dtype.compute = "float32"
    config.checkpoint.every = 250
    config.evaluation.batch = 256
    return config


def get_config(setting: str = "transfusion") -> ConfigDict:
    config = make_small(transfusion.get_config(setting))
    config.model.groups = transfusion.layers(4, 4, 344)
    for task in config.tasks.values():
        if "image" in task.inputs:
            task.objective.channels = 16
            task.batch = 32
    return config
