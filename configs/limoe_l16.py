"""LIMoE-L/16 (Mustafa et al. 2022): `limoe_b16.py`, larger.

    python -m mmjax.datasets.build emoji
    python -m mmjax.train --config=configs/limoe_l16.py --workdir=runs/limoe_l16

Data, settings and what is from memory are those of `limoe_b16.py`.

Hardware: 256 chips of TPU v5e or 128 of v5p, by the plans in `plans/`. Results: none, it has not been trained here; see
`limoe_small.py`, the same recipe with smaller numbers.
"""

from pathlib import Path

from ml_collections import ConfigDict

from mmjax.core.config import load_module

limoe = load_module(Path(__file__).with_name("limoe_b16.py"))


def get_config(setting: str = "entropies") -> ConfigDict:
    """The config; `setting` is `entropies`, `classic`, `none` or `dense`."""
    config: ConfigDict = limoe.recipe("l16", setting)
    return config
