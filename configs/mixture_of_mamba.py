"""Mixture-of-Mamba (Liang et al. 2025): a Mamba whose projections are by modality.

    mmjax build emoji
    mmjax train --config=mixture_of_mamba:1b --workdir=runs/mixture-of-mamba-1b
    mmjax train --config=mixture_of_mamba:small --workdir=runs/mixture-of-mamba-small

Settings: `1b` is of the paper's size, 1.4 billion, and `small` the same recipe with smaller numbers. Their tasks are
those of `mot.py:7b-transfusion`; each also with `-chameleon`, those of `mot.py:7b`, and with `-dense` behind that,
which is Mamba without copies.

Mamba's own model of 1.4 billion (Gu and Dao 2023, 48 layers of width 2,048, norms by root mean squares, no positions);
the projections into a block, to the recurrence's parameters, to its step and out of the block have a copy for text and
one for images, the convolution and the recurrence are shared. As the recurrence is causal, an image's tokens do not see
those after them.

What differs, or is ours:

- Steps, batch and rate are ours: those of `mot.py`, with a quarter of its batch.
- Missing: the paper's setting with speech.
- What `mot.py` and `transfusion.py` state on images, texts, time and data holds here.

Data are the drawings and names that the data sets here hold. For your own, set `tasks.captions.source` and
`tasks.captions.evaluators.*.source` (records with `image`, an encoded picture, and `caption`), and
`modalities.text.tokenizer` with its number of pieces in `modalities.text.vocabulary`.

Hardware: 64 chips of TPU v5p, by the plan in `plans/`; results: none, the paper's size has not been trained here.
`small`: a CPU with 2 cores, 250 steps of 3.5 GFLOP, 3 to 8 minutes, measured beside other work. Results (three seeds,
`benchmarks/results/mechanisms.md`; of an earlier version, with layer norms and learned positions), on drawings never
seen: 0.162 of the noise's variance (without copies: 0.198), 4.55 nats for a piece of text (4.55; knowing nothing:
7.62).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from mmjax.core.config import load_module

mot = load_module(Path(__file__).with_name("mot.py"))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A size of Mixture-of-Mamba, what it learns by, and whether it is untied.

    Attributes:
      size: size of the model; `small` has smaller pictures and shorter texts too.
      tasks: images by diffusion, or both modalities by the next token.
      dense: whether modalities share all parameters.
    """

    size: Literal["1b", "small"]
    tasks: Literal["transfusion", "chameleon"] = "transfusion"
    dense: bool = False


UNTIED = ("in", "x", "dt", "out")


def layers(setting: Setting, repeat: int, **more: Any) -> list[dict[str, Any]]:
    block = {"name": "mamba", "norm": "rms", "eps": 1e-5, "depth": repeat, **more}
    if not setting.dense:
        block |= {
            "per_modality": {"parts": list(UNTIED), "modalities": mot.modalities(setting.tasks)}
        }
    return [{"repeat": repeat, "blocks": [block]}]


def get_config(setting: Setting) -> ConfigDict:
    """Return the config of a setting."""
    config: ConfigDict = mot.recipe(setting.tasks, setting.dense)
    config.model.width = 2048
    config.model.layers = layers(setting, 48)
    # The paper unties projections alone.
    if "per_modality" in config.model:
        del config.model["per_modality"]
    config.tasks.captions.batch //= 4
    if setting.size == "small":
        mot.make_small(config)
        config.model.layers = layers(setting, 4, state=8)
        config.steps = 250
        config.tasks.captions.batch = 16
    return config
