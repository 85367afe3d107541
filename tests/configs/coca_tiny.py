"""CoCa's recipe on real data, so small that a run takes seconds."""

from pathlib import Path

from ml_collections import ConfigDict

from mmjax.core.config import load_module

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
small = load_module(CONFIGS / "coca_small.py")


def get_config() -> ConfigDict:
    encoder, decoder = small.coca.model(16, 2, 1, 16, 1, 16)
    config = small.get_config()
    config.steps = 2
    config.model.update(encoder)
    task = config.tasks.captions
    task.batch = 8
    task.inputs.image.size = 16
    task.inputs.text.length = 8
    task.objective.update({**decoder, "queries": 4})
    task.evaluators = {"written": task.evaluators.written_drawings}
    return config
