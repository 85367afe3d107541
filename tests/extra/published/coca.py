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
        "model.width": width, "layers.count": encoder, "layers.num_heads": heads, "layers.mlp_dim": encoder_mlp,
        "layers.name": "transformer", "layers.mlp": "gelu", "layers.norm_position": "pre", "layers.norm": "layer",
        "layers.rotary": 0.0, "layers.experts": (), "layers.per_modality.parts": (), "model.norm": "layer",
        f"{objective}pooler_heads": heads, f"{objective}embed_dim": width,
    })  # fmt: skip
    for half, name in (("unimodal", "transformer"), ("multimodal", "cross_transformer")):
        sizes = {"name": name, "count": decoder, "num_heads": heads, "mlp_dim": decoder_mlp}
        rows += same(TABLE_1, sizes, f"{objective}{half}.") + same(
            OPEN_CLIP, block, f"{objective}{half}."
        )
    rows += same(OPEN_CLIP, block, "layers.") + same(OPEN_CLIP, {
        "model.norm_eps": 1e-5, f"{objective}norm_eps": 1e-5, f"{objective}multimodal.context_norm": True,
        f"{objective}pooler_bias": True, f"{objective}pooler_norms": True, f"{objective}init_temperature": 0.07,
        "modalities.image.positions": "table", "modalities.text.positions": "table",
    })  # fmt: skip
    rows += same(SECTION, {
        "steps": 500_000, "tasks.captions.batch": 65_536, "tasks.captions.inputs.image.size": 288,
        "modalities.image.patch": 18, "modalities.image.max_positions": 16, "modalities.text.vocabulary": 64_000,
        "optimizer.learning_rate": 8e-4, "optimizer.warmup": 10_000, "optimizer.decay": "linear",
        "optimizer.end_lr_ratio": 0.0, "optimizer.weight_decay": 0.01,
        "optimizer.algorithm.b1": 0.9, "optimizer.algorithm.b2": 0.999,
        f"{objective}name": "coca", f"{objective}modalities": ("image", "text"), f"{objective}queries": 256,
        f"{objective}pooling": "cascade", f"{objective}contrastive_weight": 1.0, f"{objective}caption_weight": 2.0,
        f"{objective}loss": "softmax", **PLAIN,
    })  # fmt: skip
    rows.append(
        Row(
            "optimizer.algorithm.name",
            "muon",
            "adafactor",
            SECTION,
            "Adafactor here has no momentum",
            "The optimizer is Muon",
        )
    )
    rows += ours(
        "memory", "first moments in bfloat16", {"optimizer.algorithm.moments_dtype": "bfloat16"}
    )
    rows += ours("not stated in the paper", "The 64 tokens of a text and the crop are ours", {
        "tasks.captions.inputs.text.length": 64, "modalities.text.max_positions": 64,
        "tasks.captions.inputs.image.crop": 0.7, "optimizer.clip": 1.0, "dtype.compute": "bfloat16",
    })  # fmt: skip
    rows += missing(
        SECTION, "JFT-3B's labels as texts", "the last epoch at 576 pixels", "beam search and top-p", "CIDEr and BLEU",
        "zero-shot classification, and retrieval of videos", "open_clip's has two",
    )  # fmt: skip
    return Recipe(f"coca:{size}", ("coca",), tuple(rows))
