"""The table of published values: all recipes of `configs/` at a system's own size, by setting."""

from __future__ import annotations

from published.coca import COCA, coca
from published.fusion import mbt, zorro
from published.imp import IMP, imp
from published.limoe import LIMOE, limoe
from published.rows import Recipe
from published.sequences import mixture_of_mamba, moma, mot, transfusion

MOT_SETTINGS = ("chameleon", "chameleon-dense", "transfusion", "transfusion-dense")
RECIPES: tuple[Recipe, ...] = (
    *(imp(size, sparse, "released") for size in IMP for sparse in (False, True)),
    *(imp("b", sparse, "mixed") for sparse in (False, True)),
    *(
        limoe(size, setting)
        for size in LIMOE
        for setting in ("entropies", "classic", "none", "dense")
    ),
    *(coca(size) for size in COCA),
    mbt(),
    zorro(),
    *(transfusion(setting) for setting in ("transfusion", "alternating")),
    *(mot(setting) for setting in MOT_SETTINGS),
    *(moma(setting) for setting in ("experts", "one", "mixed", "dense")),
    *(mixture_of_mamba(setting) for setting in MOT_SETTINGS),
)
