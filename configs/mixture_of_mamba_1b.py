"""Mixture-of-Mamba (Liang et al. 2025) at the paper's size: a Mamba of 1.4 billion, its projections by modality.

    python -m mmjax.datasets.build emoji
    python -m mmjax.train --config=configs/mixture_of_mamba_1b.py --workdir=runs/mixture_of_mamba_1b

Mamba's own model of 1.4 billion (Gu and Dao 2023, 48 layers of width 2,048, norms by root mean squares, no positions);
the projections into a block, to the recurrence's parameters, to its step and out of the block have a copy for text and
one for images, the convolution and the recurrence are shared. The tasks are those of `mot_7b.py`:
`mixture_of_mamba_1b.py:transfusion` (the default) and `:chameleon`, each also `-dense`, which is Mamba without copies.
As the recurrence is causal, an image's tokens do not see those after them.

What differs, or is ours:

- Steps, batch and rate are ours: those of `mot_7b.py`, with a quarter of its batch.
- Missing: the paper's setting with speech.
- What `mot_7b.py` and `transfusion_7b.py` say of images, texts, time and data holds here.

Data are the drawings and names that the data sets here hold. For your own, set `tasks.captions.source` and
`tasks.captions.evaluators.*.source` (records with `image`, an encoded picture, and `caption`), and
`modalities.text.tokenizer` with its number of pieces in `modalities.text.vocabulary`.

Hardware: 64 chips of TPU v5p, by the plan in `plans/`. Results: none, it has not been trained here; see
`mixture_of_mamba_small.py`, the same recipe with smaller numbers.
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mmjax.core.config import load_module

mot = load_module(Path(__file__).with_name("mot_7b.py"))

UNTIED = ("in", "x", "dt", "out")


def layers(setting: str, repeat: int, **more: Any) -> list[dict[str, Any]]:
    block = {"name": "mamba", "norm": "rms", "eps": 1e-5, "depth": repeat, **more}
    if "dense" not in setting:
        block |= {"untie": list(UNTIED), "modalities": mot.modalities(setting)}
    return [{"repeat": repeat, "pattern": [block]}]


def get_config(setting: str = "transfusion") -> ConfigDict:
    """The config; `setting` is one of `mot_7b.py`'s."""
    config = mot.get_config(setting)
    config.model.width = 2048
    config.model.groups = layers(setting, 48)
    # The paper unties projections alone.
    config.model.norm_modalities = []
    config.tasks.captions.batch //= 4
    return config
