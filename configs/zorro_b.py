"""Zorro (Recasens et al. 2023) at the size of its ViT: one transformer of video and sound, whose mask keeps each pure.

    python -m mmjax.train --config=configs/zorro_b.py --workdir=runs/zorro_b

A ViT-B/16 (12 layers, width 768, 12 heads) shared by both modalities and fusion tokens. A modality's tokens see their
own kind, fusion tokens see all, and each of the three outputs has a classifier and a loss, so that a video without
sound, or sound alone, is classified as if the other had never been there. The views of a clip, the data that you are to
supply, the optimizer and what differs in these are those of `mbt_b.py`; the paper's own views and its number of fusion
tokens we could not look up: 8 is ours. Outputs are mean-pooled tokens, not tokens that attend once more; the paper also
trains contrastively, which is not done here.

Hardware: 16 chips of TPU v5e, by the plan in `plans/`. Results: none, it has not been trained here; see
`zorro_small.py`, the same recipe with smaller numbers.
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mmjax.config import load_module

mbt = load_module(Path(__file__).with_name("mbt_b.py"))


def layers(repeat: int, heads: int, hidden: int) -> list[dict[str, Any]]:
    return [
        {"repeat": repeat, "pattern": [{"name": "transformer", "heads": heads, "hidden": hidden}]}
    ]


def get_config() -> ConfigDict:
    config = mbt.get_config()
    config.model.groups = layers(12, 12, 3072)
    config.tasks.sounds.objective.update({"tokens": 8, "mask": "zorro", "reading": "each"})
    config.tasks.sounds.objective.smoothing = 0.0
    return config
