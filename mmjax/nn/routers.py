"""Routers: which tokens each expert takes, and with which weight. Pure functions of logits, in float32 or wider.

Tokens come in groups of T, which compete for the C slots of each expert; invalid ones take none. A router gives
`Slots`, whatever its rule.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mmjax.core.errors import UserError, nearest

SCORES = ("softmax", "sigmoid")


class Dispatch(abc.ABC):
    """Which tokens come to the slots of the experts, and what comes back of them."""

    @abc.abstractmethod
    def gather(self, x_GTD: jax.Array) -> jax.Array:
        """What the slots get, `[G, E, C, D]`."""

    @abc.abstractmethod
    def combine(self, y_GECD: jax.Array, tokens: int) -> jax.Array:
        """The tokens' sums of what the experts made of the slots, `[G, T, D]`."""

    @abc.abstractmethod
    def parts(self, tokens: int) -> jax.Array:
        """How much of each token is each expert's, `[G, T, E]`: 1 or 0 where a slot holds one token."""


@struct.dataclass
class Slots(Dispatch):
    """Slots that hold a token each: gathered, not multiplied out, so that moving them costs no product.

    Attributes:
      index_GEC: the token, int32 in [0, T).
      gate_GEC: the weight of the expert's output in the token's sum; 0 in a slot that is empty.
    """

    index_GEC: jax.Array
    gate_GEC: jax.Array

    def gather(self, x_GTD: jax.Array) -> jax.Array:
        return jax.vmap(lambda x, index: x[index])(x_GTD, self.index_GEC)

    def combine(self, y_GECD: jax.Array, tokens: int) -> jax.Array:
        weighed_GECD = y_GECD * self.gate_GEC[..., None].astype(y_GECD.dtype)

        def summed(index_EC: jax.Array, y_ECD: jax.Array) -> jax.Array:
            zeros = jnp.zeros((tokens, y_ECD.shape[-1]), y_ECD.dtype)
            return zeros.at[index_EC].add(y_ECD)

        return jax.vmap(summed)(self.index_GEC, weighed_GECD)

    def parts(self, tokens: int) -> jax.Array:
        def of_expert(index_C: jax.Array, gate_C: jax.Array) -> jax.Array:
            return jnp.zeros(tokens, gate_C.dtype).at[index_C].max(gate_C > 0)

        return jax.vmap(jax.vmap(of_expert, out_axes=1))(self.index_GEC, self.gate_GEC)


@struct.dataclass
class Mixture(Dispatch):
    """Slots that hold a mean of all tokens, and tokens that are one of all slots.

    Attributes:
      dispatch_GTEC: weight of each token in each slot.
      combine_GTEC: weight of each slot's output in each token.
    """

    dispatch_GTEC: jax.Array
    combine_GTEC: jax.Array

    def gather(self, x_GTD: jax.Array) -> jax.Array:
        return jnp.einsum("gtec,gtd->gecd", self.dispatch_GTEC.astype(x_GTD.dtype), x_GTD)

    def combine(self, y_GECD: jax.Array, tokens: int) -> jax.Array:
        del tokens
        return jnp.einsum("gtec,gecd->gtd", self.combine_GTEC.astype(y_GECD.dtype), y_GECD)

    def parts(self, tokens: int) -> jax.Array:
        del tokens
        return self.combine_GTEC.sum(axis=-1)


@dataclass(frozen=True)
class Router(abc.ABC):
    """A rule, of logits that a token has for every expert (`columns` of them for each)."""

    columns = 1
    noise = 0.0

    @abc.abstractmethod
    def slots(self, tokens: int, experts: int) -> int:
        """C, of each expert in each group."""

    @abc.abstractmethod
    def meets(self, experts: int) -> float:
        """How many of the experts a token meets, in the mean and where none is dropped."""

    @abc.abstractmethod
    def route(self, logits_GTL: jax.Array, valid_GT: jax.Array) -> Dispatch:
        """The slots, by the logits `[G, T, experts * columns]` of each token."""

    def scores(self, logits_GTE: jax.Array) -> jax.Array:
        """The gates' values, `[..., E]`."""
        return jax.nn.softmax(widened(logits_GTE))


