"""Contrastive learning between two or more modalities, with several clips or sentences of an example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from mmjax.core.batch import Batch
from mmjax.core.bounds import AMOUNT, COUNT, check
from mmjax.core.errors import UserError, nearest
from mmjax.core.parameters import declare
from mmjax.modalities.base import PRESENT, Input
from mmjax.model import Model
from mmjax.nn.dense import Dense, LayerNorm
from mmjax.nn.stream import add_up, mean_pool
from mmjax.nn.towers import Widths
from mmjax.objectives.base import Coupled, Embeds, Loss, Part, Represented
from mmjax.objectives.contrastive import concepts, info_nce_of, unit

SPACES = ("disjoint", "linear")
Pair = tuple[str, str]


class Temperature(nnx.Module):
    """A learned temperature `relu(t) + 1e-6`, as IMP's released code has it (objectives.py), and by choice no other.

    It can reach 0: from there t has no gradient, logits are times 1e6, and the pair is lost. The metric `temperature`
    shows it. `contrastive` learns the logarithm of a scale instead, which has no such end.
    """

    def __init__(self, initial: float):
        self.value = declare((), (), initializers.constant(initial), keep_dtype=True)

    def __call__(self) -> jax.Array:
        return jax.nn.relu(self.value[...]) + 1e-6


class Space(nnx.Module):
    """`[..., D] -> [..., E]`: `LayerNorm(gelu(x W1 + b1) W2 + b2)`."""

    def __init__(self, width: int, joint: int):
        self.up = Dense(width, joint, ("embed", "joint"))
        self.out = Dense(joint, joint, ("joint", None))
        self.norm = LayerNorm(joint)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.out(jax.nn.gelu(self.up(x), approximate=True)))


@dataclass(frozen=True, kw_only=True)
class CrossModal(Coupled, Embeds):
    """The mean over pairs of modalities of both directions of cross-entropy (IMP, Akbari et al. 2023).

    Where an example has several instances, those of two rows are compared as bags (MIL-NCE, Miech et al. 2020,
    equation 1): `l_ij = logsumexp over their present instances n, m of <a_in, b_jm> / t`.

    Attributes:
      modalities: two modalities or more.
      weights: of each pair, `"vision text"`, in the mean; 1 by default, 0 excludes the pair.
      positive_key: integer field; rows that share its value are positives of each other. Empty: only the pair.
      space: `disjoint`, two layers and a norm for each modality towards each other one; or `linear`, one map for
        each modality, to a space of all.
      embed_dim: size of a space.
      init_temperature: temperature to begin with, learned for each pair as `relu(t) + 1e-6` (see `Temperature`).
    """

    modalities: tuple[str, ...]
    weights: dict[str, float] = field(default_factory=dict)
    positive_key: str = ""
    space: str = "disjoint"
    embed_dim: int = 256
    init_temperature: float = 0.2

    def __post_init__(self) -> None:
        check(self, embed_dim=COUNT, weights=AMOUNT)
        if len(set(self.modalities)) < 2 or len(set(self.modalities)) < len(self.modalities):
            raise UserError(
                f"cross_modal: modalities is {list(self.modalities)}; name two different modalities or more."
            )
        if self.space not in SPACES:
            raise UserError(f"cross_modal: space is '{self.space}'.{nearest(self.space, SPACES)}")
        if self.init_temperature <= 0:
            raise UserError(
                f"cross_modal: init_temperature is {self.init_temperature}; it must be above 0."
            )
        known = [" ".join(pair) for pair in combinations(self.modalities, 2)]
        for name in self.weights:
            if name not in known:
                raise UserError(f"cross_modal: no pair '{name}'.{nearest(name, known)}")
        if not self._pairs():
            raise UserError("cross_modal: every pair has the weight 0.")

    def _pairs(self) -> dict[Pair, float]:
        """Return the pairs that count, and their parts of the mean."""
        weights = {p: self.weights.get(" ".join(p), 1.0) for p in combinations(self.modalities, 2)}
        total = sum(weights.values())
        return {pair: weight / total for pair, weight in weights.items() if weight}

    def _partners(self, modality: str) -> list[str]:
        return [two if one == modality else one for one, two in self._pairs() if modality in (one, two)]  # fmt: skip

    def _spaces(self) -> dict[tuple[str, str], str]:
        """Return the head's part for each ordered pair."""
        ordered = [(m, other) for m in self.modalities for other in self._partners(m)]
        return {(m, o): f"{m}_to_{o}" if self.space == "disjoint" else m for m, o in ordered}

    def reads(self) -> tuple[str, ...]:
        return self.modalities

    def fields(self) -> tuple[str, ...]:
        return (self.positive_key,) if self.positive_key else ()

    def embeds(self) -> tuple[str, ...]:
        return self.modalities

    def check_inputs(self, inputs: Mapping[str, Input]) -> None:
        del inputs  # several instances, and tokens dropped: any will do

    def heads(self, widths: Widths, inputs: Mapping[str, Input]) -> dict[str, Any]:
        def space(modality: str) -> Any:
            if self.space == "disjoint":
                return Space(widths[modality], self.embed_dim)
            return Dense(widths[modality], self.embed_dim, ("embed", "joint"), bias=False)

        modality_of = {name: modality for (modality, _), name in self._spaces().items()}
        spaces = {name: space(modality) for name, modality in modality_of.items()}
        return {
            **spaces,
            **{_temperature(p): Temperature(self.init_temperature) for p in self._pairs()},
        }

    def embed(
        self, model: Model, modality: str, arrays: Mapping[str, jax.Array], relative_to: str = ""
    ) -> jax.Array:
        pooled, _ = self._pooled(model, modality, arrays, None)
        return self._vectors(model, pooled, modality, relative_to or self._partners(modality)[0])

    def _pooled(
        self, model: Model, modality: str, arrays: Mapping[str, jax.Array], key: jax.Array | None
    ) -> Any:
        stream, aux = model.encode([model.tokens(modality, arrays)], key)
        return mean_pool(stream), aux

    def _vectors(
        self, model: Model, pooled: jax.Array, modality: str, relative_to: str
    ) -> jax.Array:
        x = model.heads[self.head][self._spaces()[modality, relative_to]](pooled)
        return unit(x.astype(jnp.promote_types(x.dtype, jnp.float32)))

    def represent(self, model: Model, batch: Batch, key: jax.Array) -> Represented:
        """Return the vectors `[B, N, E]` of each ordered pair."""
        rows: dict[str, jax.Array] = {}
        auxes, size = [], batch.valid.shape[0]
        for index, modality in enumerate(self.modalities):
            arrays = batch.inputs[modality]
            key_of = jax.random.fold_in(key, index)
            pooled, aux = self._pooled(model, modality, arrays, key_of)
            auxes.append(aux)
            for other in self._partners(modality):
                vectors = self._vectors(model, pooled, modality, other)
                rows[f"{modality} {other}"] = vectors.reshape(size, -1, self.embed_dim)
        return Represented(rows, add_up(auxes))

    def compare(self, model: Model, rows: Any, batch: Batch) -> Loss:
        valid_B, one_B1 = batch.valid, jnp.ones((batch.valid.shape[0], 1), bool)
        present = {m: batch.inputs[m].get(PRESENT, one_B1) for m in self.modalities}
        concept_B = concepts(batch, self.positive_key)
        total = baseline = anchors = jnp.zeros(())
        metrics: dict[str, jax.Array] = {}
        for (one, two), weight in self._pairs().items():
            t = model.heads[self.head][_temperature((one, two))]()
            logits_BB = bag_logits(
                rows[f"{one} {two}"] / t, rows[f"{two} {one}"], present[one], present[two]
            )
            there_B = valid_B & present[one].any(axis=1) & present[two].any(axis=1)
            comparison = info_nce_of(logits_BB, concept_B, there_B)
            total = total + weight * comparison.loss
            anchors = anchors + weight * there_B.sum().astype(comparison.loss.dtype)
            baseline = baseline + weight * comparison.baseline
            metrics |= {
                f"batch_recall {one} {two}": comparison.recall,
                f"temperature {one} {two}": t,
            }
        parts = {"": Part(1.0, anchors, compares=True)}
        return Loss(total, {**metrics, "baseline": baseline}, parts=parts)


def _temperature(pair: Pair) -> str:
    return f"temperature_{'_'.join(pair)}"


def bag_logits(
    a_BNE: jax.Array, b_BME: jax.Array, present_BN: jax.Array, present_BM: jax.Array
) -> jax.Array:
    """Return `l_ij = logsumexp over n, m of <a_in, b_jm>` over the instances that are present, `[B, B]`.

    Very small, and without a gradient, where one of the two has none.
    """
    products = jnp.einsum("ine,jme->ijnm", a_BNE, b_BME)
    present = present_BN[:, None, :, None] & present_BM[None, :, None, :]
    # Finite: -inf would make gradients NaN.
    masked = jnp.where(present, products, jnp.finfo(products.dtype).min / 2)
    return jax.nn.logsumexp(masked, axis=(2, 3))
