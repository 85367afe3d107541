"""IMP-L (Akbari et al. 2023): the encoder of 300 million.

    python -m mmjax.train --config=configs/imp_l.py --workdir=runs/imp_l

`imp_b.py`, larger. The release has no dense large experiment: sizes are those of its large model, and the rate and the
tasks those of its sparse one (`imp_moe_l.py`). Data, settings and what differs are those of `imp_b.py`.

Hardware: 256 chips of TPU v5e or 128 of v5p, by the plans in `plans/`. Results: none, it has not been trained here; see
`imp_small.py`, the same recipe with smaller numbers.
"""

from pathlib import Path

from ml_collections import ConfigDict

from mmjax.core.config import load_module

imp = load_module(Path(__file__).with_name("imp_b.py"))


def get_config(setting: str = "released") -> ConfigDict:
    """The config; `setting` is `released` or `mixed`."""
    config: ConfigDict = imp.recipe("l", setting=setting)
    return config
