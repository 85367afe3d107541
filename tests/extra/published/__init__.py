"""The table of published values: all recipes of `configs/` at a system's own size, by setting."""

from __future__ import annotations

from published.coca import COCA, coca
from published.fusion import mbt, zorro
from published.imp import IMP, imp
from published.limoe import LIMOE, limoe
from published.rows import Recipe
from published.sequences import mixture_of_mamba, moma, mot, transfusion
from published.towers import CLIPS, SIGLIPS, clip, lit, siglip

BOTH = (False, True)
RECIPES: tuple[Recipe, ...] = (
    *(imp(size, sparse, False) for size in IMP for sparse in BOTH),
    *(imp("b", sparse, True) for sparse in BOTH),
    *(
        limoe(size, losses)
        for size in LIMOE
        for losses in ("entropies", "classic", "none", "dense")
    ),
    *(coca(size) for size in COCA),
    *(clip(size) for size in CLIPS),
    *(siglip(size) for size in SIGLIPS),
    lit(),
    mbt(),
    zorro(),
    *(transfusion(alternating) for alternating in BOTH),
    *(mot(chameleon, dense) for chameleon in BOTH for dense in BOTH),
    *(moma(experts) for experts in ("experts", "one", "mixed", "dense")),
    *(mixture_of_mamba(chameleon, dense) for chameleon in BOTH for dense in BOTH),
)
