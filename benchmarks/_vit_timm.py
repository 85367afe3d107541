"""timm's ViT in PyTorch and its training step; the peer of `vit.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn


def training(
    ours: Mapping[str, Any], sizes: Mapping[str, int], pixels: int, classes: int, rate: float
) -> Callable[[np.ndarray, np.ndarray], float]:
    """Return a step on pixels (uint8 `[B, H, W, 3]`) and labels by AdamW, from our parameters on; it gives the loss."""
    norm = partial(nn.LayerNorm, eps=1e-6, bias=False)
    model = VisionTransformer(
        img_size=pixels, patch_size=sizes["patch"], embed_dim=sizes["width"], depth=sizes["layers"],
        num_heads=sizes["num_heads"], mlp_ratio=sizes["mlp_dim"] / sizes["width"], num_classes=classes,
        class_token=False, global_pool="avg", fc_norm=False, qkv_bias=False, proj_bias=False, norm_layer=norm,
        act_layer=partial(nn.GELU, approximate="tanh"),
    )  # fmt: skip
    model.norm = nn.LayerNorm(sizes["width"], eps=1e-6)
    _load(model, ours, sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    loss_of = nn.CrossEntropyLoss()

    def step(images: np.ndarray, labels: np.ndarray) -> float:
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model(x), torch.from_numpy(labels.astype(np.int64)))
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


@torch.no_grad()
def _load(model: Any, ours: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Copy mmjax's parameters into the port, in the port's shapes; every parameter is set."""
    width, patch = sizes["width"], sizes["patch"]
    values = {
        "pos_embed": ours["positions"][None],
        "patch_embed.proj.weight": ours["stem"]
        .reshape(patch, patch, 3, width)
        .transpose(3, 2, 0, 1),
        "patch_embed.proj.bias": ours["stem_bias"],
        "norm.weight": ours["norm_scale"],
        "norm.bias": ours["norm_bias"],
        "head.weight": ours["classes"].T,
        "head.bias": ours["classes_bias"],
    }
    for index, layer in enumerate(ours["layers"]):
        heads = np.concatenate(
            [layer[n].reshape(width, width).T for n in ("query", "key", "value")]
        )
        values |= {
            f"blocks.{index}.norm1.weight": layer["attention_norm"],
            f"blocks.{index}.attn.qkv.weight": heads,
            f"blocks.{index}.attn.proj.weight": layer["out"].reshape(width, width).T,
            f"blocks.{index}.norm2.weight": layer["mlp_norm"],
            f"blocks.{index}.mlp.fc1.weight": layer["up"].T,
            f"blocks.{index}.mlp.fc2.weight": layer["down"].T,
        }
    parameters = dict(model.named_parameters())
    assert parameters.keys() == values.keys(), parameters.keys() ^ values.keys()
    for name, value in values.items():
        parameters[name].copy_(torch.from_numpy(np.array(value)).reshape(parameters[name].shape))
