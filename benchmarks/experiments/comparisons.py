"""Comparisons of `mechanisms.py`: systems with their mechanism and without it, and the claims of IMP and LIMoE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mmjax.core import flags
from mmjax.core.config import Block


@dataclass(frozen=True)
class Variant:
    """One side of a comparison: a config, with its argument, and overrides."""

    config: str
    overrides: tuple[str, ...] = ()

    def block(self, more: Sequence[str] = ()) -> Block:
        return flags.read_config(self.config, [*self.overrides, *more])


@dataclass(frozen=True)
class Comparison:
    """Variants by their label: the first is the system, the others lack what is asked about.

    Attributes:
      asks: the question.
      variants: what is compared.
      measures: which records of `results.json` are shown, by the beginnings of their names; all if empty.
      without: tasks whose measures are excluded.
      parts: parts of the training loss whose course is shown.
      folder: of its runs, its own name if empty: comparisons of one folder have the runs of a label in common.
      routed: whether it is shown how many experts each layer uses for each modality in the end.
    """

    asks: str
    variants: Mapping[str, Variant]
    measures: tuple[str, ...] = field(default=())
    without: tuple[str, ...] = field(default=())
    parts: tuple[str, ...] = field(default=())
    folder: str = ""
    routed: bool = False


def _two(config: str, label: str, plain: str) -> dict[str, Variant]:
    path = f"configs/{config}"
    return {label: Variant(path), plain: Variant(f"{path}-dense")}


def _coca(*overrides: str) -> Variant:
    """Return a fifth of the recipe's steps."""
    return Variant("configs/coca.py:small", ("steps=250", "checkpoint.every=250", *overrides))


# CLIP's small recipe with one trunk for both modalities: the layers of its pictures' tower, where texts see all tokens.
_BLOCK = {
    "name": "transformer", "num_heads": 4, "mlp_dim": 512, "mlp": "quick_gelu", "bias": True, "attention_bias": True,
    "eps": 1e-5,
}  # fmt: skip
_TRUNK = {"width": 128, "layers": [{"repeat": 4, "blocks": [_BLOCK]}], "norm_eps": 1e-5}
SHARED = (
    f"model.towers={ {'trunk': _TRUNK}!r}",
    "modalities.image.tower=trunk",
    "modalities.text.tower=trunk",
)

SYSTEMS = {
    "clip": Comparison(
        "CLIP's two towers of different widths against one trunk for both modalities.",
        {
            "two towers": Variant("configs/clip.py:small"),
            "shared trunk": Variant("configs/clip.py:small", SHARED),
        },
    ),
    "mot_discrete": Comparison(
        "Mixture-of-Transformers against one set of parameters, both modalities by the next token.",
        _two("mot.py:small", "by modality", "dense"),
        ("held-out loss ",),
        ("text", "colours"),
    ),
    "mot_diffusion": Comparison(
        "Mixture-of-Transformers against one set of parameters, text by the next token and pictures by diffusion.",
        _two("mot.py:small-transfusion", "by modality", "dense"),
        ("held-out loss ",),
        ("text", "image"),
    ),
    "mixture_of_mamba": Comparison(
        "Mixture-of-Mamba against Mamba, text by the next token and pictures by diffusion.",
        _two("mixture_of_mamba.py:small", "by modality", "plain"),
        ("held-out loss ",),
        ("text", "image"),
    ),
    "zorro": Comparison(
        "Zorro's mask against full fusion, with each modality alone and with both.",
        {
            "zorro": Variant("configs/zorro.py:small"),
            "full fusion": Variant("configs/zorro.py:small", ("tasks.sounds.objective.mask=full",)),
        },
    ),
    "coca": Comparison(
        "CoCa's two losses against each alone.",
        {
            "both": _coca(),
            "contrastive": _coca("tasks.captions.objective.caption_weight=0.0"),
            "captioning": _coca("tasks.captions.objective.contrastive_weight=0.0"),
        },
    ),
}

# IMP's claims, all against one baseline: `imp.py:small`, whose every period of the schedule is 12 steps; by Muon, with
# which so short a run comes further than with AdamW.
PERIOD = 12
STEPS = 30 * PERIOD
VISITS = {  # of the tasks in a period
    "image_text": 4, "images": 2, "video_text": 2, "videos": 1, "video_audio_text": 2, "sounds": 1,
}  # fmt: skip


def _imp(setting: str, *overrides: str) -> Variant:
    return Variant(f"configs/imp.py:{setting}", (*_short(STEPS), *overrides))


def _short(steps: int) -> tuple[str, ...]:
    return (
        f"steps={steps}", f"checkpoint.every={steps}", "log.report=False", "optimizer.algorithm.name=muon",
        "optimizer.weight_decay=0.1",
    )  # fmt: skip


def _against_imp(asks: str, routed: bool = False, **others: Variant) -> Comparison:
    """Return a comparison. Labels are the names of the arguments, with spaces."""
    labelled = {label.replace("_", " "): variant for label, variant in others.items()}
    return Comparison(
        asks,
        {"imp": _imp("small"), **labelled},
        # What it measures `video_text` measures again: vectors of clips and of texts from the same head.
        without=("video_audio_text",),
        folder="imp",
        routed=routed,
    )


def _shares(rule: str, shares: Mapping[str, int]) -> Variant:
    words = [
        f"tasks.{task}.{key}" for task, n in shares.items() for key in (f"weight={n}", "interval=1")
    ]
    return _imp("small", f"schedule.rule={rule}", *words)


def _limoe(losses: str) -> Variant:
    return Variant(f"configs/limoe.py:small{losses}", _short(300))


IMP = {
    "imp_alternating": _against_imp(
        "One task's gradient at each step, against one update by the gradients of a whole period, summed.",
        summed=_imp("small", f"optimizer.accumulate={PERIOD}"),
        summed_twice_the_rate=_imp(
            "small", f"optimizer.accumulate={PERIOD}", "optimizer.learning_rate=4e-3"
        ),
    ),
    "imp_resolutions": _against_imp(
        "Videos in one shape, against three shapes of as many tokens.", mixed=_imp("small-mixed")
    ),
    "imp_experts": _against_imp(
        "A dense encoder, against four experts in its last two layers.",
        routed=True,
        experts=_imp("moe-small"),
    ),
    "imp_encoder": _against_imp(
        "One encoder that modalities share, against one for each, of the same size.",
        apart=_imp("small-apart"),
    ),
    "imp_schedule": _against_imp(
        "Intervals as released, against as many visits spread evenly (shares), and equal time for each task (budget).",
        shares=_shares("shares", VISITS),
        budget=_shares("budget", dict.fromkeys(VISITS, 1)),
    ),
    "limoe_losses": Comparison(
        "LIMoE's entropy losses beside the classic ones, against these alone, no such loss, and no experts.",
        {
            "entropies": _limoe(""),
            **{losses: _limoe(f"-{losses}") for losses in ("classic", "none", "dense")},
        },
        routed=True,
    ),
}
SUITES: Mapping[str, Mapping[str, Comparison]] = {"systems": SYSTEMS, "imp": IMP}
COMPARISONS = {**SYSTEMS, **IMP}


def chosen(only: Sequence[str]) -> list[str]:
    """Return names of comparisons, by their own or their suite's; all if there is none.

    Raises:
      KeyError: a name that is neither.
    """
    found = [list(SUITES[name]) if name in SUITES else [name] for name in only]
    return list(dict.fromkeys(sum(found, []))) or list(COMPARISONS)
