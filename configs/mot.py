"""Mixture-of-Transformers (Liang et al. 2024): parameters for each modality, attention over all tokens.

    mmjax build emoji
    mmjax train --config=mot:7b --workdir=runs/mot-7b
    mmjax train --config=mot:small --workdir=runs/mot-small

Settings: `7b` is of the paper's size, with the parameters of 7 billion for each modality, and `small` the same recipe
with smaller numbers; each also with `-transfusion`, and with `-dense` behind that, without copies.

Every parameter of the trunk, norms among them, has a copy for text and one for images; attention is over all tokens,
and a token meets as many parameters as in the dense model. `7b` learns both by the next token, an image being 1,024
discrete ones, in the block of Chameleon's 7 billion: norms before its parts, layer norms of queries and keys, rotary
embeddings and no other positions. `7b-transfusion` is `transfusion.py:7b` so untied, with linear adapters. `7b-dense`
and `7b-transfusion-dense` are the same without copies.

What differs, or is ours:

- The authors' simplified code has norms behind its parts (as Chameleon's 34 billion) and root mean squares of queries
  and keys; here both settings have the block of the dense model that they are compared with.
- The rate of `7b` falls linearly to 1 %, as MoMa's; Chameleon's falls exponentially.
- Images are 32 pixels a side of 8,000 colours; theirs are 8,192 codes of a learned tokenizer. Texts and colours have a
  table and a head each (32,000 and 8,000); theirs share one of 65,536.
- Batch and steps are ours. There is no dropout (Chameleon's 7 billion: 0.1).
- Missing: speech as a third modality; experts in one modality's MLP beside a dense one.
- What `transfusion.py` states on its own images, time and data holds for `7b-transfusion`.

Data are the drawings and names that the data sets here hold. For your own, set `tasks.captions.source` and
`tasks.captions.evaluators.*.source` (records with `image`, an encoded picture, and `caption`), and
`modalities.text.tokenizer` with its number of pieces in `modalities.text.vocabulary`.

Hardware: 256 chips of TPU v5p, by the plan in `plans/`; results: none, the paper's size has not been trained here.
`small`: a CPU with 2 cores, 300 steps of 18 GFLOP, 2 to 5 minutes, measured beside other work. Results (three seeds,
`benchmarks/results/mechanisms.md`; of an earlier version, with learned positions, a cosine decay and norms behind their
parts), on drawings never seen: 1.62 nats for a colour (dense: 1.73; knowing nothing: 6.24), 4.05 for a piece of text
(dense: 4.06; 7.62); `small-transfusion`, 0.157 of the noise's variance (dense: 0.177), 4.03 nats (dense: 4.07).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from mmjax.blocks.transformer import PARTS
from mmjax.core.config import load_module

transfusion = load_module(Path(__file__).with_name("transfusion.py"))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A size of Mixture-of-Transformers, what it learns by, and whether it is untied.

    Attributes:
      size: size of the model; `small` has smaller pictures and shorter texts too.
      tasks: both modalities by the next token, or images by diffusion.
      dense: whether modalities share all parameters.
    """

    size: Literal["7b", "small"]
    tasks: Literal["chameleon", "transfusion"] = "chameleon"
    dense: bool = False


# Sequences of 4,288 positions: 4 images of 1,025, whose captions share 188.
CHAMELEON_PACKING = {"pack": 4, "capacity": {"text": 188}, "window": 64}
# MoMa's rate (Lin et al. 2024) and Chameleon's eps.
CHAMELEON = {
    "algorithm": {"eps": 1e-5}, "learning_rate": 1e-4, "decay": "linear", "end_lr_ratio": 0.01,
}  # fmt: skip


def layers(tasks: str, dense: bool, repeat: int, heads: int, hidden: int) -> list[dict[str, Any]]:
    """Return the block of such tasks, `PARTS` by modality unless it is dense."""
    block: dict[str, Any] = (
        {"qk_norm": "layer", "norm_position": "pre"} if tasks == "chameleon" else {}
    )
    if not dense:
        parts = [part for part in PARTS if part != "qk_norm" or block]
        block |= {"per_modality": {"parts": parts, "modalities": modalities(tasks)}}
    return transfusion.layers(repeat, heads, hidden, **block)


def modalities(tasks: str) -> list[str]:
    return ["text", "colours" if tasks == "chameleon" else "image"]


def recipe(tasks: str, dense: bool) -> ConfigDict:
    """Return the config at the paper's size: its tasks and their rate, and the last norm of each modality."""
    config: ConfigDict = transfusion.recipe()
    config.model.layers = layers(tasks, dense, 32, 32, 11_008)
    task = config.tasks.captions
    task.objective.unet_channels = 0
    if tasks == "chameleon":
        del config.modalities["image"]
        config.modalities.colours = {"name": "colours", "levels": 20, "positions": "none"}
        task.inputs = {
            "text": {"field": "caption", "length": 1022},
            "colours": {"size": 32, "crop": 0.7},
        }
        task.objective = {
            "name": "transfusion", "modalities": ["text", "colours"], "discrete": ["text", "colours"],
            "condition_dropout": 0.1, "reverse_prob": 0.2, **CHAMELEON_PACKING,
        }  # fmt: skip
        task.batch = transfusion.SEQUENCES * task.objective.pack
        config.optimizer.update(CHAMELEON)
    if not dense:
        config.model.per_modality = {"parts": ["norm"], "modalities": modalities(tasks)}
    return config


def get_config(setting: Setting) -> ConfigDict:
    """Return the config of a setting."""
    config = recipe(setting.tasks, setting.dense)
    if setting.size == "small":
        make_small(config)
        config.model.layers = layers(setting.tasks, setting.dense, 4, 4, 344)
    return config


def make_small(config: ConfigDict) -> ConfigDict:
    """Set the numbers of `small` but for its layers, of any recipe of these tasks."""
    transfusion.make_small(config)
    config.steps = 300
    config.tasks.captions.batch = 32
    if "colours" in config.modalities:
        config.modalities.colours.levels = 8
        config.tasks.captions.inputs.colours.size = 8
    return config
