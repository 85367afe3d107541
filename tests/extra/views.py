"""Small experiments on two views of pictures, for objectives that read a teacher."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import toyrun

from mmjax.core import config as configs
from mmjax.core.batch import Batch
from mmjax.experiment import Experiment, make_experiment

ROWS = 8
VALID = np.array([1, 1, 0, 1, 1, 1, 0, 1], bool)
OF = ["stems/image/.*", "trunk/.*", "heads/views/projector/.*"]


def make(name: str, *overrides: str, **keys: Any) -> Experiment:
    """Return an experiment with one task, `views`, of an objective."""
    block = toyrun.block()
    layer = {"name": "transformer", "num_heads": 2, "mlp_dim": 8}
    block["model"] = {
        "width": 8,
        "layers": [{"repeat": 2, "blocks": [layer]}],
        "teachers": {"target": {"of": OF}},
    }
    block["modalities"] = {"image": {"name": "image", "patch": 4}}
    block["tasks"] = {
        "views": {
            "source": {"name": "toy"},
            "inputs": {"image": {"size": 8, "instances": 2}},
            "objective": {"name": name, "hidden": 6, "embed_dim": 5, **keys},
            "batch": ROWS,
        }
    }
    block["dtype"] = {"parameters": "float64", "compute": "float64"}
    return make_experiment(configs.override(block, overrides))


def batch(valid: np.ndarray[Any, Any] = VALID) -> Batch:
    """Return random pictures; invalid rows are not blank."""
    pixels = np.random.default_rng(3).integers(0, 256, (ROWS, 2, 8, 8, 3), np.uint8)
    arrays = {"pixels": jnp.asarray(pixels), "present": jnp.ones((ROWS, 2), bool)}
    return Batch(inputs={"image": arrays}, fields={}, valid=jnp.asarray(valid))


def arrays_of(made: Experiment) -> dict[str, jax.Array]:
    """Return random parameters, and a teacher that differs from them, by their names in the state."""
    rng = np.random.default_rng(5)
    return {
        name: jnp.asarray(rng.normal(size=spec.shape) * 0.3)
        for name, spec in made.declaration.read.items()
    }
