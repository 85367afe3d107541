"""CoCa (Yu et al. 2022): contrastive learning and captioning in one pass.

    mmjax build emoji
    mmjax train --config=coca:2b --workdir=runs/coca-2b
    mmjax train --config=coca:small --workdir=runs/coca-small

Settings: `2b` is of the paper's size, 2.1 billion parameters, `base` and `large` are its smaller models, and `small` is
the same recipe on drawings with smaller numbers.

Sizes are those of the paper's table 1 and section 4.1: images of 288 pixels in patches of 18, 64k pieces of text,
batches of 65,536, 500,000 steps, a warm-up of 2 % and a linear decay. Biases, tables of positions, and the norms of the
poolers and of what the decoder reads are those of open_clip's CoCa, as the paper leaves them open.

What differs, or is ours:

- The optimizer is Muon with first moments in bfloat16; theirs is Adafactor with b1 0.9.
- The 64 tokens of a text and the crop are ours, as is the bound of the gradient's norm.
- A layer of the multimodal half has one MLP, as in the paper's count; open_clip's has two.
- Missing: JFT-3B's labels as texts in half of each batch, and the last epoch at 576 pixels; beam search and top-p; the
  metrics CIDEr and BLEU; zero-shot classification, and retrieval of videos by their frames.

Pairs are the drawings and names that the data sets here hold (theirs: JFT-3B and ALIGN). For your own, set
`tasks.captions.source` and `tasks.captions.evaluators.*.source` (records with `image`, an encoded picture; `caption`;
`concept`, an integer that pairs of one content share: `tasks.captions.objective.positive_key` names it, an empty name
where no two do), and `modalities.text.tokenizer` with its number of pieces in `modalities.text.vocabulary`.

Hardware: a TPU pod (the paper: 2,048 TPUv4 chips for 5 days); results: none, the paper's sizes have not been trained
here. `small`: a CPU with 2 cores, 1,200 steps of 11.5 GFLOP, 5 to 9 minutes in all, measured beside other work. Results
(one seed, of an earlier version with a cosine decay and without biases, tables of positions and the poolers' norms):
picture to text, recall at 10 of 69 % on drawings never seen (chance 4 %) and 35 % on concepts never seen (chance 3.5
%); captions of drawings never seen, 1.50 nats per token (5.1 knowing nothing), token F1 of 15 % (0.5 %), 4 % word for
word; of concepts never seen, whose names it never met, 6.5 nats (5.1) and F1 of 16 % (1.7 %).
"""

from dataclasses import dataclass
from typing import Any, Literal

from ml_collections import ConfigDict


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A size of CoCa; `small` has smaller pictures and shorter texts too."""

    size: Literal["2b", "large", "base", "small"]


# Table 1: width, heads; layers and MLP of the image encoder; layers of each half of the text decoder and their MLP.
SIZES = {
    "base": (768, 12, 12, 3072, 12, 3072),
    "large": (1024, 16, 24, 4096, 12, 4096),
    "2b": (1408, 16, 40, 6144, 18, 5632),
    "small": (128, 4, 4, 512, 2, 512),
}


def data(split: str) -> dict[str, Any]:
    return {"name": "tfds", "dataset": "emoji", "split": split}


def layers(name: str, repeat: int, heads: int, hidden: int) -> list[dict[str, Any]]:
    block: dict[str, Any] = {
        "name": name, "num_heads": heads, "mlp_dim": hidden, "bias": True, "attention_bias": True, "eps": 1e-5,
    }  # fmt: skip
    if name == "cross_transformer":
        block["context_norm"] = True
    return [{"repeat": repeat, "blocks": [block]}]


def model(
    width: int, heads: int, encoder: int, encoder_mlp: int, decoder: int, decoder_mlp: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the encoder's block, and the objective's keys of the decoder's size."""
    groups = layers("transformer", encoder, heads, encoder_mlp)
    return {"width": width, "layers": groups, "norm_eps": 1e-5}, {
        "unimodal": layers("transformer", decoder, heads, decoder_mlp),
        "multimodal": layers("cross_transformer", decoder, heads, decoder_mlp),
        "pooler_heads": heads,
        "embed_dim": width,
    }


def get_config(setting: Setting) -> ConfigDict:
    """Return the config of a setting."""
    encoder, decoder = model(*SIZES[setting.size])
    splits = {"drawings": data("test_drawing"), "concepts": data("test_concept")}

    config = ConfigDict(sort_keys=False)
    config.steps = 500_000
    config.seed = 0
    config.modalities = {
        "image": {"name": "image", "patch": 18, "max_positions": 16, "positions": "table"},
        # No tokenizer: give one of 64,000 pieces.
        "text": {
            "name": "text",
            "tokenizer": "",
            "vocabulary": 64_000,
            "max_positions": 64,
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
                "name": "coca", "modalities": ["image", "text"], "positive_key": "concept", **decoder,
                "queries": 256, "pooling": "cascade", "pooler_bias": True, "pooler_norms": True,
                "norm_eps": 1e-5, "init_temperature": 0.07, "contrastive_weight": 1.0, "caption_weight": 2.0,
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
        "algorithm": {"name": "muon", "b1": 0.9, "b2": 0.999, "moments_dtype": "bfloat16"},
        "learning_rate": 8e-4, "warmup": 10_000, "decay": "linear", "end_lr_ratio": 0.0,
        "weight_decay": 0.01, "clip": 1.0,
    }  # fmt: skip
    config.dtype = {"compute": "bfloat16"}
    config.mesh = {"data": 1, "fsdp": -1}
    config.checkpoint = {"every": 5_000, "keep": 2}
    config.evaluation = {"every": 0, "batch": 4096}
    if setting.size == "small":
        make_small(config)
    return config


def make_small(config: ConfigDict) -> None:
    """Set the numbers of `small` that go with smaller pictures, shorter texts and a shorter run."""
    config.steps = 1200
    config.modalities.image.update({"patch": 8, "max_positions": 4})
    config.modalities.text.update(
        {"tokenizer": "emoji/1.0.0/tokenizer.model", "vocabulary": 2048, "max_positions": 12}
    )
    config.model.remat = "none"
    task = config.tasks.captions
    task.batch = 64
    task.inputs.image.size = 32
    task.inputs.text.length = 12
    task.objective.update({"queries": 16, "embed_dim": 96, "remat": "none"})
    config.optimizer.update({"learning_rate": 2e-3, "warmup": 50, "weight_decay": 0.1})
    config.dtype.compute = "float32"
    config.checkpoint.every = 400
    config.evaluation.batch = 256
