"""Zorro (Recasens et al. 2023) at the size of its ViT: one transformer of video and sound, whose mask keeps each pure.

    python -m mmjax.train --config=configs/zorro_b.py --workdir=runs/zorro_b

A ViT-B/16 (12 layers, width 768, 12 heads, with biases) shared by both modalities and fusion tokens. A modality's
tokens see their own kind, fusion tokens see all, and each of the three outputs has a classifier and a loss, so that a
video without sound, or sound alone, is classified as if the other had never been there. The paper's text is not at
hand; masks are those of its public port (`zorro-pytorch`), whose layers have no biases.

What differs, or is ours:

- Views of a clip, data, optimizer, steps, and what differs in these, are those of `mbt_b.py`.
- There are 8 fusion tokens (the port has 16), and labels are not smoothed.
- Outputs are mean-pooled tokens, not queries that attend once more to what they may see.
- Missing: the fourth, global output, which reads all tokens, and contrastive pretraining between the pure outputs.

For your own data set `tasks.sounds.source` and `tasks.sounds.evaluators.*.source`, see `mbt_b.py`.

Hardware: 16 chips of TPU v5e, by the plan in `plans/`. Results: none, it has not been trained here; see
`zorro_small.py`, the same recipe with smaller numbers.
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mmjax.core.config import load_module

mbt = load_module(Path(__file__).with_name("mbt_b.py"))


def layers(repeat: int, heads: int, hidden: int) -> list[dict[str, Any]]:
    block = {
        "name": "transformer", "heads": heads, "hidden": hidden, "bias": True, "attention_bias": True,
    }  # fmt: skip
    return [{"repeat": repeat, "pattern": [block]}]


def get_config() -> ConfigDict:
    config = mbt.get_config()
    config.model.groups = layers(12, 12, 3072)
    config.tasks.sounds.objective.update(
        {"tokens": 8, "mask": "zorro", "reading": "each", "shared": False, "smoothing": 0.0}
    )
    return config
