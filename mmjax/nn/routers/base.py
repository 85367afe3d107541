"""Routers: which tokens each expert takes, and with which weight. Pure functions of logits, in float32 or wider.

Tokens come in groups of T, which compete for the C slots of each expert; invalid ones take none. A router gives
`Slots`, whatever its rule.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from mmjax.core.bounds import POSITIVE, check


class Dispatch(abc.ABC):
    """The assignment of tokens to the experts' slots, and the weights of the way back."""

    @abc.abstractmethod
    def gather(self, x_GTD: jax.Array) -> jax.Array:
        """Return the inputs of the slots, `[G, E, C, D]`."""

    @abc.abstractmethod
    def combine(self, y_GECD: jax.Array, tokens: int) -> jax.Array:
        """Return, for each token, the weighted sum of the experts' outputs for its slots, `[G, T, D]`."""

    @abc.abstractmethod
    def parts(self, tokens: int) -> jax.Array:
        """Return the part of each token that is each expert's, `[G, T, E]`: 1 or 0 where a slot holds one token."""


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


@dataclass(frozen=True)
class Router(abc.ABC):
    """A rule, of logits that a token has for every expert; its fields are the keys of `experts.router`.

    A router may have a field in place of each attribute here.

    Attributes:
      slots_per_expert: logits of each token for each expert.
      noise: standard deviation of what training adds to the logits, as a multiple of 1 / experts.
      top_k: experts that a token chooses.
      normalise: tokens and experts' vectors are made unit vectors, times a learned scale.
      has_losses: auxiliary losses of its scores make sense.
      sees_all: experts choose among all tokens of a group, so that generation needs another router.
    """

    KIND: ClassVar[str] = "routers"
    slots_per_expert = 1
    noise = 0.0
    top_k = 1
    normalise = False
    has_losses = True
    sees_all = False

    @abc.abstractmethod
    def slots(self, tokens: int, experts: int) -> int:
        """Return the number C of slots of each expert in each group."""

    @abc.abstractmethod
    def experts_per_token(self, experts: int) -> float:
        """Return the mean number of experts per token if none is dropped."""

    @abc.abstractmethod
    def route(self, logits_GTL: jax.Array, valid_GT: jax.Array) -> Dispatch:
        """Return the slots, by the logits `[G, T, experts * slots_per_expert]` of each token."""

    def scores(self, logits_GTE: jax.Array) -> jax.Array:
        """Return the gates' values, `[..., E]`."""
        return jax.nn.softmax(widened(logits_GTE))


@dataclass(frozen=True)
class Limited(Router):
    """A rule that gives each slot one token.

    Attributes:
      capacity: slots of all experts together, as a multiple of the tokens (times `top_k`, where tokens choose). Tokens
        that do not exist count here, so that shapes are static: where many are missing, others find a slot more often.
    """

    capacity: float = 1.0

    def __post_init__(self) -> None:
        check(self, capacity=POSITIVE)


def widened(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
