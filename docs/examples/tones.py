"""All modules of this folder in one config: `--extra=docs/examples --config=docs/examples/tones.py`."""

from __future__ import annotations

from typing import Any

SHIFT = {"name": "shift"}
EXPERTS = {"count": 3, "router": {"name": "in_turn", "first": 1}}
TRANSFORMER = {"name": "transformer", "num_heads": 2, "mlp_dim": 4, "experts": EXPERTS}


def get_config() -> dict[str, Any]:
    """Return the config as plain data."""
    return {
        "steps": 30,
        "modalities": {"tone": {"name": "tone"}},
        "model": {
            "width": 8,
            "layers": [{"repeat": 2, "blocks": [SHIFT]}, {"repeat": 1, "blocks": [TRANSFORMER]}],
        },
        "tasks": {
            "pitch": {
                "source": {"name": "tones", "count": 64},
                "inputs": {"tone": {"length": 8}},
                "objective": {"name": "pitch"},
                "batch": 16,
                "evaluators": {
                    "error": {"name": "mean_error", "source": {"name": "tones", "count": 32}}
                },
            }
        },
        "optimizer": {
            "algorithm": {"name": "heavy_ball", "momentum": 0.5},
            "learning_rate": 1e-2,
        },
    }
