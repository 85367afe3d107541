"""Mixture-of-Transformers on drawings and their English names: the recipe of `mot_7b.py` with smaller numbers.

python -m mmjax.datasets.build emoji
python -m mmjax.train --config=configs/mot_small.py --workdir=runs/mot_small

Settings as there: `mot_small.py:chameleon` (the default), `:transfusion`, and each `-dense`.

Hardware: a CPU with 2 cores: 300 steps of 18 GFLOP, 2 to 5 minutes, measured beside other work. Results (three seeds,
`benchmarks/results/mechanisms.md`; of an earlier version, with learned positions, a cosine decay and norms behind their
parts), on drawings never seen: 1.62 nats for a colour (dense: 1.73; knowing nothing: 6.24), 4.05 for a piece of text
(dense: 4.06; 7.62); `:transfusion`, 0.157 of the noise's variance (dense: 0.177), 4.03 nats (dense: 4.07).
"""

from pathlib import Path

from ml_collections import ConfigDict

from mmjax.core.config import load_module

mot = load_module(Path(__file__).with_name("mot_7b.py"))
small = load_module(Path(__file__).with_name("transfusion_small.py"))


def make_small(config: ConfigDict) -> ConfigDict:
    """Smaller numbers, of any recipe of these settings."""
    config = small.make_small(config)
    config.steps = 300
    config.tasks.captions.batch = 32
    if "colours" in config.modalities:
        config.modalities.colours.levels = 8
        config.tasks.captions.inputs.colours.size = 8
    return config


def get_config(setting: str = "chameleon") -> ConfigDict:
    config = make_small(mot.get_config(setting))
    config.model.groups = mot.layers(setting, 4, 4, 344)
    return config
