"""CoCa (Yu et al. 2022) at the paper's size: 2.1 billion parameters, contrastive learning and captioning in one pass.

    python -m mmjax.datasets.build emoji
    python -m mmjax.train --config=configs/coca_2b.py --workdir=runs/coca_2b

Sizes are those of the paper's table 1 and section 4.1: images of 288 pixels in patches of 18, 64k pieces of text,
batches of 65,536, 500,000 steps, a warm-up of 2 % and a linear decay; `coca_2b.py:base` and `coca_2b.py:large` are its
smaller models. Biases, tables of positions, and the norms of the poolers and of what the decoder reads are those of
open_clip's CoCa, as the paper leaves them open.

What differs, or is ours:

- The optimizer is Muon with first moments in bfloat16; theirs is Adafactor with b1 0.9.
- The 64 tokens of a text and the crop are ours, as is the bound of the gradient's norm.
- A layer of the multimodal half has one MLP, as in the paper's count; open_clip's has two.
- Missing: JFT-3B's labels as texts in half of each batch, and the last epoch at 576 pixels; beam search and top-p; the
  metrics CIDEr and BLEU; zero-shot classification, and retrieval of videos by their frames.

Pairs are the drawings and names that the data sets here hold (theirs: JFT-3B and ALIGN). For your own, set
`tasks.captions.source` and `tasks.captions.evaluators.*.source` (records with `image`, an encoded picture; `caption`;
`concept`, an integer that pairs of one content share: `tasks.captions.objective.concept` names it, an empty name where
no two do), and `modalities.text.tokenizer` with its number of pieces in `modalities.text.vocabulary`.

Hardware: a TPU pod (the paper: 2,048 TPUv4 chips for 5 days). Results: none, it has not been trained here; see
`coca_small.py`, the same recipe with smaller numbers.
"""

from typing import Any

from ml_collections import ConfigDict

from mmjax.core.errors import UserError, nearest

# Table 1: width, heads; layers and MLP of the image encoder; layers of each half of the text decoder and their MLP.
SIZES = {
    "base": (768, 12, 12, 3072, 12, 3072),
    "large": (1024, 16, 24, 4096, 12, 4096),
    "2b": (1408, 16, 40, 6144, 18, 5632),
}


def data(split: str) -> dict[str, Any]:
    return {"name": "tfds", "dataset": "emoji", "split": split}


def layers(name: str, repeat: int, heads: int, hidden: int) -> list[dict[str, Any]]:
    block: dict[str, Any] = {
        "name": name, "heads": heads, "hidden": hidden, "bias": True, "attention_bias": True, "eps": 1e-5,
    }  # fmt: skip
    if name == "cross_transformer":
        block["context_norm"] = True
    return [{"repeat": repeat, "pattern": [block]}]


def model(
    width: int, heads: int, encoder: int, encoder_mlp: int, decoder: int, decoder_mlp: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the encoder's block, and the objective's keys of the decoder's size."""
    groups = layers("transformer", encoder, heads, encoder_mlp)
    return {"width": width, "groups": groups, "norm_eps": 1e-5}, {
        "unimodal": layers("transformer", decoder, heads, decoder_mlp),
        "multimodal": layers("cross_transformer", decoder, heads, decoder_mlp),
        "pooler_heads": heads,
        "joint": width,
    }


def get_config(size: str = "2b") -> ConfigDict:
    """The config; `size` is `base`, `large` or `2b`."""
    if size not in SIZES:
        raise UserError(f"coca_2b has no size '{size}'.{nearest(size, SIZES)}")
    encoder, decoder = model(*SIZES[size])
    splits = {"drawings": data("test_drawing"), "concepts": data("test_concept")}

    config = ConfigDict(sort_keys=False)
    config.steps = 500_000
    config.seed = 0
    config.modalities = {
        "image": {"name": "image", "patch": 18, "buckets": 16, "positions": "table"},
        # No tokenizer: give one of 64,000 pieces.
        "text": {
            "name": "text",
            "tokenizer": "",
            "vocabulary": 64_000,
            "buckets": 64,
            "positions": "table",
        },
    }
    config.model = {**encoder, "remat": "full"}
    config.tasks = {
        "captions": {
            "source": data("train"),
            "inputs": {
                "image": {"size": 288, "crop": 0.7},
                "text": {"field": "caption", "length": 64},
            },
            "objective": {
                "name": "coca", "between": ["image", "text"], "concept": "concept", **decoder,
                "queries": 256, "pooling": "cascade", "pooler_bias": True, "pooler_norms": True,
                "norm_eps": 1e-5, "temperature": 0.07, "contrastive_weight": 1.0, "caption_weight": 2.0,
                "remat": "full", "chunk": 4096,
            },
            "batch": 65_536,
            "evaluators": {
                **{f"written_{n}": {"name": "captions", "source": s} for n, s in splits.items()},
                **{f"retrieved_{n}": {"name": "retrieval", "source": s} for n, s in splits.items()},
            },
        },
    }  # fmt: skip
    config.optimizer = {
        "name": "muon", "learning_rate": 8e-4, "warmup": 10_000, "decay": "linear", "final": 0.0,
        "b1": 0.9, "b2": 0.999, "weight_decay": 0.01, "clip": 1.0, "moments_dtype": "bfloat16",
    }  # fmt: skip
    config.dtype = {"compute": "bfloat16"}
    config.mesh = {"data": 1, "fsdp": -1}
    config.checkpoint = {"every": 5_000, "keep": 2}
    config.evaluation = {"every": 0, "batch": 4096}
    return config
