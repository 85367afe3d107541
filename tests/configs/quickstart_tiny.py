"""The quickstart's own six tasks, so small that a run takes seconds: only sizes and splits differ."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmjax.core import config as configs

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.py"


def sources(block: Any) -> Iterator[dict[str, Any]]:
    """Yield the blocks within `block` that name a split."""
    if isinstance(block, dict):
        if "split" in block:
            yield block
        for value in block.values():
            yield from sources(value)


def get_config() -> dict[str, Any]:
    config = configs.read_file(str(QUICKSTART))
    layer = {"name": "transformer", "num_heads": 2, "mlp_dim": 64}
    config["steps"] = 22  # two periods of the schedule
    config["model"] = {"width": 32, "layers": [{"repeat": 2, "blocks": [layer]}]}
    for task in config["tasks"].values():
        task["batch"] = 8
        for evaluator in task["evaluators"].values():
            for source in sources(evaluator):
                source["split"] += "[:64]"
    masked = config["tasks"]["masked_image"]
    masked["inputs"]["image"]["size"] = 32
    masked["objective"]["decoder_width"] = 32
    config["optimizer"]["warmup"] = 4
    config["checkpoint"]["every"] = 11
    config["evaluation"]["batch"] = 64
    config["log"] = {"report": False}  # has tests of its own
    return config
