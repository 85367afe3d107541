"""CoCa: Yu et al. (2022), and open_clip's."""

from __future__ import annotations

from published.rows import PLAIN, Recipe, Row, missing, ours, same

COCA = {  # width, heads; layers and MLP of the encoder, and of each half of the decoder
    "base": (768, 12, 12, 3072, 12, 3072), "large": (1024, 16, 24, 4096, 12, 4096),
    "2b": (1408, 16, 40, 6144, 18, 5632),
}  # fmt: skip
TABLE_1, SECTION = "[P] Yu et al. 2022, table 1", "[P] Yu et al. 2022, section 4.1"
OPEN_CLIP = "[C] open_clip/src/open_clip/transformer.py"


def coca(size: str) -> Recipe:
    width, heads, encoder, encoder_mlp, decoder, decoder_mlp = COCA[size]
    objective = "tasks.captions.objective."
    block = {"bias": True, "attention_bias": True, "qk_norm": False, "eps": 1e-5}
    rows = same(TABLE_1, {
        "model.width": width, "layers.count": encoder, "layers.heads": heads, "layers.hidden": encoder_mlp,
        "layers.name": "transformer", "layers.mlp": "gelu", "layers.order": "pre", "layers.norm": "layer",
        "layers.rotary": 0.0, "layers.experts": (), "layers.untie": (), "model.norm": "layer",
        f"{objective}pooler_heads": heads, f"{objective}joint": width,
    })  # fmt: skip
    for half, name in (("unimodal", "transformer"), ("multimodal", "cross_transformer")):
        sizes = {"name": name, "count": decoder, "heads": heads, "hidden": decoder_mlp}
        rows += same(TABLE_1, sizes, f"{objective}{half}.") + same(
            OPEN_CLIP, block, f"{objective}{half}."
        )
    rows += same(OPEN_CLIP, block, "layers.") + same(OPEN_CLIP, {
        "model.norm_eps": 1e-5, f"{objective}norm_eps": 1e-5, f"{objective}multimodal.context_norm": True,
        f"{objective}pooler_bias": True, f"{objective}pooler_norms": True, f"{objective}temperature": 0.07,
        "modalities.image.positions": "table", "modalities.text.positions": "table",
    })  # fmt: skip
    rows += same(SECTION, {
        "steps": 500_000, "tasks.captions.batch": 65_536, "tasks.captions.inputs.image.size": 288,
        "modalities.image.patch": 18, "modalities.image.buckets": 16, "modalities.text.vocabulary": 64_000,
        "optimizer.learning_rate": 8e-4, "optimizer.warmup": 10_000, "optimizer.decay": "linear",
        "optimizer.final": 0.0, "optimizer.b1": 0.9, "optimizer.b2": 0.999, "optimizer.weight_decay": 0.01,
        f"{objective}name": "coca", f"{objective}between": ("image", "text"), f"{objective}queries": 256,
        f"{objective}pooling": "cascade", f"{objective}contrastive_weight": 1.0, f"{objective}caption_weight": 2.0,
        f"{objective}form": "softmax", **PLAIN,
    })  # fmt: skip
    rows.append(
        Row(
            "optimizer.name",
            "muon",
            "adafactor",
            SECTION,
            "Adafactor here has no momentum",
            "The optimizer is Muon",
        )
    )
    rows += ours("memory", "first moments in bfloat16", {"optimizer.moments_dtype": "bfloat16"})
    rows += ours("not said in the paper", "The 64 tokens of a text and the crop are ours", {
        "tasks.captions.inputs.text.length": 64, "modalities.text.buckets": 64,
        "tasks.captions.inputs.image.crop": 0.7, "optimizer.clip": 1.0, "dtype.compute": "bfloat16",
    })  # fmt: skip
    rows += missing(
        SECTION, "JFT-3B's labels as texts", "the last epoch at 576 pixels", "beam search and top-p", "CIDEr and BLEU",
        "zero-shot classification, and retrieval of videos", "open_clip's has two",
    )  # fmt: skip
    return Recipe(f"coca:{size}", ("coca",), tuple(rows))
