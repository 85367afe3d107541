"""Classification of several modalities through fusion tokens: Zorro, MBT, and full fusion beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from mmjax.blocks.bottleneck import FUSION
from mmjax.core.batch import Batch
from mmjax.core.errors import UserError, nearest
from mmjax.core.parameters import declare
from mmjax.modalities.base import Input
from mmjax.model import Model
from mmjax.nn.masks import FULL, Mask, QueryIs, Same
from mmjax.nn.stream import Aux, Stream, mean_pool, segments
from mmjax.objectives.base import Loss
from mmjax.objectives.classification import Classification, Classifier, cross_entropy

MASKS: Mapping[str, Mask] = {
    "full": FULL,
    "zorro": Same("modality") | QueryIs("modality", FUSION),
}
READINGS = ("each", "mean")
LOSSES = ("mean_logits", "each")
SHARED = "shared"  # the name of a classifier that reads every modality


class Fused(nnx.Module):
    """The fusion tokens, and the classifiers by output."""

    def __init__(self, width: int, tokens: int, classifiers: Mapping[str, Classifier]):
        self.tokens = declare(
            (tokens, width), (None, "embed"), initializers.normal(0.02), decay=False
        )
        self.classifiers = nnx.Dict(classifiers)


@dataclass(frozen=True, kw_only=True)
class Fusion(Classification):
    """`Classification` with classifiers of each modality's tokens and of fusion tokens.

    Zorro (Recasens et al. 2023): `mask` is `zorro` (a modality's tokens see their own kind only, the fusion tokens see
    all) and `readout` is `each` (the loss is the mean of those of each modality's output and of the fusion output), so
    that one modality alone is classified as if the others had never been there. MBT (Nagrani et al. 2021): layers are
    `bottleneck`s, `readout` is `mean` (a prediction is the mean of the modalities' logits), `loss` is `each`, and the
    classifier is `shared`.

    Attributes:
      tokens: number of fusion tokens.
      mask: `zorro`, or `full`.
      readout: `each` or `mean`.
      loss: under the reading `mean`, the loss of the mean of the modalities' logits (`mean_logits`), or the mean of
        each modality's loss (`each`); under the reading `each` it is always the latter.
      shared: one classifier for all outputs, in place of one for each.
    """

    tokens: int = 4
    mask: str = "zorro"
    readout: str = "each"
    loss: str = "mean_logits"
    shared: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if FUSION in self.modalities:
            raise UserError(
                f"fusion: modalities is {list(self.modalities)}; the name '{FUSION}' is that of its own tokens."
            )
        if self.tokens < 1:
            raise UserError(f"fusion: tokens is {self.tokens}; it must be at least 1.")
        for key, known in (("mask", tuple(MASKS)), ("readout", READINGS), ("loss", LOSSES)):
            if getattr(self, key) not in known:
                value = getattr(self, key)
                raise UserError(f"fusion: {key} is '{value}'.{nearest(value, known)}")

    def heads(self, width: int, inputs: Mapping[str, Input]) -> dict[str, Any]:
        names = (SHARED,) if self.shared else self._read()
        classifiers = {
            name: Classifier(width, self.classes, self.norm, self.init) for name in names
        }
        return {"fused": Fused(width, self.tokens, classifiers)}

    def _read(self) -> tuple[str, ...]:
        """Return the names of the outputs: modalities, and the fusion tokens where these are read."""
        return (*self.modalities, *([FUSION] if self.readout == "each" else []))

    def outputs(
        self, model: Model, inputs: Mapping[str, Any], key: jax.Array | None
    ) -> tuple[dict[str, jax.Array], Aux]:
        """Return logits `[B, C]` of each modality in `inputs`, and of the fusion tokens where these are read."""
        fused = model.heads[self.head].fused
        streams = [model.tokens(name, inputs[name]) for name in self.modalities if name in inputs]
        first = streams[0].x_BSD
        tokens = jnp.broadcast_to(
            fused.tokens[...].astype(first.dtype), (first.shape[0], self.tokens, first.shape[2])
        )
        streams.append(Stream(tokens, layout=((FUSION, self.tokens),)))
        out, aux = model.encode(
            [replace(s, coordinates={}) for s in streams], key, MASKS[self.mask]
        )
        pooled = {part.layout[0][0]: mean_pool(part) for part in segments(out)}
        wide = jnp.promote_types(first.dtype, jnp.float32)
        read = {name: x for name, x in pooled.items() if name in self._read()}
        classifiers = {n: fused.classifiers[SHARED if self.shared else n] for n in read}
        return {name: classifiers[name](x).astype(wide) for name, x in read.items()}, aux

    def predict(self, model: Model, inputs: Mapping[str, Mapping[str, jax.Array]]) -> jax.Array:
        """Return the output of one modality; of several, that of the fusion tokens or the mean of theirs."""
        logits, _ = self.outputs(model, inputs, None)
        if self.readout == "mean":
            return mean(logits)
        return logits[FUSION] if len(inputs) > 1 else logits[next(iter(inputs))]

    def __call__(self, model: Model, batch: Batch, key: jax.Array) -> Loss:
        logits, aux = self.outputs(model, batch.inputs, key)
        label_B, valid_B = batch.fields[self.label], batch.valid
        if self.readout == "mean" and self.loss == "mean_logits":
            logits = {"all": mean(logits)}
        losses = {
            name: cross_entropy(x, label_B, valid_B, self.smoothing) for name, x in logits.items()
        }
        value = sum(losses.values()) / len(losses)
        return Loss(
            value + aux.loss,
            {f"loss_{name}": x for name, x in losses.items()} | aux.metrics(),
            aux.proposals,
        )


def mean(logits: Mapping[str, jax.Array]) -> jax.Array:
    """Return the mean over outputs."""
    return jnp.stack(list(logits.values())).mean(axis=0)
