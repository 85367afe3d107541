"""Mixture-of-Transformers (Liang et al. 2024) at the paper's size: the parameters of 7 billion for each modality.

    python -m mmjax.datasets.build emoji
    python -m mmjax.train --config=configs/mot_7b.py --workdir=runs/mot_7b

Every parameter of the trunk, norms among them, has a copy for text and one for images; attention is over all tokens,
and a token meets as many parameters as in the dense model. `mot_7b.py:chameleon` (the default) learns both by the next
token, an image being 1,024 discrete ones, in the block of Chameleon's 7 billion: norms before its parts, layer norms of
queries and keys, rotary embeddings and no other positions. `mot_7b.py:transfusion` is `transfusion_7b.py` so untied,
with linear adapters. `mot_7b.py:chameleon-dense` and `:transfusion-dense` are the same without copies.

What differs, or is ours:

- The authors' simplified code has norms behind its parts (as Chameleon's 34 billion) and root mean squares of queries
  and keys; here both settings have the block of the dense model that they are compared with.
- The rate of `chameleon` falls linearly to 1 %, as MoMa's; Chameleon's falls exponentially.
- Images are 32 pixels a side of 8,000 colours; theirs are 8,192 codes of a learned tokenizer. Texts and colours have a
  table and a head each (32,000 and 8,000); theirs share one of 65,536.
- Batch and steps are ours. There is no dropout (Chameleon's 7 billion: 0.1).
- Missing: speech as a third modality; experts in one modality's MLP beside a dense one.
- What `transfusion_7b.py` says of its own images, time and data holds for `transfusion`.

Data are the drawings and names that the data sets here hold. For your own, set `tasks.captions.source` and
`tasks.captions.evaluators.*.source` (records with `image`, an encoded picture, and `caption`), and
`modalities.text.tokenizer` with its number of pieces in `modalities.text.vocabulary`.

Hardware: 256 chips of TPU v5p, by the plan in `plans/`. Results: none, it has not been trained here; see
`mot_small.py`, the same recipe with smaller numbers.
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mmjax.blocks.transformer import PARTS
from mmjax.core.config import load_module
from mmjax.core.errors import UserError, nearest

transfusion = load_module(Path(__file__).with_name("transfusion_7b.py"))

# Sequences of 4,288 positions: 4 images of 1,025, whose captions share 188.
CHAMELEON_PACKING = {"pack": 4, "capacity": {"text": 188}, "window": 64}
# MoMa's rate (Lin et al. 2024) and Chameleon's eps.
CHAMELEON = {"learning_rate": 1e-4, "decay": "linear", "final": 0.01, "eps": 1e-5}
SETTINGS = ("chameleon", "chameleon-dense", "transfusion", "transfusion-dense")


def layers(setting: str, repeat: int, heads: int, hidden: int) -> list[dict[str, Any]]:
    """Return the block of a setting, `PARTS` by modality unless it is dense."""
    block: dict[str, Any] = {"qk_norm": "layer", "order": "pre"} if "chameleon" in setting else {}
    if "dense" not in setting:
        parts = [part for part in PARTS if part != "qk_norm" or block]
        block |= {"untie": parts, "modalities": modalities(setting)}
    return transfusion.layers(repeat, heads, hidden, **block)


def modalities(setting: str) -> list[str]:
    return ["text", "colours" if "chameleon" in setting else "image"]


def untied(config: ConfigDict, setting: str) -> ConfigDict:
    """Set the tasks and the rate of a setting, and the last norm of each modality."""
    if setting not in SETTINGS:
        raise UserError(f"There is no setting '{setting}'.{nearest(setting, SETTINGS)}")
    task = config.tasks.captions
    task.objective.channels = 0
    if "chameleon" in setting:
        del config.modalities["image"]
        config.modalities.colours = {"name": "colours", "levels": 20, "positions": "none"}
        task.inputs = {
            "text": {"field": "caption", "length": 1022},
            "colours": {"size": 32, "crop": 0.7},
        }
        task.objective = {
            "name": "transfusion", "order": ["text", "colours"], "discrete": ["text", "colours"],
            "drop": 0.1, "swap": 0.2, **CHAMELEON_PACKING,
        }  # fmt: skip
        task.batch = transfusion.SEQUENCES * task.objective.pack
        config.optimizer.update(CHAMELEON)
    if "dense" not in setting:
        config.model.norm_modalities = modalities(setting)
    return config


def get_config(setting: str = "chameleon") -> ConfigDict:
    """The config; `setting` is one of `SETTINGS`."""
    config = untied(transfusion.get_config(), setting)
    config.model.groups = layers(setting, 32, 32, 11_008)
    return config