@dataclass(frozen=True)
class Limited(Router):
    """A rule that gives each slot one token.

    Attributes:
      capacity: slots of all experts together, as a multiple of the tokens (times `top`, where tokens choose). Tokens
        that do not exist count here, so that shapes are static: where many are missing, others find a slot more often.
    """

    capacity: float = 1.0

    def __post_init__(self) -> None:
        if self.capacity <= 0:
            raise UserError(f"router: capacity is {self.capacity}; it must be above 0.")


@dataclass(frozen=True)
class ExpertChoice(Limited):
    """Each expert takes the tokens that score highest with it (Zhou et al. 2022; IMP); none is asked to balance.

    Of equal scores the earlier token's comes first.

    Attributes:
      score: `softmax` over experts, or `sigmoid`, which knows nothing of other experts (MoMa, Lin et al. 2024).
    """

    score: str = "softmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in SCORES:
            raise UserError(f"router: score is '{self.score}'.{nearest(self.score, SCORES)}")

    def slots(self, tokens: int, experts: int) -> int:
        return min(tokens, max(1, round(self.capacity * tokens / experts)))

    def meets(self, experts: int) -> float:
        return min(self.capacity, experts)

    def scores(self, logits_GTE: jax.Array) -> jax.Array:
        wide = widened(logits_GTE)
        return jax.nn.softmax(wide) if self.score == "softmax" else jax.nn.sigmoid(wide)

    def route(self, logits_GTL: jax.Array, valid_GT: jax.Array) -> Slots:
        _, tokens, experts = logits_GTL.shape
        scores_GTE = self.scores(logits_GTL)
        scores_GET = jnp.where(valid_GT[..., None], scores_GTE, 0).swapaxes(1, 2)
        # Tokens that are not there come last, also behind those whose score is 0.
        ranked_GET = jnp.where(valid_GT[:, None], scores_GET, -1)
        _, index_GEC = jax.lax.top_k(ranked_GET, self.slots(tokens, experts))
        return Slots(index_GEC, jnp.take_along_axis(scores_GET, index_GEC, axis=2))


@dataclass(frozen=True)
class TokenChoice(Limited):
    """Each token goes to the experts that score highest with it (Shazeer et al. 2017), if they have a slot left.

    First choices come before second ones; among these earlier tokens come first, or with `priority` those whose best
    score is highest (batch priority routing, Riquelme et al. 2021). Of equal scores the first expert's is chosen.

    Attributes:
      top: experts of a token.
      priority: sort tokens by their best score.
      noise: standard deviation of what training adds to the logits, as a multiple of 1 / experts (V-MoE: 1).
    """

    top: int = 1
    priority: bool = False
    noise: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top < 1:
            raise UserError(f"router: top is {self.top}; it must be at least 1.")
        if self.noise < 0:
            raise UserError(f"router: noise is {self.noise}; it must be at least 0.")

    def slots(self, tokens: int, experts: int) -> int:
        return min(tokens, math.ceil(self.capacity * self.top * tokens / experts))

    def meets(self, experts: int) -> float:
        return min(self.top, experts)

    def route(self, logits_GTL: jax.Array, valid_GT: jax.Array) -> Slots:
        groups, tokens, experts = logits_GTL.shape
        if self.top > experts:
            raise UserError(f"router: top is {self.top}, of {experts} experts.")
        gate_GTK, expert_GTK = jax.lax.top_k(self.scores(logits_GTL), self.top)
        order_GT = jnp.broadcast_to(jnp.arange(tokens), (groups, tokens))
        if self.priority:
            best_GT = jnp.where(valid_GT, gate_GTK[..., 0], -1)
            order_GT = jnp.argsort(-best_GT, axis=1, stable=True)
        count = self.slots(tokens, experts)
        # Choices in the order in which they are served: first ones of all tokens, then second ones.
        served = [
            jnp.take_along_axis(x, order_GT[..., None], axis=1).swapaxes(1, 2).reshape(groups, -1)
            for x in (gate_GTK, expert_GTK)
        ]
        gate_GM, expert_GM = served
        token_GM = jnp.tile(order_GT, (1, self.top))
        there_GM = jnp.take_along_axis(valid_GT, token_GM, axis=1)
        asks_GME = jax.nn.one_hot(expert_GM, experts, dtype=jnp.int32) * there_GM[..., None]
        before_GME = jnp.cumsum(asks_GME, axis=1) - asks_GME
        place_GM = jnp.take_along_axis(before_GME, expert_GM[..., None], axis=2)[..., 0]
        kept_GM = there_GM & (place_GM < count)
        # Those that are left out write to a slot beyond the last, which is cut off.
        slot_GM = jnp.where(kept_GM, expert_GM * count + place_GM, experts * count)
        return Slots(
            *(_scattered(x, slot_GM, experts, count) for x in (token_GM.astype(jnp.int32), gate_GM))
        )


