"""CoCa-pytorch (lucidrains), a public port, at the shapes of one of our tasks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmjax.core.batch import Batch
from mmjax.experiment import Experiment
from mmjax.modalities.image import patchify
from mmjax.nn.trunk import GroupConfig
from mmjax.task import Task


@dataclass(frozen=True)
class Peer:
    """A training step to be timed (forward, backward, AdamW), and captions token by token."""

    step: Callable[[], Any]
    write: Callable[[], Any]


def peer(experiment: Experiment, task: Task, rows: Batch) -> Peer | None:
    """Return the port on a batch of the task; None where it is not installed.

    Its encoder is PyTorch's own pre-norm transformer over linear patches, since the port brings none.
    """
    if importlib.util.find_spec("coca_pytorch") is None:
        return None
    import torch

    objective: Any = task.objective
    shown, text = objective.modalities
    patch = getattr(task.inputs[shown].modality, "patch")  # noqa: B009
    pixels = np.asarray(rows.inputs[shown]["pixels"], np.float32) / 127.5 - 1
    images = torch.from_numpy(np.array(patchify(pixels, patch)))
    ids = torch.from_numpy(np.array(rows.inputs[text]["ids"], np.int64))
    model = _model(experiment, task, images.shape[-1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # The port takes the begin token with the text, and cuts the last one off.
    texts = torch.nn.functional.pad(ids, (1, 0), value=2)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(texts, images, return_loss=True)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    def write() -> Any:
        with torch.no_grad():
            tokens = model.img_encoder(images)
            written = texts[:, :1]
            for _ in range(ids.shape[1]):
                logits = model(written, image_tokens=tokens)[:, -1]
                written = torch.cat([written, logits.argmax(dim=-1, keepdim=True)], dim=1)
            return written

    return Peer(step, write)


def _model(experiment: Experiment, task: Task, patch_values: int) -> Any:
    import torch
    from coca_pytorch.coca_pytorch import CoCa

    objective: Any = task.objective
    config, own = experiment.run.model.trunk, _only(experiment.run.model.trunk.layers)
    text: Any = task.inputs[objective.modalities[1]].modality
    layer = torch.nn.TransformerEncoderLayer(
        config.width, own["num_heads"], own["mlp_dim"], dropout=0.0, activation="gelu",
        batch_first=True, norm_first=True,
    )  # fmt: skip
    layers = torch.nn.TransformerEncoder(layer, own["repeat"], enable_nested_tensor=False)
    encoder = torch.nn.Sequential(torch.nn.Linear(patch_values, config.width), layers)
    first, second = _only(objective.unimodal), _only(objective.multimodal)
    return CoCa(
        dim=config.width, num_tokens=text.vocabulary, unimodal_depth=first["repeat"],
        multimodal_depth=second["repeat"], dim_latents=objective.embed_dim, image_dim=config.width,
        num_img_queries=objective.queries, dim_head=config.width // first["num_heads"],
        heads=first["num_heads"], ff_mult=first["mlp_dim"] // config.width, img_encoder=encoder,
        caption_loss_weight=objective.caption_weight,
        contrastive_loss_weight=objective.contrastive_weight,
    )  # fmt: skip


def _only(groups: tuple[GroupConfig, ...]) -> dict[str, Any]:
    """Return the settings of the one kind of layer that groups hold, and how often it comes."""
    [group] = groups
    [block] = group.blocks
    return {**block, "repeat": group.repeat}
