"""CoCa's recipe on real data, so small that a run takes seconds."""

from pathlib import Path

from ml_collections import ConfigDict

from mmjax.core.config import load_module

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
coca = load_module(CONFIGS / "coca.py")


def get_config() -> ConfigDict:
    encoder, decoder = coca.model(16, 2, 1, 16, 1, 16)
    config = coca.get_config(coca.Setting(size="small"))
    config.steps = 2
    config.model.update(encoder)
    task = config.tasks.captions
    task.batch = 8
    task.inputs.image.size = 16
    task.inputs.text.length = 8
    task.objective.update({**decoder, "queries": 4})
    task.evaluators = {"written": task.evaluators.written_drawings}
    return config
