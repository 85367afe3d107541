"""Transfusion, Mixture-of-Transformers, MoMa and Mixture-of-Mamba, which read texts and images as one sequence."""

from __future__ import annotations

from typing import Any

from published.rows import ADAMW, Recipe, Row, missing, ours, same, setting

LLAMA = "[C] llama/model.py of Llama 2; [P] Touvron et al. 2023"
ZHOU = "[P] Zhou et al. 2024"
LLAMA_BLOCK = {
    "layers.name": "transformer", "layers.bias": False, "layers.attention_bias": False, "layers.norm": "rms",
    "layers.mlp": "swiglu", "layers.rotary": 10_000.0, "layers.eps": 1e-5, "model.norm": "rms", "model.norm_eps": 1e-5,
}  # fmt: skip
SEVEN_BILLION = {
    "model.width": 4096,
    "layers.count": 32,
    "layers.num_heads": 32,
    "layers.mlp_dim": 11_008,
}
ADAM_OF_LLAMA = {
    **ADAMW,
    "optimizer.algorithm.b1": 0.9,
    "optimizer.algorithm.b2": 0.95,
    "optimizer.weight_decay": 0.1,
    "optimizer.clip": 1.0,
}
NO_POSITIONS = {"modalities.text.positions": "none", "modalities.image.positions": "none"}


def sequences(task: str, order: tuple[str, ...], drawn: bool) -> list[Row]:
    """Return the rows of one task of texts and images."""
    at = f"tasks.{task}."
    pack, slots = (14, 512) if drawn else (128, 3456)
    rows = same(
        f"{ZHOU}, section 4.4: 4 million tokens",
        {"batch": 1024 * pack, "objective.name": "transfusion", "objective.modalities": order},
        at,
    )
    rows += same(f"{ZHOU}, section 4.4", {"objective.attend_across_items": False, "weight": 1}, at)
    rows += ours(
        "captions have 25 tokens here",
        "14 captioned images that do not see each other and whose captions share 512"
        if drawn
        else "sequences of captions alone hold 128 in 3,456",
        {
            "objective.pack": pack,
            "objective.capacity": {"text": slots},
            "objective.window": 4 * pack if drawn else 1024,
        },
        at,
    )
    rows += ours(
        "a fixed place for a text", "A text has up to 255 tokens", {"inputs.text.length": 255}, at
    )
    if drawn:
        rows += same(f"{ZHOU}, sections 3 and 4", {
            "objective.weight": 5.0, "objective.prediction": "epsilon", "objective.condition_dropout": 0.1,
            "objective.sampling_steps": 250,
            "objective.guidance": 5.0, "objective.discrete": ("text",), "inputs.image.size": 256,
            "objective.bidirectional_spans": False,
        }, at)  # fmt: skip
        rows += ours(
            "not stated", "Images are pixels in patches of 16", {"inputs.image.crop": 0.7}, at
        )
    return rows


def transfusion_rate() -> list[Row]:
    return same(f"{ZHOU}, section 4.1 [K]", {
        "steps": 500_000, **ADAM_OF_LLAMA, "optimizer.learning_rate": 3e-4, "optimizer.warmup": 4000,
        "optimizer.decay": "cosine", "optimizer.end_lr_ratio": 0.05, "optimizer.algorithm.eps": 1e-8,
    }) + ours("not stated", "4 million tokens to a batch", {"dtype.compute": "bfloat16"})  # fmt: skip


def transfusion_images() -> list[Row]:
    """Return how images and texts come into a model that draws, and what is missing there."""
    rows = same(LLAMA, {"modalities.text.vocabulary": 32_000, **NO_POSITIONS})
    rows.append(
        Row(
            "modalities.image.patch",
            16,
            2,
            f"{ZHOU}: of latents",
            "no autoencoder",
            "theirs are latents of an autoencoder",
        )
    )
    return rows + missing(
        ZHOU, "drawn by ancestral sampling", "(BOI, EOI)", "text alone, which is half of their data"
    )


