"""transfusion-pytorch (lucidrains), a public port, at the shapes of one of our batches."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmjax.core.batch import Batch
from mmjax.modalities.image import patchify

_MARKS = 4  # its own tokens beside the picture's shape in characters: begin of row, shape, picture; end of picture


@dataclass(frozen=True)
class Sizes:
    """Sizes with which both are built.

    Attributes:
      tokens: of a row in the trunk, those of the port's own included.
      hidden: of a gated MLP.
      weight: of the picture's loss, a mean over its values, where the text's mean has 1.
    """

    tokens: int
    width: int
    layers: int
    heads: int
    hidden: int
    vocabulary: int
    patch: int
    weight: float


@dataclass(frozen=True)
class Peer:
    """A training step to be timed (forward, backward, AdamW) that returns its loss, and what it is.

    Attributes:
      tokens: of a row in its trunk, as it was seen there.
      flops: of the matrix products of a step.
    """

    step: Callable[[], float]
    tokens: int
    parameters: int
    flops: int


def is_installed() -> bool:
    return importlib.util.find_spec("transfusion_pytorch") is not None


def peer(sizes: Sizes, rows: Batch) -> Peer:
    """Return the port on a batch: of each row as many text tokens as fit beside its own, and the picture's patches."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    samples, model = _samples(sizes, rows), _model(sizes, rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(samples)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    seen: list[int] = []
    watch = model.transformer.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1]))
    with FlopCounterMode(display=False) as counter:
        step()
    watch.remove()
    parameters = sum(p.numel() for p in model.parameters())
    return Peer(step, seen[0], parameters, counter.get_total_flops())


def _samples(sizes: Sizes, rows: Batch) -> list[list[Any]]:
    """Return text ids, and a picture's patches `[side, side, values]` in [-1, 1]."""
    import torch

    pixels = np.asarray(rows.inputs["image"]["pixels"], np.float32) / 127.5 - 1
    patches_BSP = torch.from_numpy(np.array(patchify(pixels, sizes.patch)))
    side = pixels.shape[1] // sizes.patch
    length = sizes.tokens - side**2 - _MARKS - len(_shape(side))
    plain = sizes.vocabulary - _marks()
    ids = torch.from_numpy(np.array(rows.inputs["text"]["ids"][:, :length] % plain, np.int64))
    return [
        [text, (0, picture.reshape(side, side, -1))]
        for text, picture in zip(ids, patches_BSP, strict=True)
    ]


def _model(sizes: Sizes, rows: Batch) -> Any:
    """Return the port's model: its logits are over our vocabulary with its own marks, its losses weigh what ours do."""
    from transfusion_pytorch import Transfusion

    values = 3 * sizes.patch**2
    patches = (rows.inputs["image"]["pixels"].shape[1] // sizes.patch) ** 2
    # Its losses are sums over the tokens and their values, divided by the number of all tokens.
    share = sizes.tokens / (sizes.tokens - patches), sizes.tokens / (patches * values)
    model = Transfusion(
        num_text_tokens=sizes.vocabulary - _marks(), dim_latent=values, modality_num_dim=2,
        add_pos_emb=True, prob_uncond=0.0, modality_processing="grouped",
        text_loss_weight=share[0], flow_loss_weight=sizes.weight * share[1],
        transformer={
            "dim": sizes.width, "depth": sizes.layers, "heads": sizes.heads,
            "dim_head": sizes.width // sizes.heads,
            "ff_expansion_factor": 1.5 * sizes.hidden / sizes.width,
        },
    )  # fmt: skip
    assert model.to_text_logits.weight.shape[0] == sizes.vocabulary
    assert model.transformer.layers[0][2].fn.net[-1].weight.shape[1] == sizes.hidden
    return model


def _shape(side: int) -> str:
    return f"{side},{side}"


def _marks() -> int:
    """Return rows of its vocabulary that are no text: 3 of rows, 2 of a picture, 1 and 128 characters of a shape."""
    return 3 + 2 + 1 + 128
