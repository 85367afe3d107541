"""Attention bottlenecks (MBT, Nagrani et al. 2021): modalities exchange what passes through a few tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.blocks.transformer import SharedKeys, Transformer
from mmjax.core.bounds import FieldError
from mmjax.core.errors import UserError
from mmjax.nn.stream import Aux, Stream, add_up, concatenate, fold, no_aux, segments

FUSION = "fusion"  # the modality, in a layout, of tokens that belong to none


@dataclass(frozen=True)
class Bottleneck(SharedKeys):
    """A transformer block of each modality's own, which sees the modality's tokens and the fusion tokens.

    With z the fusion tokens, `[x_m'; z_m] = block_m([x_m; z])` and `z' = mean_m z_m` over the modalities that a row has
    (equations 8 and 9). Where it does not fuse, blocks see their own modality only and z stays.

    Its other keys are those of the blocks, see `Transformer`.

    Attributes:
      modalities: those with a block; each stream holds some of them, and one segment of fusion tokens.
      fuse: whether this layer is one of those that exchange (the paper: the last four of twelve).
    """

    modalities: tuple[str, ...] = ()
    fuse: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.modalities:
            raise FieldError(self, "modalities", "is empty; name those that the layer sees.")

    def build(self, width: int) -> BottleneckBlock:
        """Return the block for tokens of a width."""
        return BottleneckBlock(width, self)


class BottleneckBlock(nnx.Module):
    """The block that `Bottleneck` describes."""

    def __init__(self, width: int, config: Bottleneck):
        transformer = Transformer(**{f.name: getattr(config, f.name) for f in fields(SharedKeys)})
        self.blocks = nnx.Dict({name: transformer.build(width) for name in config.modalities})
        self.fuse = config.fuse

    def __call__(self, stream: Stream, key: jax.Array | None) -> tuple[Stream, Aux]:
        parts = segments(stream)
        fusion = [part for part in parts if part.layout[0][0] == FUSION]
        outputs: list[Stream] = []
        passed: list[tuple[jax.Array, jax.Array]] = []
        auxes = [no_aux()]
        for index, part in enumerate(parts):
            if part.layout[0][0] == FUSION:
                outputs.append(part)
                continue
            sees = concatenate([part, *fusion]) if self.fuse else part
            out, aux = self._block(part.layout[0][0])(sees, fold(key, index))
            auxes.append(aux)
            length = part.x_BSD.shape[1]
            outputs.append(replace(part, x_BSD=out.x_BSD[:, :length]))
            passed.append((out.x_BSD[:, length:], part.mask_BS().any(axis=1)))
        if self.fuse and fusion:
            at = next(i for i, part in enumerate(outputs) if part.layout[0][0] == FUSION)
            outputs[at] = replace(outputs[at], x_BSD=_mean(passed, fusion[0].x_BSD))
        x_BSD = jnp.concatenate([part.x_BSD for part in outputs], axis=1)
        return replace(stream, x_BSD=x_BSD), add_up(auxes)

    def _block(self, modality: str) -> Any:
        if modality not in self.blocks:
            raise UserError(
                f"bottleneck: a stream holds modality '{modality}'; the layer has blocks of: "
                f"{', '.join(self.blocks)}. Add it to the layer's modalities."
            )
        return self.blocks[modality]


def _mean(passed: list[tuple[jax.Array, jax.Array]], before: jax.Array) -> jax.Array:
    """Return the mean of the modalities' outputs for the fusion tokens, over those that a row has; `before` if none."""
    there = sum(has_B.astype(before.dtype) for _, has_B in passed)
    total = sum(z_BND * has_B[:, None, None].astype(before.dtype) for z_BND, has_B in passed)
    count_B11 = jnp.asarray(there)[:, None, None]
    return jnp.where(count_B11 > 0, total / jnp.maximum(count_B11, 1), before)
