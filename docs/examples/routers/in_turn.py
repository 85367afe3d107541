"""A router that gives tokens to the experts in turn."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mmjax.core.bounds import SIZE, check
from mmjax.nn.routers.base import Router, Slots


@dataclass(frozen=True)
class InTurn(Router):
    """The keys of the router.

    Attributes:
      first: the expert of the first token.
    """

    first: int = 0

    def __post_init__(self) -> None:
        check(self, first=SIZE)

    def slots(self, tokens: int, experts: int) -> int:
        """Return how many tokens an expert takes."""
        return -(-tokens // experts)

    def experts_per_token(self, experts: int) -> int:
        return 1

    def route(self, logits_GTL: jax.Array, valid_GT: jax.Array) -> Slots:
        """Return which token is in which slot of which expert, and with which weight."""
        _, tokens, experts = logits_GTL.shape
        first_E1 = (jnp.arange(experts)[:, None] - self.first) % experts
        index_EC = first_E1 + experts * jnp.arange(self.slots(tokens, experts))
        there_GEC = valid_GT[:, jnp.minimum(index_EC, tokens - 1)] & (index_EC < tokens)
        index_GEC = jnp.broadcast_to(jnp.minimum(index_EC, tokens - 1), there_GEC.shape)
        return Slots(index_GEC, there_GEC.astype(logits_GTL.dtype))
