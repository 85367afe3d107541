"""MoMa on drawings and their English names: the recipe of `moma_1b.py` with smaller numbers.

python -m mmjax.datasets.build emoji
python -m mmjax.train --config=configs/moma_small.py --workdir=runs/moma_small

Settings as there: `moma_small.py:experts` (the default), `:one`, `:mixed`, `:dense`.

Hardware: a CPU with 2 cores. Results: none yet.
"""

from pathlib import Path

from ml_collections import ConfigDict

from mmjax.core.config import load_module

moma = load_module(Path(__file__).with_name("moma_1b.py"))
small = load_module(Path(__file__).with_name("mot_small.py"))


def get_config(setting: str = "experts") -> ConfigDict:
    """The config; `setting` is `experts`, `one`, `mixed` or `dense`."""
    config: ConfigDict = small.make_small(moma.get_config(setting))
    groups = moma.layers(setting, 4, 4, 344)
    for experts in (b["experts"] for g in groups for b in g["pattern"] if "experts" in b):
        experts.update({"group": 1024, "groups": 1, "causal": {"hidden": 64}})
    config.model.groups = groups
    config.mesh = {"data": 1, "fsdp": -1}
    return config
