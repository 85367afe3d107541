"""Transfusion's recipe on real data, so small that a run takes seconds."""

from pathlib import Path

from ml_collections import ConfigDict

from mmjax.core.config import load_module

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
transfusion = load_module(CONFIGS / "transfusion.py")


def get_config() -> ConfigDict:
    config = transfusion.get_config(transfusion.Setting(size="small"))
    config.steps = 2
    config.model.update({"width": 16, "layers": transfusion.layers(1, 2, 16)})
    task = config.tasks.captions
    task.batch = 8
    task.inputs.image.size = 16
    task.inputs.text.length = 8
    task.objective.update({"sampling_steps": 2, "unet_channels": 2, "pack": 2})
    task.evaluators = {
        "loss": task.evaluators.drawings,
        "written": task.evaluators.written_drawings,
    }
    return config
