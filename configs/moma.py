"""MoMa (Lin et al. 2024): texts and images as one sequence, with experts of their own for each of the two.

    mmjax build emoji
    mmjax train --config=moma:1b --workdir=runs/moma-1b
    mmjax train --config=moma:small --workdir=runs/moma-small

Settings: `1b` is of the paper's size, `small` the same recipe with smaller numbers; each also with `-one`, `-mixed` and
`-dense`.

`mot.py:7b` with 24 layers of width 2,048 and norms behind their parts, in which only the MLPs have copies: four experts
for texts and four for images, which choose their tokens by a sigmoid (each a quarter of its modality's; no loss
balances them). Such a choice depends on later tokens; so a second router with a hidden layer of 1,024 learns beside,
from a token alone, which experts took it, and generation goes by that. The rate is the paper's, 1e-4 after a warm-up of
4,000 steps, falling linearly to 1 %. `1b-one` has one expert for each modality, `1b-mixed` eight for both, `1b-dense`
none.

The paper calls the model one of 1.4 billion. Ours has 1.23 in what a token meets of the trunk, and a table of 65,344
pieces and codes with 0.13: 1.37; as what comes out has a table of its own, 1.50 in all. The hidden layer of 5,632 is
the paper's 8,192 by Chameleon's rule of two thirds.

What differs, or is ours:

- Tokens compete with those of their sequence and modality; the paper's with those of a batch (over more than 2,048 of
  them, the TPU's compiler takes minutes to sort).
- The second router learns along with the model and has biases; the paper's is trained afterwards, without them.
- Images are 32 pixels a side of 8,000 colours; theirs are 1,024 of 8,192 codes of a learned tokenizer. Texts and
  colours have a table and a head each (57,344 and 8,000); theirs share one of 65,536.
- Batch and steps are ours (1 trillion tokens); betas, weight decay and bound of the gradient are Chameleon's.
- Missing: upcycling from `one` with Gumbel noise, and mixture of depths.

Data are the drawings and names that the data sets here hold. For your own, set `tasks.captions.source` and
`tasks.captions.evaluators.*.source` (records with `image`, an encoded picture, and `caption`), and
`modalities.text.tokenizer` with its number of pieces in `modalities.text.vocabulary`.

Hardware: 256 chips of TPU v5e or 128 of v5p, by the plans in `plans/`; `small`: a CPU with 2 cores. Results: none yet.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from mmjax.core.config import load_module

mot = load_module(Path(__file__).with_name("mot.py"))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A size of MoMa and its experts.

    Attributes:
      size: size of the model; `small` has smaller pictures and shorter texts too.
      experts: four of each modality, one of each, eight for both, or none.
    """

    size: Literal["1b", "small"]
    experts: Literal["experts", "one", "mixed", "dense"] = "experts"


def layers(experts: str, repeat: int, heads: int, hidden: int) -> list[dict[str, Any]]:
    """Return Chameleon's block with its norms behind their parts, and its experts."""
    groups: list[dict[str, Any]] = mot.layers("chameleon", True, repeat, heads, hidden)
    (block,) = groups[0]["blocks"]
    block["norm_position"] = "post"
    if experts != "dense":
        block["experts"] = {
            "count": {"experts": 4, "one": 1, "mixed": 8}[experts],
            "router": {"name": "expert_choice", "score": "sigmoid", "capacity": 1.0},
            "group_size": 2048,
            "min_groups": 256,
            "causal": {"mlp_dim": 1024},
        }
    if experts in ("experts", "one"):
        block |= {"per_modality": {"parts": ["mlp"], "modalities": mot.modalities("chameleon")}}
    return groups


def get_config(setting: Setting) -> ConfigDict:
    """Return the config of a setting."""
    config: ConfigDict = mot.recipe("chameleon", dense=True)
    config.steps = 250_000
    config.modalities.text.vocabulary = 57_344  # beside the codes
    config.model.update({"width": 2048, "layers": layers(setting.experts, 24, 16, 5632)})
    if setting.experts in ("experts", "mixed"):
        config.mesh.expert = 4
    if setting.size == "small":
        make_small(config, layers(setting.experts, 4, 4, 344))
    return config


def make_small(config: ConfigDict, groups: list[dict[str, Any]]) -> None:
    """Set the numbers of `small`, with its layers."""
    mot.make_small(config)
    for experts in (b["experts"] for g in groups for b in g["blocks"] if "experts" in b):
        experts.update({"group_size": 1024, "min_groups": 1, "causal": {"mlp_dim": 64}})
    config.model.layers = groups
    config.mesh = {"data": 1, "fsdp": -1}
