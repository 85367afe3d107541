"""Classification of one or several modalities: softmax cross-entropy over integer labels."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from mmjax.core.batch import Batch
from mmjax.core.errors import UserError, nearest
from mmjax.modalities.base import Input
from mmjax.model import Model
from mmjax.nn.dense import Dense, LayerNorm, lecun
from mmjax.nn.stream import mean_pool
from mmjax.objectives.base import Classifies, Loss, Objective
from mmjax.sources.base import Example

INITIALIZERS = {"zeros": initializers.zeros, "lecun": lecun}
NORMS = ("none", "layer")


class Classifier(nnx.Module):
    """`[B, D] -> [B, classes]`: a norm, where asked for, and a linear map."""

    def __init__(self, width: int, classes: int, norm: str, init: str):
        self.norm = LayerNorm(width) if norm == "layer" else None
        self.logits = Dense(width, classes, ("embed", None), init=INITIALIZERS[init])

    def __call__(self, pooled_BD: jax.Array) -> jax.Array:
        return self.logits(pooled_BD if self.norm is None else self.norm(pooled_BD))


@dataclass(frozen=True, kw_only=True)
class Classification(Objective, Classifies):
    """Mean-pooled tokens, a linear map to classes, cross-entropy to the label.

    Attributes:
      classes: how many there are; labels are integers in [0, classes).
      modalities: what is classified; the trunk sees the tokens of all of them as one sequence.
      label: integer field with the class.
      smoothing: fraction of the target spread evenly over all classes in [0, 1).
      norm: `layer` for a LayerNorm between pooling and the linear map, or `none` (the trunk ends with one).
      init: of the linear map: `zeros`, where the loss starts at log(classes) whatever the input, or `lecun`.
    """

    classes: int
    modalities: tuple[str, ...] = ("image",)
    label: str = "label"
    smoothing: float = 0.0
    norm: str = "none"
    init: str = "zeros"

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise UserError(f"classification: classes is {self.classes}; it must be at least 2.")
        if not self.modalities:
            raise UserError("classification: modalities is empty; name one at least.")
        if not 0 <= self.smoothing < 1:
            raise UserError(f"classification: smoothing is {self.smoothing}; expected [0, 1).")
        for key, value, known in (
            ("norm", self.norm, NORMS),
            ("init", self.init, tuple(INITIALIZERS)),
        ):
            if value not in known:
                raise UserError(f"classification: {key} is '{value}'.{nearest(value, known)}")

    def reads(self) -> tuple[str, ...]:
        return self.modalities

    def fields(self) -> tuple[str, ...]:
        return (self.label,)

    def check_example(self, example: Example) -> None:
        check_label(self.label, example[self.label], self.classes)

    def heads(self, width: int, inputs: Mapping[str, Input]) -> dict[str, Any]:
        return {"classifier": Classifier(width, self.classes, self.norm, self.init)}

    def predicts(self) -> tuple[str, ...]:
        return self.reads()

    def predict(self, model: Model, inputs: Mapping[str, Mapping[str, jax.Array]]) -> jax.Array:
        return self._predict(model, inputs, None)[0]

    def _predict(self, model: Model, inputs: Mapping[str, Any], key: jax.Array | None) -> Any:
        stream, aux = model.encode([model.tokens(m, inputs[m]) for m in self.modalities], key)
        logits_BC = model.heads[self.head].classifier(mean_pool(stream))
        return logits_BC.astype(jnp.promote_types(logits_BC.dtype, jnp.float32)), aux

    def __call__(self, model: Model, batch: Batch, key: jax.Array) -> Loss:
        logits_BC, aux = self._predict(model, batch.inputs, key)
        label_B, valid_B = batch.fields[self.label], batch.valid
        value = cross_entropy(logits_BC, label_B, valid_B, self.smoothing)
        right_B = is_right(logits_BC, label_B) & valid_B
        metrics = {
            "accuracy": right_B.sum() / jnp.maximum(valid_B.sum(), 1),
            # What equal logits cost, with any smoothing.
            "baseline": jnp.asarray(math.log(self.classes), value.dtype),
        }
        return Loss(value + aux.loss, {**metrics, **aux.metrics()}, aux.proposals)


def is_right(logits_BC: jax.Array, label_B: jax.Array) -> jax.Array:
    """Return whether the label's logit is above all others, `[B]`.

    Ties count against the model, and so does NaN, as in `mmjax.evaluators.accuracy`.
    """
    inside_B = (label_B >= 0) & (label_B < logits_BC.shape[1])
    at_B1 = jnp.where(inside_B, label_B, 0)[:, None]
    own_B1 = jnp.take_along_axis(logits_BC, at_B1, axis=1)
    return inside_B & ((~(logits_BC < own_B1)).sum(axis=1) == 1)


def cross_entropy(
    logits_BC: jax.Array, label_B: jax.Array, valid_B: jax.Array, smoothing: float = 0.0
) -> jax.Array:
    """Return the mean over valid rows of the cross-entropy to `q = (1 - s) [c = label] + s / C`.

    `-sum_c q_c log softmax(l)_c` (Szegedy et al. 2016, section 7); zero where no row is valid. A valid row with a label
    outside [0, C) makes it NaN: such labels are refused on the host, and must not train if they get here.
    """
    classes = logits_BC.shape[1]
    inside_B = (label_B >= 0) & (label_B < classes)
    at_B1 = jnp.where(inside_B, label_B, 0)[:, None]
    log_BC = jax.nn.log_softmax(logits_BC, axis=1)
    own_B = jnp.take_along_axis(log_BC, at_B1, axis=1)[:, 0]
    loss_B = -(1 - smoothing) * own_B - smoothing * log_BC.mean(axis=1)
    loss_B = jnp.where(valid_B, jnp.where(inside_B, loss_B, jnp.nan), 0)
    return loss_B.sum() / jnp.maximum(valid_B.sum(), 1)


def check_label(name: str, value: Any, classes: int) -> None:
    """Raise `UserError` unless `value` of field `name` is an integer in [0, classes)."""
    try:
        label = operator.index(value)
    except TypeError:
        raise UserError(
            f"field '{name}' is {str(value)[:40]!r} ({type(value).__name__}); a label is an integer "
            f"from 0 to {classes - 1}."
        ) from None
    if not 0 <= label < classes:
        raise UserError(
            f"field '{name}' has the value {label}, outside [0, {classes}): the objective has "
            f"classes = {classes}. Raise it, or correct the labels (they start at 0)."
        )