def transfusion(alternating: bool) -> Recipe:
    rows = same(LLAMA, {
        **LLAMA_BLOCK, **SEVEN_BILLION, "layers.qk_norm": False, "layers.norm_position": "pre",
        "layers.per_modality.parts": (),
        "layers.experts": (), "model.per_modality.modalities": (),
    })  # fmt: skip
    rows += transfusion_rate() + transfusion_images()
    adapters = {"objective.unet_channels": 128}
    words = "through U-Net adapters"
    if not alternating:
        rows += sequences("captions", ("text", "image"), True)
        rows += same(
            f"{ZHOU}, section 4.2",
            {"reverse_prob": 0.2, "max_time": 0.5},
            "tasks.captions.objective.",
        )
        rows += ours("from pixels", words, adapters, "tasks.captions.")
        return Recipe("transfusion:7b", ("transfusion",), tuple(rows))
    alternates = "alternates two tasks on the same trunk"
    rows += sequences("write", ("text",), False) + sequences("draw", ("text", "image"), True)
    rows += ours("from pixels", words, adapters, "tasks.draw.")
    rows += ours("after MonoFormer", alternates, {
        "tasks.draw.objective.weights": {"text": 0.0}, "tasks.draw.objective.reverse_prob": 0.0,
    })  # fmt: skip
    rows += missing(
        "[C] MonoFormer, train.py",
        "is another\nmodel: 1.1 billion started from TinyLlama",
        "text loss 0.01",
    )
    return Recipe("transfusion:7b-alternating", ("transfusion",), tuple(rows))


MOT = "[C] Mixture-of-Transformers/src; [P] Liang et al. 2024"
CHAMELEON = "[C] chameleon/inference/transformer.py; [K] Chameleon 2024"
MOMA = "[P] Lin et al. 2024"
ALL_PARTS = ("query", "key", "value", "out", "attention_norm", "mlp_norm", "mlp")


def chameleon_rows(moma: bool) -> list[Row]:
    """Return the rows of images as discrete tokens, and of the rate that goes with them."""
    rows = same(f"{MOMA}; betas, eps, decay of weights, bound: {CHAMELEON}", {
        **ADAM_OF_LLAMA, "optimizer.learning_rate": 1e-4, "optimizer.warmup": 4000, "optimizer.algorithm.eps": 1e-5,
    })  # fmt: skip
    falls = "falling linearly to 1 %" if moma else "falls linearly to 1 %"
    rows += [
        Row(
            "optimizer.decay",
            "linear",
            "linear" if moma else "exponential",
            MOMA if moma else CHAMELEON,
            "as MoMa",
            falls,
        ),
        Row(
            "optimizer.end_lr_ratio",
            0.01,
            0.01 if moma else 0.0,
            MOMA if moma else CHAMELEON,
            "as MoMa",
            falls,
        ),
        Row(
            "modalities.colours.levels",
            20,
            None,
            CHAMELEON,
            "no image tokenizer: 8,000 colours for 8,192 codes",
            "8,000 colours",
        ),
    ]
    rows += same(
        f"{MOMA}: 1,024 tokens",
        {
            "inputs.colours.size": 32,
            "objective.name": "transfusion",
            "objective.modalities": ("text", "colours"),
            "objective.discrete": ("text", "colours"),
            "objective.attend_across_items": False,
            "weight": 1,
        },
        "tasks.captions.",
    )
    rows += same(
        LLAMA, {"modalities.text.positions": "none", "modalities.colours.positions": "none"}
    )
    return rows + ours("four images to 4,288 positions", "Batch and steps are ours", {
        "steps": 250_000 if moma else 500_000, "tasks.captions.batch": 4096, "tasks.captions.objective.pack": 4,
        "tasks.captions.objective.capacity": {"text": 188}, "tasks.captions.objective.window": 64,
        "tasks.captions.inputs.text.length": 1022, "tasks.captions.objective.unet_channels": 0,
        "tasks.captions.objective.condition_dropout": 0.1, "tasks.captions.objective.reverse_prob": 0.2,
        "tasks.captions.inputs.colours.crop": 0.7, "dtype.compute": "bfloat16",
    })  # fmt: skip


def mot_tasks(chameleon: bool) -> list[Row]:
    if chameleon:
        return chameleon_rows(False) + two_heads("a head each (32,000 and 8,000)", 32_000)
    rows = (
        transfusion_rate() + transfusion_images() + sequences("captions", ("text", "image"), True)
    )
    rows += same(
        f"{ZHOU}, section 4.2", {"reverse_prob": 0.2, "max_time": 0.5}, "tasks.captions.objective."
    )
    return rows + same(MOT, {"tasks.captions.objective.unet_channels": 0})


def two_heads(words: str, vocabulary: int) -> list[Row]:
    return [
        Row("modalities.text.vocabulary", vocabulary, 65_536, CHAMELEON, "codes are apart", words)
    ]


