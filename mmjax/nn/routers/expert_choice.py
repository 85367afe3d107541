"""Experts that choose their tokens."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mmjax.core.bounds import check_choices
from mmjax.nn.routers.base import Limited, Slots, widened

SCORES = ("softmax", "sigmoid")


@dataclass(frozen=True)
class ExpertChoice(Limited):
    """Each expert takes the tokens that score highest with it (Zhou et al. 2022; IMP); none is asked to balance.

    Ties go to the earlier token.

    Attributes:
      score: `softmax` over experts, or `sigmoid`, which is independent of other experts (MoMa, Lin et al. 2024).
    """

    sees_all = True
    score: str = "softmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, score=SCORES)

    def slots(self, tokens: int, experts: int) -> int:
        return min(tokens, max(1, round(self.capacity * tokens / experts)))

    def experts_per_token(self, experts: int) -> float:
        return min(self.capacity, experts)

    def scores(self, logits_GTE: jax.Array) -> jax.Array:
        wide = widened(logits_GTE)
        return jax.nn.softmax(wide) if self.score == "softmax" else jax.nn.sigmoid(wide)

    def route(self, logits_GTL: jax.Array, valid_GT: jax.Array) -> Slots:
        _, tokens, experts = logits_GTL.shape
        scores_GTE = self.scores(logits_GTL)
        scores_GET = jnp.where(valid_GT[..., None], scores_GTE, 0).swapaxes(1, 2)
        # Tokens that are not there come last, also after those whose score is 0.
        ranked_GET = jnp.where(valid_GT[:, None], scores_GET, -1)
        _, index_GEC = jax.lax.top_k(ranked_GET, self.slots(tokens, experts))
        return Slots(index_GEC, jnp.take_along_axis(scores_GET, index_GEC, axis=2))
