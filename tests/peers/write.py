"""Write fixtures of peers: python tests/peers/write.py, in an environment with torch and open-clip-torch.

Each file `NAME.npz` beside this one holds a tiny model of open_clip with random weights: `weight/NAME` and
`gradient/NAME` of its parameters, `pixels` (uint8), `ids`, `image` and `text` (features), `loss` and `versions`. The
suite reads them, and needs no PyTorch.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import timm
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from open_clip.model import CLIP, CustomTextCLIP
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer

HERE = Path(__file__).resolve().parent
SIDE, PATCH, WORDS, LENGTH, ROWS, END = 8, 4, 24, 5, 5, 23
IMAGE, TEXT, JOINT = 16, 12, 8  # widths


@register_model
def vit_peer_siglip(pretrained: bool = False, **keywords: Any) -> VisionTransformer:
    """Return a SigLIP tower as timm has it, but tiny."""
    del pretrained, keywords  # of the registry; the tower is built here
    return VisionTransformer(
        img_size=SIDE, patch_size=PATCH, num_classes=0, embed_dim=IMAGE, depth=2, num_heads=2, class_token=False,
        global_pool="map", act_layer="gelu_tanh",
    )  # fmt: skip


def clip() -> tuple[Any, Any]:
    """Return CLIP, two layers a tower, and its loss."""
    vision = {
        "layers": 2, "width": IMAGE, "head_width": 8, "patch_size": PATCH, "image_size": SIDE,
    }  # fmt: skip
    text = {
        "context_length": LENGTH, "vocab_size": WORDS, "width": TEXT, "heads": 2, "layers": 2,
    }  # fmt: skip
    return CLIP(JOINT, vision, text, quick_gelu=True), ClipLoss()


def siglip() -> tuple[Any, Any]:
    """Return SigLIP, two layers a tower, and its loss."""
    vision = {
        "timm_model_name": "vit_peer_siglip", "timm_model_pretrained": False, "timm_pool": "map",
        "timm_proj": "none", "image_size": SIDE,
    }  # fmt: skip
    text = {
        "context_length": LENGTH, "vocab_size": WORDS, "width": TEXT, "heads": 2, "layers": 2,
        "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
        "act_kwargs": {"approximate": "tanh"},
    }  # fmt: skip
    model = CustomTextCLIP(
        IMAGE, vision, text, init_logit_scale=float(np.log(10)), init_logit_bias=-10
    )
    return model, SigLipLoss()


def fill(model: Any, seed: int) -> None:
    """Draw all weights: norms about one, the scale and bias of the logits as they begin."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.startswith("logit_"):
            continue
        draw = torch.randn(parameter.shape, generator=generator)
        is_scale = parameter.ndim == 1 and name.endswith("weight")
        size = 0.1 if parameter.ndim == 1 else 0.3
        parameter.data = 1 + 0.2 * draw if is_scale else size * draw


def write(name: str, model: Any, loss: Any, is_padded: bool) -> None:
    """Write the fixture of a model."""
    fill(model, 0)
    model.train()  # a torch model in training mode computes gradients by its plain path
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (ROWS, SIDE, SIDE, 3)).astype(np.uint8)
    ids = rng.integers(1, END, (ROWS, LENGTH)).astype(np.int32)
    for row, length in enumerate([5, 2, 4, 3, 5] if is_padded else [LENGTH] * ROWS):
        ids[row, length - 1], ids[row, length:] = END, 0
    image = torch.tensor(pixels.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    image_features, text_features, *scales = model(image, torch.tensor(ids.astype(np.int64)))
    value = loss(image_features, text_features, *scales)
    value.backward()
    versions = (
        f"torch {torch.__version__}, open_clip {open_clip.__version__}, timm {timm.__version__}"
    )
    arrays = {
        "pixels": pixels, "ids": ids, "image": image_features.detach().numpy(),
        "text": text_features.detach().numpy(), "loss": value.detach().numpy(),
        "versions": np.array(f"{versions}, Python {platform.python_version()}"),
    }  # fmt: skip
    for part, parameter in model.named_parameters():
        arrays[f"weight/{part}"] = parameter.detach().numpy()
        arrays[f"gradient/{part}"] = parameter.grad.numpy()
    np.savez_compressed(HERE / f"{name}.npz", **arrays)


if __name__ == "__main__":
    write("clip", *clip(), is_padded=True)
    write("siglip", *siglip(), is_padded=False)
