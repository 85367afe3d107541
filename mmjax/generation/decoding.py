"""Texts token by token: what is chosen, and when it ends. A pure function, compiled once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmjax.core.errors import UserError
from mmjax.data.tokenizer import TokenIds

Step = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


@dataclass(frozen=True)
class Sampling:
    """The rule that picks a token from its logits.

    Attributes:
      temperature: of the softmax that it is drawn from; 0 for the likeliest token (greedy).
      top_k: draw only from this number of likeliest tokens; 0 for all (Fan et al. 2018).
    """

    temperature: float = 0.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0:
            raise UserError(
                f"sampling: temperature {self.temperature} and top_k {self.top_k} must not be below 0."
            )

    def choose(self, logits_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
        """Return one token for each row, int32 `[B]`; each row draws by its own key."""
        if not self.temperature:
            return logits_BV.argmax(axis=-1).astype(jnp.int32)
        count = self.top_k or logits_BV.shape[-1]
        best_BK, ids_BK = jax.lax.top_k(logits_BV, min(count, logits_BV.shape[-1]))
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, best_BK / self.temperature)
        ids_B: jax.Array = jnp.take_along_axis(ids_BK, drawn_B[:, None], axis=1)[:, 0]
        return ids_B.astype(jnp.int32)


class _Written(NamedTuple):
    """The loop's state: ids `[B, length + 1]` from the begin token on, which rows have ended, and the cache."""

    at: jax.Array
    ids: jax.Array
    ended_B: jax.Array
    cache: Any


def generate(
    step: Step,
    cache: Any,
    keys_B: jax.Array,
    length: int,
    sampling: Sampling,
    special: TokenIds,
) -> jax.Array:
    """Return texts of up to `length` tokens, int32 `[B, length]`: the end token closes them, and padding fills up.

    It stops when all rows have ended. Ids without a piece are never chosen.

    Args:
      step: `(ids [B, length + 1], at, cache) -> (logits [B, V] of the token after index `at`, cache)`. The ids begin
        with the begin token; those after `at` mean nothing.
      cache: what `step` remembers, before the first token.
      keys_B: a random key for each row.
      special: the ids of padding, begin and end, and those without a piece.
    """
    rows = keys_B.shape[0]
    ids = jnp.full((rows, length + 1), special.pad, jnp.int32).at[:, 0].set(special.begin)
    start = _Written(jnp.int32(0), ids, jnp.zeros(rows, bool), cache)

    def goes_on(written: _Written) -> jax.Array:
        return (written.at < length) & ~written.ended_B.all()

    def next_token(written: _Written) -> _Written:
        at, ids, ended_B, cache = written
        logits_BV, cache = step(ids, at, cache)
        without_V = special.without_piece(logits_BV.shape[-1])
        if without_V.any():
            logits_BV = jnp.where(without_V, -jnp.inf, logits_BV)
        keys = jax.vmap(lambda key: jax.random.fold_in(key, at))(keys_B)
        token_B = jnp.where(ended_B, special.pad, sampling.choose(logits_BV, keys))
        ids = jax.lax.dynamic_update_slice_in_dim(ids, token_B[:, None], at + 1, axis=1)
        ended_B = ended_B if special.end is None else ended_B | (token_B == special.end)
        return _Written(at + 1, ids, ended_B, cache)

    return jax.lax.while_loop(goes_on, next_token, start).ids[:, 1:]
