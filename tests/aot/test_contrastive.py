"""Check what the devices of a pod send each other for a contrastive loss, by the TPU's compiler. Nothing runs."""

from __future__ import annotations

from typing import Any

from mmjax.plan.case import Specification
from mmjax.plan.workers import compile_cases

BLOCK: dict[str, Any] = {
    "steps": 10,
    "modalities": {
        "text": {"name": "text", "vocabulary": 2048, "max_positions": 16},
        "image": {"name": "image", "patch": 16, "max_positions": 8},
    },
    "model": {
        "width": 256,
        "layers": [
            {"repeat": 1, "blocks": [{"name": "transformer", "num_heads": 4, "mlp_dim": 512}]}
        ],
    },
    "tasks": {
        "pairs": {
            "source": {"name": "tfds", "dataset": "emoji", "split": "train"},
            "inputs": {"image": {"size": 32}, "text": {"field": "caption", "length": 8}},
            "objective": {
                "name": "cross_modal", "modalities": ["image", "text"], "space": "disjoint", "head": "joint",
                "embed_dim": 64,
            },
            "batch": 2048,
        }
    },
    "optimizer": {"algorithm": {"name": "adamw"}, "learning_rate": 1e-3, "warmup": 1},
    "dtype": {"compute": "bfloat16"},
    "mesh": {"data": 1, "fsdp": -1},
    "evaluation": {"every": 0},
}  # fmt: skip


def test_devices_send_sums_of_logits_and_not_logits() -> None:
    """Each of 256 holds rows of them, and adds up its part of the columns; a transpose would send all to all."""
    asked = Specification(BLOCK, (), "v5e", (16, 16), 1, ["pairs"], True, "")
    found = compile_cases(asked, 600).cases["pairs"]
    assert found["status"] == "compiled", found
    sent = {each["kind"]: each["bytes"] for each in found["collectives"]}
    assert sent.keys() == {"all-reduce"} and sent["all-reduce"] > 0