def mot(chameleon: bool, dense: bool) -> Recipe:
    names = ("text", "colours" if chameleon else "image")
    name = setting("mot:7b", "" if chameleon else "transfusion", "dense" if dense else "")
    rows = same(LLAMA, {**LLAMA_BLOCK, **SEVEN_BILLION, "layers.experts": ()}) + mot_tasks(
        chameleon
    )
    parts = ALL_PARTS[:4] + (("qk_norm",) if chameleon else ()) + ALL_PARTS[4:]
    copies: dict[str, Any] = {
        "layers.per_modality.parts": parts,
        "layers.per_modality.modalities": names,
        "model.per_modality.modalities": names,
        "model.per_modality.parts": ("norm",),
    }
    rows += same(MOT, dict.fromkeys(copies, ()) if dense else copies)
    if not chameleon:
        rows += same(LLAMA, {"layers.qk_norm": False, "layers.norm_position": "pre"})
        return Recipe(name, ("mot", "transfusion"), tuple(rows))
    said = "norms behind its parts"
    rows += [
        Row(
            "layers.norm_position",
            "pre",
            "pre" if dense else "post",
            CHAMELEON if dense else MOT,
            "the dense model's block",
            said,
        ),
        Row(
            "layers.qk_norm",
            "layer",
            "layer" if dense else "rms",
            CHAMELEON if dense else MOT,
            "the dense model's block",
            said,
        ),
    ]
    rows += missing(
        f"{MOT}; {CHAMELEON}", "speech as a third modality", "beside a dense one", "no dropout"
    )
    return Recipe(name, ("mot", "transfusion"), tuple(rows))


def moma(experts: str) -> Recipe:
    rows = chameleon_rows(True) + two_heads("a head each (57,344 and 8,000)", 57_344) + same(MOMA, {
        **LLAMA_BLOCK, "model.width": 2048, "layers.count": 24, "layers.num_heads": 16, "layers.mlp_dim": 5632,
        "layers.norm_position": "post", "model.per_modality.modalities": (),
    }) + same(CHAMELEON, {"layers.qk_norm": "layer"})  # fmt: skip
    own = experts in ("experts", "one")
    rows += same(
        MOMA,
        {
            "layers.per_modality.parts": ("mlp",),
            "layers.per_modality.modalities": ("text", "colours"),
        }
        if own
        else {"layers.per_modality.parts": ()},
    )
    if experts == "dense":
        rows += same(MOMA, {"layers.experts": ()})
    else:
        rows += same(MOMA, {
            "layers.experts": tuple(range(24)), "layers.experts.count": {"experts": 4, "one": 1, "mixed": 8}[experts],
            "layers.experts.router.name": "expert_choice", "layers.experts.router.score": "sigmoid",
            "layers.experts.router.capacity": 1.0, "layers.experts.losses": {}, "layers.experts.local_entropy": {},
            "layers.experts.global_entropy": {}, "layers.experts.causal.mlp_dim": 1024,
        })  # fmt: skip
        rows += ours("a sort of a batch compiles for minutes", "Tokens compete with those of their sequence", {
            "layers.experts.group_size": 2048, "layers.experts.min_groups": 256,
        })  # fmt: skip
    rows += missing(
        MOMA,
        "has biases; the paper's is trained afterwards",
        "upcycling from `one` with Gumbel noise",
        "mixture of depths",
    )
    name = setting("moma:1b", "" if experts == "experts" else experts)
    return Recipe(name, ("moma",), tuple(rows))


MAMBA = "[C] state-spaces/mamba, mamba-1.4b; [P] Gu and Dao 2023"


def mixture_of_mamba(chameleon: bool, dense: bool) -> Recipe:
    names = ("text", "colours" if chameleon else "image")
    quarter = {"tasks.captions.batch": (1024 if chameleon else 3584)}
    rows = [row for row in mot_tasks(chameleon) if row.key not in quarter]
    rows += ours("a quarter of mot's", "with a quarter of its batch", quarter)
    rows += same(MAMBA, {
        "model.width": 2048, "layers.count": 48, "layers.name": "mamba", "layers.state": 16, "layers.expand": 2,
        "layers.taps": 4, "layers.rank": None, "layers.norm": "rms", "layers.eps": 1e-5, "layers.depth": 48,
        "model.norm": "rms", "model.norm_eps": 1e-5, "model.per_modality.modalities": (), "layers.experts": (),
    })  # fmt: skip
    copies: dict[str, Any] = {
        "layers.per_modality.parts": ("in", "x", "dt", "out"),
        "layers.per_modality.modalities": names,
    }
    source = "[C] Mixture-of-Mamba/MixtureOfMamba.py"
    rows += same(source, dict.fromkeys(copies, ()) if dense else copies)
    rows += missing("[P] Liang et al. 2025", "the paper's setting with speech")
    name = setting(
        "mixture_of_mamba:1b", "chameleon" if chameleon else "", "dense" if dense else ""
    )
    return Recipe(name, ("mixture_of_mamba", "mot", "transfusion"), tuple(rows))
