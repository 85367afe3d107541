"""Two tasks of regression on random numbers: compiles in a second, needs `--extra=tests/extra`."""

from typing import Any

from ml_collections import ConfigDict


def task(tokens: int, batch: int, share: int) -> dict[str, Any]:
    return {
        "source": {"name": "toy"},
        "inputs": {"toy": {"tokens": tokens}},
        "objective": {"name": "toy"},
        "batch": batch,
        "weight": share,
        "evaluators": {"loss": {"name": "held_out_loss", "source": {"name": "toy", "count": 16}}},
    }


def get_config() -> ConfigDict:
    config = ConfigDict(sort_keys=False)
    config.steps = 12
    config.modalities = {"toy": {"name": "toy"}}
    config.model = {"width": 8, "layers": [{"repeat": 2, "blocks": [{"name": "toy"}]}]}
    config.tasks = {"one": task(tokens=2, batch=8, share=2), "two": task(3, 16, 1)}
    # A constant rate, so that the length of a run changes none of its steps.
    config.optimizer = {
        "learning_rate": 1e-2,
        "warmup": 2,
        "decay": "constant",
        "weight_decay": 0.05,
    }
    config.checkpoint = {"every": 4, "keep": 3}
    config.evaluation = {"every": 6, "batch": 8}
    config.log = {"report": False}
    return config
