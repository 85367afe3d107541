"""IMP-MoE-L (Akbari et al. 2023): `imp_l.py` with 16 experts in each of its last six layers.

    python -m mmjax.train --config=configs/imp_moe_l.py --workdir=runs/imp_moe_l

Experts choose tokens (capacity 1, groups of 2,048 tokens, softmax over experts, no auxiliary loss). Data, tasks and
settings are those of `imp_b.py`.

Hardware: 256 chips of TPU v5e or 128 of v5p, by the plans in `plans/`. Results: none, it has not been trained here; see
`imp_small.py`, the same recipe with smaller numbers.
"""

from pathlib import Path

from ml_collections import ConfigDict

from mmjax.core.config import load_module

imp = load_module(Path(__file__).with_name("imp_b.py"))


def get_config(setting: str = "released") -> ConfigDict:
    """The config; `setting` is `released` or `mixed`."""
    config: ConfigDict = imp.recipe("l", 16, setting)
    return config