def _scattered(x_GM: jax.Array, slot_GM: jax.Array, experts: int, count: int) -> jax.Array:
    """`[G, E, C]` with each value in its slot, zero in the others."""
    empty_GS = jnp.zeros((x_GM.shape[0], experts * count + 1), x_GM.dtype)
    filled_GS = jax.vmap(lambda row, slot, x: row.at[slot].set(x))(empty_GS, slot_GM, x_GM)
    return filled_GS[:, :-1].reshape(-1, experts, count)


@dataclass(frozen=True)
class Soft(Router):
    """Soft mixtures (Puigcerver et al. 2023): each slot is a mean of tokens, each token's sum a mean of slots.

    Logits of token and slot are exponentiated and normalised over the valid tokens of the group for what a slot gets,
    over all slots for what a token gets. Nothing is dropped.

    Attributes:
      columns: slots of each expert (IMP's configuration: 32).
      normalise: tokens and slots' vectors are made unit vectors, times a learned scale (section 2.3 there).
    """

    columns: int = 32
    normalise: bool = True

    def __post_init__(self) -> None:
        if self.columns < 1:
            raise UserError(f"router: columns is {self.columns}; it must be at least 1.")

    def slots(self, tokens: int, experts: int) -> int:
        del tokens, experts
        return self.columns

    def meets(self, experts: int) -> float:
        return experts

    def route(self, logits_GTL: jax.Array, valid_GT: jax.Array) -> Mixture:
        # Two softmaxes read the logits: without the barrier the TPU's compiler makes the product once for each.
        wide_GTL = jax.lax.optimization_barrier(widened(logits_GTL))
        there_GT1 = valid_GT[..., None]
        # Finite: a group without any token must give zeros, not NaN, also backwards.
        masked_GTL = jnp.where(there_GT1, wide_GTL, jnp.finfo(wide_GTL.dtype).min)
        weights = jax.nn.softmax(masked_GTL, axis=1), jax.nn.softmax(wide_GTL, axis=2)
        shape = (*wide_GTL.shape[:2], -1, self.columns)
        return Mixture(*(jnp.where(there_GT1, w, 0).reshape(shape) for w in weights))


