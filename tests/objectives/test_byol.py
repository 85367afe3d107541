"""BYOL: the loss in NumPy, its gradient, micro-batches, and a run on pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import toyrun
import views
from etils import epath
from ml_collections import ConfigDict

from mmjax import train
from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.core.parameters import Arrays
from mmjax.core.sharding import make_mesh
from mmjax.engine.gradient import loss_and_gradient
from mmjax.objectives.base import with_rows
from mmjax.objectives.byol import pooled_views

TINY = Path(__file__).resolve().parent.parent / "configs" / "tiny.py"


def projected(p: dict[str, np.ndarray], where: str, x: np.ndarray) -> np.ndarray:
    x = x @ p[f"{where}/up/kernel"] + p[f"{where}/up/bias"]
    x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)
    x = np.maximum(x * p[f"{where}/norm/scale"] + p[f"{where}/norm/bias"], 0)
    return x @ p[f"{where}/down/kernel"] + p[f"{where}/down/bias"]


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.fixture(scope="module", autouse=True)
def wide() -> Any:
    with jax.enable_x64(True):
        yield


def test_the_loss_is_that_of_numpy_over_valid_rows() -> None:
    made = views.make("byol")
    arrays, batch = views.arrays_of(made), views.batch()
    task = made.tasks["views"]

    def both(arrays: Arrays) -> Any:
        model, rows = made.declaration.merge(arrays), with_rows(batch)
        pictures, teacher = rows.inputs["image"], model.teacher("target")
        pooled = [pooled_views(m, "image", pictures, None)[0] for m in (model, teacher)]
        return task.loss(model, rows, jax.random.key(0)), pooled

    loss, (x_BVD, seen_BVD) = toyrun.host(jax.jit(both)(arrays))
    p = toyrun.host(arrays)
    taught = {n.removeprefix("teacher/target/"): v for n, v in p.items() if n.startswith("teacher")}
    assert (x_BVD != seen_BVD).any()
    costs = []
    for row in np.flatnonzero(views.VALID):
        for view in range(2):
            head = "heads/views"
            said = projected(p, f"{head}/projector", x_BVD[row, view])
            said = projected(p, f"{head}/predictor", said)
            wanted = projected(taught, f"{head}/projector", seen_BVD[row, 1 - view])
            costs.append(2 - 2 * cosine(said, wanted))
    np.testing.assert_allclose(loss.value, np.mean(costs), rtol=1e-9)


def gradient(parts: int, devices: int) -> Any:
    made = views.make("byol")
    task = made.tasks["views"]
    task = replace(task, config=replace(task.config, microbatches=parts))
    arrays = views.arrays_of(made)
    others = {n: x for n, x in arrays.items() if n.startswith("teacher/")}
    moved = {n: x for n, x in arrays.items() if n not in others}

    def of(moved: Arrays) -> Any:
        merge = made.declaration.merge
        return loss_and_gradient(
            task, lambda p: merge({**others, **p}), moved, views.batch(), jax.random.key(1)
        )

    with jax.set_mesh(make_mesh(made.run.mesh, jax.devices()[:devices])):
        loss, grads = jax.jit(of)(moved)
    return toyrun.host((loss.value, grads))


def test_micro_batches_keep_value_and_gradient() -> None:
    whole, parts = gradient(1, 1), gradient(4, 1)
    assert max(np.abs(g).max() for g in whole[1].values()) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), whole, parts)


def test_an_input_of_one_view_is_refused() -> None:
    with pytest.raises(
        UserError, match="two views of 'image', and its input has 1. Set instances to 2"
    ):
        views.make("byol", "tasks.views.inputs.image.instances=0")


@pytest.mark.parametrize("name", ["byol", "simdino"])
def test_it_trains_on_pictures(name: str, emoji_dir: epath.Path, tmp_path: Path) -> None:
    """Through the ordinary loop; the teacher ends near the student and away from where it began."""
    config: Any = ConfigDict(configs.read_file(str(TINY)))
    config.unlock()
    source = {"name": "tfds", "dataset": "emoji", "split": "train"}
    config.modalities = {"image": config.modalities["image"]}
    config.tasks = {
        "views": {
            "source": source,
            "inputs": {"image": {"size": 16, "instances": 2}},
            "objective": {"name": name, "hidden": 16, "embed_dim": 8},
            "batch": 16,
            "evaluators": {
                "loss": {"name": "held_out_loss", "source": {**source, "split": "test_drawing"}}
            },
        }
    }
    config.model.teachers = {"target": {"of": views.OF, "decay": 0.5}}
    words = ("steps=4", "log.report=False", "schedule.phases=[]", "optimizer.rules=[]")
    with jax.enable_x64(False):
        records = train.train(
            configs.override(config.to_dict(), words),
            epath.Path(tmp_path),
            False,
            jax.devices()[:1],
        )
        assert records and all(np.isfinite(record["value"]) for record in records)
        assert toyrun.meta(tmp_path)["clock"]["skipped"] == {"views": 0}
