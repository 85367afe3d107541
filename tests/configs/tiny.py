"""The quickstart's tasks on real data, so small that a run takes seconds."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    emoji = {"name": "tfds", "dataset": "emoji"}
    train, drawings, concepts = (
        {**emoji, "split": s} for s in ("train", "test_drawing", "test_concept")
    )
    layer = {"name": "transformer", "num_heads": 2, "mlp_dim": 64}

    text = {"name": "text", "tokenizer": "emoji/1.0.0/tokenizer.model"}

    config = ConfigDict(sort_keys=False)
    config.steps = 14
    config.seed = 0
    config.modalities = {"image": {"name": "image", "patch": 8}, "text": text}
    config.model = {"width": 32, "layers": [{"repeat": 2, "blocks": [layer]}]}
    config.tasks = {
        "image_text": {
            "source": train,
            "inputs": {
                "image": {"size": 16, "crop": 0.7},
                "text": {"field": "caption", "length": 8},
            },
            "objective": {
                "name": "contrastive",
                "modalities": ["image", "text"],
                "positive_key": "concept",
                "embed_dim": 16,
            },
            "batch": 16,
            "weight": 2,
            "evaluators": {
                "drawings": {"name": "retrieval", "source": drawings},
                "groups": {"name": "zero_shot", "source": drawings, "names": drawings},
            },
        },
        "masked_image": {
            "source": train,
            "inputs": {"image": {"size": 32, "flip": True}},
            "objective": {
                "name": "masked_image",
                "decoder_width": 32,
                "decoder_depth": 1,
                "decoder_heads": 2,
            },
            "batch": 8,
            "weight": 1,
            "evaluators": {"drawings": {"name": "held_out_loss", "source": drawings}},
        },
    }
    config.optimizer = {
        "algorithm": {"name": "adamw"}, "learning_rate": 1e-3, "warmup": 4, "weight_decay": 0.05,
    }  # fmt: skip
    config.checkpoint = {"every": 4, "keep": 2}
    config.evaluation = {"every": 5, "batch": 64}
    config.log = {"report": False}  # has tests of its own
    return config