def widened(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


# --- what keeps routers from collapsing --------------------------------------------------------


def importance_loss(scores_GTE: jax.Array, valid_GT: jax.Array) -> jax.Array:
    """Return the squared coefficient of variation of each expert's summed score, mean over the groups.

    Shazeer et al. (2017), equations 6 and 7. A group without a valid token does not count, here and below.
    """
    summed_GE = jnp.where(valid_GT[..., None], scores_GTE, 0).sum(axis=1)
    return _over_groups(_variation(summed_GE), valid_GT)


def _variation(x_GE: jax.Array) -> jax.Array:
    """Return `variance / mean^2` over experts, `[G]`; its gradient at equal values is 0, where that of std is NaN."""
    mean_G1 = x_GE.mean(axis=-1, keepdims=True)
    variance_G = jnp.square(x_GE - mean_G1).mean(axis=-1)
    return variance_G / jnp.maximum(jnp.square(mean_G1[..., 0]), 1e-18)


def _over_groups(loss_G: jax.Array, valid_GT: jax.Array) -> jax.Array:
    """Return the mean over the groups that have a valid token; 0 without any."""
    has_G = valid_GT.any(axis=1)
    return jnp.asarray(jnp.where(has_G, loss_G, 0).sum() / jnp.maximum(has_G.sum(), 1))


def load_loss(
    logits_GTE: jax.Array, noisy_GTE: jax.Array, deviation: float, top: int, valid_GT: jax.Array
) -> jax.Array:
    """Return V-MoE's load loss (Riquelme et al. 2021, appendix A), mean over the groups.

    It says how unevenly tokens would come, were one expert's noise drawn again: the squared coefficient of variation
    over experts of `sum_t 1 - Phi((eta_t - logit_te) / deviation)`, `eta_t` being the token's `top`-th noisy logit.
    """
    eta_GT1 = jax.lax.top_k(noisy_GTE, top)[0][..., -1:]
    chance_GTE = 1 - jax.scipy.stats.norm.cdf((eta_GT1 - logits_GTE) / deviation)
    load_GE = jnp.where(valid_GT[..., None], chance_GTE, 0).sum(axis=1)
    return _over_groups(_variation(load_GE), valid_GT)


def balance_loss(scores_GTE: jax.Array, valid_GT: jax.Array) -> jax.Array:
    """Return `E sum_e f_e p_e`, mean over the groups (Fedus et al. 2022).

    f_e is the share of tokens whose first choice an expert is, p_e the mean of its scores.
    """
    experts, there_GT1 = scores_GTE.shape[-1], valid_GT[..., None]
    first_GTE = jax.nn.one_hot(scores_GTE.argmax(axis=-1), experts, dtype=scores_GTE.dtype)
    count_G1 = jnp.maximum(valid_GT.sum(axis=1), 1)[:, None]
    share_GE, mean_GE = (
        jnp.where(there_GT1, x, 0).sum(axis=1) / count_G1 for x in (first_GTE, scores_GTE)
    )
    return _over_groups(experts * (share_GE * mean_GE).sum(axis=-1), valid_GT)


def z_loss(logits_GTE: jax.Array, valid_GT: jax.Array) -> jax.Array:
    """`mean_t logsumexp(logits_t)^2` (Zoph et al. 2022, equation 5)."""
    sizes_GT = jnp.square(jax.nn.logsumexp(widened(logits_GTE), axis=-1))
    return _mean(sizes_GT[..., None], valid_GT)[0]


def entropy_losses(
    scores_GTE: jax.Array, own_GT: jax.Array, threshold: float
) -> tuple[jax.Array, jax.Array]:
    """LIMoE's of one modality (Mustafa et al. 2022, section 2.2): local, and global.

    The mean entropy of its tokens' scores, which is to be small; and `max(0, threshold - H)`, H being the entropy of
    their mean: its tokens use `exp(threshold)` experts at least. Both 0 where it has no tokens.

    Args:
      own_GT: which tokens are valid and of the modality.
    """
    local = _mean(_entropy(scores_GTE)[..., None], own_GT)[0]
    among = _entropy(_mean(scores_GTE, own_GT))
    return local, jnp.where(own_GT.any(), jnp.maximum(0, threshold - among), 0)


def _entropy(p: jax.Array) -> jax.Array:
    return -jax.scipy.special.xlogy(p, jnp.maximum(p, 1e-30)).sum(axis=-1)


def _mean(x_GTE: jax.Array, valid_GT: jax.Array) -> jax.Array:
    """Over the tokens that count, `[E]`."""
    total: Any = jnp.where(valid_GT[..., None], x_GTE, 0).sum(axis=(0, 1))
    return jnp.asarray(total / jnp.maximum(valid_GT.sum(), 1))
