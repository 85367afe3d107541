"""Contrastive learning between two modalities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers

from mmjax.core.batch import Batch
from mmjax.core.bounds import COUNT, SIZE, FieldError, check
from mmjax.core.errors import UserError, nearest
from mmjax.core.parameters import declare
from mmjax.core.sharding import constrain, split_rows
from mmjax.modalities.base import Input
from mmjax.model import Model
from mmjax.nn.dense import Dense
from mmjax.nn.masks import Same
from mmjax.nn.pooler import POOLS, MapPooler
from mmjax.nn.stream import Stream, add_up, segments
from mmjax.nn.towers import Widths
from mmjax.objectives.base import Coupled, Embeds, Loss, Part, Represented

MAX_SCALE = 100.0  # bound of CLIP's learned scale


FORMS = ("softmax", "sigmoid")
MAP = "map"
PROJECTIONS = ("linear", "affine", "none")


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def bounded(x: jax.Array, bound: float) -> jax.Array:
    """Return `min(x, bound)`. Its gradient leads back from above the bound, where that of `minimum` is 0 for good."""
    return jnp.minimum(x, bound)


def _bounded_forward(x: jax.Array, bound: float) -> tuple[jax.Array, jax.Array]:
    return bounded(x, bound), x > bound


def _bounded_backward(bound: float, is_over: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    # Against a positive gradient x goes down, toward the bound.
    return (jnp.where(is_over & (g < 0), 0, g),)


bounded.defvjp(_bounded_forward, _bounded_backward)


class Scale(nnx.Module):
    """A learned positive scale `exp(s)`, stored as its logarithm; `min(exp(s), bound)` with a bound, see `bounded`."""

    def __init__(self, initial: float, bound: float | None = MAX_SCALE):
        self.log = declare((), (), initializers.constant(np.log(initial)), keep_dtype=True)
        self.bound = bound

    def __call__(self) -> jax.Array:
        log = self.log[...]
        return jnp.exp(log if self.bound is None else bounded(log, float(np.log(self.bound))))


class Bias(nnx.Module):
    """A learned number that is added to all logits."""

    def __init__(self, initial: float):
        self.value = declare((), (), initializers.constant(initial), keep_dtype=True)

    def __call__(self) -> jax.Array:
        return self.value[...]


@dataclass(frozen=True, kw_only=True)
class Contrastive(Coupled, Embeds):
    """Both directions of cross-entropy over the global batch (CLIP, Radford et al. 2021), or SigLIP's loss.

    Attributes:
      modalities: the two modalities.
      loss: `softmax`, or `sigmoid`, by which each pair of rows is a decision of its own (Zhai et al. 2023).
      positive_key: integer field; rows that share its value are positives of each other. Empty: only the pair.
      embed_dim: size of the joint space.
      init_temperature: initial temperature, learned as the logarithm of its inverse (SigLIP: 0.1). Under `softmax` it
        stays at 0.01 or above (CLIP), under `sigmoid` it has no bound (a published SigLIP's is 1 / 112.3).
      bias: of the logits under `sigmoid`, learned, to begin with.
      chunk: rows that are compared at a time, so that memory grows with the batch and not with its square
        (see `chunked_info_nce`); 0 for all at once.
      joint_forward: encode both in one pass, each attending to its own tokens alone, so that tokens of both compete for
        experts (LIMoE, Mustafa et al. 2022); without experts this changes nothing.
      poolers: by modality, how its tokens become a vector: `mean` (also where nothing is named), `class` (the first
        token, for pictures with `class_token`), `last` (the last token that exists, of a text its end) or `map`
        (attention of a learned query, then an MLP, see `mmjax.nn.pooler.MapPooler`).
      map_heads: attention heads of `map`.
      map_mlp: size of its MLP's hidden layer; 0 for four times the width.
      projections: by modality, the map to the joint space: `linear` (also where nothing is named), `affine` (with a
        bias) or `none`, where `embed_dim` is the width.
    """

    modalities: tuple[str, ...]
    loss: str = "softmax"
    positive_key: str = ""
    embed_dim: int = 256
    init_temperature: float = 0.07
    bias: float = -10.0
    chunk: int = 0
    joint_forward: bool = False
    poolers: dict[str, str] = field(default_factory=dict)
    map_heads: int = 8
    map_mlp: int = 0
    projections: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self, embed_dim=COUNT, map_heads=COUNT, map_mlp=SIZE)
        for key, known in (("poolers", (*POOLS, MAP)), ("projections", PROJECTIONS)):
            self._check_by_modality(key, known)
        if len(self.modalities) != 2 or self.init_temperature <= 0:
            raise UserError(
                "contrastive needs two modalities in 'modalities' and a positive 'init_temperature'; "
                f"found {list(self.modalities)}, {self.init_temperature}."
            )
        if self.loss not in FORMS:
            raise UserError(f"contrastive: loss is '{self.loss}'.{nearest(self.loss, FORMS)}")
        if self.loss == "softmax" and self.init_temperature < 1 / MAX_SCALE:
            raise UserError(
                f"contrastive: init_temperature is {self.init_temperature}; under softmax it is at least "
                f"{1 / MAX_SCALE}."
            )
        if self.chunk < 0:
            raise UserError(f"contrastive: chunk is {self.chunk}; it must be at least 0.")

    def _check_by_modality(self, key: str, known: Sequence[str]) -> None:
        for modality, value in getattr(self, key).items():
            if modality not in self.modalities:
                words = f"names modality '{modality}'.{nearest(modality, self.modalities)}"
                raise FieldError(self, key, words)
            if value not in known:
                raise FieldError(self, f"{key}.{modality}", f"is '{value}'.{nearest(value, known)}")

    def reads(self) -> tuple[str, ...]:
        return self.modalities

    def fields(self) -> tuple[str, ...]:
        return (self.positive_key,) if self.positive_key else ()

    def embeds(self) -> tuple[str, ...]:
        return self.modalities

    def heads(self, widths: Widths, inputs: Mapping[str, Input]) -> dict[str, Any]:
        if self.joint_forward:
            widths.one(self.modalities, "contrastive with joint_forward")
        projections = {
            m: self._projection(m, widths[m])
            for m in self.modalities
            if self.projections.get(m) != "none" or widths[m] != self.embed_dim
        }
        for m, pooler in self.poolers.items():
            if pooler == "class" and not getattr(inputs[m].modality, "class_token", False):
                raise UserError(
                    f"contrastive: poolers.{m} is 'class', and '{m}' has no class token. Set "
                    f"modalities.{m}.class_token=True, or another pooler."
                )
        poolers = {
            f"{m}_pooler": MapPooler(widths[m], self.map_heads, self.map_mlp or 4 * widths[m])
            for m, pooler in self.poolers.items()
            if pooler == MAP
        }
        bias = {"bias": Bias(self.bias)} if self.loss == "sigmoid" else {}
        bound = MAX_SCALE if self.loss == "softmax" else None
        return {**projections, **poolers, "scale": Scale(1 / self.init_temperature, bound), **bias}

    def _projection(self, modality: str, width: int) -> Dense:
        """Return the map of a modality's vector to the joint space."""
        kind = self.projections.get(modality, "linear")
        if kind == "none":
            raise UserError(
                f"contrastive: projections.{modality} is 'none', and the width of '{modality}' is {width} where "
                f"embed_dim is {self.embed_dim}. Set embed_dim={width}, or another projection."
            )
        return Dense(width, self.embed_dim, ("embed", "joint"), bias=kind == "affine")

    def embed(
        self, model: Model, modality: str, arrays: Mapping[str, jax.Array], relative_to: str = ""
    ) -> jax.Array:
        return self._embed(model, modality, arrays, None)[0]

    def _embed(
        self, model: Model, modality: str, arrays: Mapping[str, jax.Array], key: jax.Array | None
    ) -> Any:
        stream, aux = model.encode([model.tokens(modality, arrays)], key)
        return self._project(model, modality, stream), aux

    def _project(self, model: Model, modality: str, stream: Stream) -> jax.Array:
        head, kind = model.heads[self.head], self.poolers.get(modality, "mean")
        joint_BE = head[f"{modality}_pooler"](stream) if kind == MAP else POOLS[kind](stream)
        if modality in head:
            joint_BE = head[modality](joint_BE)
        return unit(joint_BE.astype(jnp.promote_types(joint_BE.dtype, jnp.float32)))

    def represent(self, model: Model, batch: Batch, key: jax.Array) -> Represented:
        if self.joint_forward:
            streams = [model.tokens(m, batch.inputs[m]) for m in self.modalities]
            out, aux = model.encode(streams, key, Same("modality"))
            pairs = zip(self.modalities, segments(out), strict=True)
            return Represented(tuple(self._project(model, m, outputs) for m, outputs in pairs), aux)
        instances = [
            self._embed(model, m, batch.inputs[m], jax.random.fold_in(key, i))
            for i, m in enumerate(self.modalities)
        ]
        (a_BE, aux_a), (b_BE, aux_b) = instances
        return Represented((a_BE, b_BE), add_up([aux_a, aux_b]))

    def compare(self, model: Model, rows: Any, batch: Batch) -> Loss:
        a_BE, b_BE = rows
        valid_B = batch.valid
        concept_B = concepts(batch, self.positive_key)
        scale = model.heads[self.head].scale()
        known = {"scale": scale}
        if self.loss == "sigmoid":
            known["bias"] = model.heads[self.head].bias()
            comparison = sigmoid_loss(
                a_BE, b_BE, scale, known["bias"], concept_B, valid_B, self.chunk
            )
        elif 0 < self.chunk < valid_B.shape[0]:
            comparison = chunked_info_nce(a_BE, b_BE, scale, concept_B, valid_B, self.chunk)
        else:
            comparison = info_nce(a_BE, b_BE, scale, concept_B, valid_B)
        metrics = {**known, "batch_recall": comparison.recall, "baseline": comparison.baseline}
        return Loss(comparison.loss, metrics, parts={"": Part(1.0, valid_B.sum(), compares=True)})


def concepts(batch: Batch, field: str) -> jax.Array:
    """Return the integer by which rows are positives of each other, `[B]`; without a field each row has its own."""
    result: jax.Array = batch.fields[field] if field else jnp.arange(batch.valid.shape[0])
    return result


def unit(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Return `x / sqrt(|x|^2 + eps^2)`: unit vectors, with a gradient at zero."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + eps**2)


class Comparison(NamedTuple):
    """The result of comparing the rows of a batch.

    Attributes:
      loss: mean over the rows.
      recall: at 1, within the batch.
      baseline: the loss of logits that are independent of the pairs.
    """

    loss: jax.Array
    recall: jax.Array
    baseline: jax.Array


def info_nce(
    a_BE: jax.Array, b_BE: jax.Array, scale: jax.Array, concept_B: jax.Array, valid_B: jax.Array
) -> Comparison:
    """Return the symmetric InfoNCE with several positives per row; its baseline is the loss of equal logits.

    For logits `l_ij = scale <a_i, b_j>` and the positives `P_i` (valid rows with i's concept, i among them):
    `1/2 sum over both directions of mean_i [ logsumexp_j l_ij - mean_{j in P_i} l_ij ]`, the cross-entropy to
    the uniform distribution over the positives. Invalid rows are neither anchors nor candidates. With one
    positive each this is CLIP's loss (Radford et al. 2021, figure 3).
    """
    return info_nce_of(scale * (a_BE @ b_BE.T), concept_B, valid_B)


def info_nce_of(logits_BB: jax.Array, concept_B: jax.Array, valid_B: jax.Array) -> Comparison:
    """Return `info_nce` of logits."""
    both_BB = valid_B[:, None] & valid_B[None, :]
    positive_BB = (concept_B[:, None] == concept_B[None, :]) & both_BB
    anchors = jnp.maximum(valid_B.sum(), 1)
    # Devices that hold rows add up columns, and send each other the sums: not all logits, as for a transpose.
    logits_BB = constrain(logits_BB, ("batch", None))
    forward, backward = (
        _cross_entropy(logits_BB, positive_BB, valid_B, valid_B, axis) / anchors for axis in (1, 0)
    )
    hits = _hits(logits_BB, positive_BB, valid_B, valid_B)
    loss = (forward + backward) / 2
    return Comparison(loss, hits / anchors, _of_equal(anchors, loss.dtype))


def chunked_info_nce(
    a_BE: jax.Array,
    b_BE: jax.Array,
    scale: jax.Array,
    concept_B: jax.Array,
    valid_B: jax.Array,
    chunk: int,
) -> Comparison:
    """Return `info_nce` with `chunk` anchors at a time in each direction: `[chunk, B]` logits in memory, not `[B, B]`.

    The backward pass computes a chunk's logits again, so that it keeps none of them either: 8 products of
    `[B, E]` by `[E, B]` in place of 3, which is little beside an encoder.
    """
    parts = _parts((a_BE, b_BE, concept_B, valid_B), chunk)
    # Every device compares its own rows of a chunk with the candidates of all.
    every_a_BE, every_b_BE = constrain(a_BE, (None, None)), constrain(b_BE, (None, None))
    every_concept_B, every_valid_B = constrain(concept_B, (None,)), constrain(valid_B, (None,))

    @jax.checkpoint
    def compared(part: Any) -> tuple[jax.Array, jax.Array]:
        a_CE, b_CE, concept_C, valid_C = part
        both_CB = valid_C[:, None] & every_valid_B[None, :]
        positive_CB = (concept_C[:, None] == every_concept_B[None, :]) & both_CB
        forward_CB, backward_CB = scale * (a_CE @ every_b_BE.T), scale * (b_CE @ every_a_BE.T)
        loss = sum(
            _cross_entropy(logits_CB, positive_CB, valid_C, every_valid_B)
            for logits_CB in (forward_CB, backward_CB)
        )
        return jnp.asarray(loss), _hits(forward_CB, positive_CB, valid_C, every_valid_B)

    losses, hits = jax.lax.map(compared, parts)
    anchors = jnp.maximum(valid_B.sum(), 1)
    loss = losses.sum() / anchors / 2
    return Comparison(loss, hits.sum() / anchors, _of_equal(anchors, loss.dtype))


def _of_equal(anchors: jax.Array, dtype: Any) -> jax.Array:
    """Return the cross-entropy of equal logits."""
    return jnp.log(anchors.astype(dtype))


def _parts(arrays: tuple[jax.Array, ...], chunk: int) -> tuple[jax.Array, ...]:
    """Return rows as `[B / chunk, chunk, ...]`."""
    rows = arrays[0].shape[0]
    if rows % chunk:
        raise UserError(
            f"contrastive: chunk {chunk} does not divide the batch of {rows}. Choose one that does, or 0."
        )
    return tuple(split_rows(x, rows // chunk) for x in arrays)


def sigmoid_loss(
    a_BE: jax.Array,
    b_BE: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    concept_B: jax.Array,
    valid_B: jax.Array,
    chunk: int = 0,
) -> Comparison:
    """Return SigLIP's loss (Zhai et al. 2023, section 3.2); its baseline is that of the best constant.

    `-(1 / B) sum_ij log sigmoid(z_ij (scale <a_i, b_j> + bias))` over valid rows, of which there are B; z is 1 for rows
    of one concept and -1 for others. With `chunk`, that many rows a are compared at a time (see `chunked_info_nce`).
    """
    every_b_BE, every_concept_B = constrain(b_BE, (None, None)), constrain(concept_B, (None,))
    every_valid_B = constrain(valid_B, (None,))

    def compared(part: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        a_CE, concept_C, valid_C = part
        logits_CB = scale * (a_CE @ every_b_BE.T) + bias
        both_CB = valid_C[:, None] & every_valid_B[None, :]
        positive_CB = (concept_C[:, None] == every_concept_B[None, :]) & both_CB
        costs_CB = jax.nn.softplus(jnp.where(positive_CB, -logits_CB, logits_CB))
        hits = _hits(logits_CB, positive_CB, valid_C, every_valid_B)
        return jnp.where(both_CB, costs_CB, 0).sum(), hits, positive_CB.sum()

    if 0 < chunk < valid_B.shape[0]:
        parts = _parts((a_BE, concept_B, valid_B), chunk)
        sums = [x.sum() for x in jax.lax.map(jax.checkpoint(compared), parts)]
    else:
        sums = list(compared((a_BE, concept_B, valid_B)))
    cost, hits, positives = sums
    rows = jnp.maximum(valid_B.sum(), 1).astype(cost.dtype)
    share = positives.astype(cost.dtype) / jnp.square(rows)
    entropy = -jax.scipy.special.xlogy(share, share) - jax.scipy.special.xlogy(1 - share, 1 - share)
    return Comparison(cost / rows, hits / rows, entropy * rows)


def _cross_entropy(
    logits_RB: jax.Array,
    positive_RB: jax.Array,
    valid_R: jax.Array,
    valid_B: jax.Array,
    axis: int = 1,
) -> jax.Array:
    """Sum over valid anchors R the cross-entropy to the uniform distribution over their positives.

    Args:
      axis: of the candidates B; with 0 the arrays are `[B, R]`.
    """
    # Finite stand-in for -inf: a row without any candidate must give zero, not NaN, also backwards.
    there = jnp.expand_dims(valid_B, 1 - axis)
    masked_RB = jnp.where(there, logits_RB, jnp.finfo(logits_RB.dtype).min)
    sums = (
        positive_RB.sum(axis=axis),
        jnp.where(positive_RB, logits_RB, 0).sum(axis=axis),
        jax.nn.logsumexp(masked_RB, axis=axis),
    )
    count_R, total_R, log_R = sums if axis else (constrain(x, (None,)) for x in sums)
    loss_R = log_R - total_R / jnp.maximum(count_R, 1)
    return jnp.where(valid_R, loss_R, 0).sum()


def _hits(
    logits_RB: jax.Array, positive_RB: jax.Array, valid_R: jax.Array, valid_B: jax.Array
) -> jax.Array:
    """Return how many valid anchors have a positive as their best candidate.

    Ties count against the model, and so does NaN, as in `mmjax.evaluators.retrieval`: one that maps everything to one
    point is right of no anchor that has a negative.
    """
    best_R = jnp.where(positive_RB, logits_RB, -jnp.inf).max(axis=1)
    rival_RB = ~(logits_RB < best_R[:, None]) & valid_B[None, :] & ~positive_RB
    return (positive_RB.any(axis=1) & ~rival_RB.any(axis=1) & valid_R).sum()
