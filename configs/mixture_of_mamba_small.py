"""Mixture-of-Mamba on drawings and their English names: the recipe of `mixture_of_mamba_1b.py` with smaller numbers.

python -m mmjax.datasets.build emoji
python -m mmjax.train --config=configs/mixture_of_mamba_small.py --workdir=runs/mixture_of_mamba_small

Settings as there: `mixture_of_mamba_small.py:transfusion` (the default), `:chameleon`, and each `-dense`.

Hardware: a CPU with 2 cores: 250 steps of 3.5 GFLOP, 3 to 8 minutes, measured beside other work. Results (three seeds,
`benchmarks/results/mechanisms.md`; of an earlier version, with layer norms and learned positions), on drawings never
seen: 0.162 of the noise's variance (without copies: 0.198), 4.55 nats for a piece of text (4.55; knowing nothing:
7.62).
"""

from pathlib import Path

from ml_collections import ConfigDict

from mmjax.core.config import load_module

mamba = load_module(Path(__file__).with_name("mixture_of_mamba_1b.py"))
small = load_module(Path(__file__).with_name("mot_small.py"))


def get_config(setting: str = "transfusion") -> ConfigDict:
    config = small.make_small(mamba.get_config(setting))
    config.model.groups = mamba.layers(setting, 4, state=8)
    config.steps = 250
    config.tasks.captions.batch = 16
    return config
