"""Mixtures of experts: MLPs of which each token meets those that a learned router gives it to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax import config as configs
from mmjax.errors import UserError, nearest
from mmjax.layers.by_modality import ByModality
from mmjax.layers.dense import lecun, mlp_of
from mmjax.layers.masks import code
from mmjax.layers.routers import (
    ExpertChoice,
    Router,
    Slots,
    TokenChoice,
    balance_loss,
    entropy_losses,
    importance_loss,
    widened,
    z_loss,
)
from mmjax.layers.stream import Aux, Stream, add_up
from mmjax.parameters import declare, repeated
from mmjax.sharding import constrain

ROUTERS: dict[str, type[Router]] = {"expert_choice": ExpertChoice, "token_choice": TokenChoice}
LOSSES = {"importance": importance_loss, "balance": balance_loss}


@dataclass(frozen=True)
class ExpertsConfig:
    """The `experts` of a block.

    Attributes:
      count: how many.
      router: `{name: expert_choice or token_choice, ...}`, its keys those of `mmjax.layers.routers`.
      group: tokens that compete for slots, at most.
      losses: weight of `importance`, `balance` and `z`, see there.
      local, spread: by modality, the weights of LIMoE's entropy losses: of each token's scores, and of their mean.
      threshold: of `spread`, by modality; log(count) where it is not given.
    """

    count: int
    router: dict[str, Any] = field(default_factory=lambda: {"name": "expert_choice"})
    group: int = 2048
    losses: dict[str, float] = field(default_factory=dict)
    local: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    threshold: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.count < 1 or self.group < 1:
            raise UserError(f"experts: count is {self.count}, group {self.group}; 1 at least.")
        for name in self.losses:
            if name not in (*LOSSES, "z"):
                raise UserError(f"experts: no loss '{name}'.{nearest(name, [*LOSSES, 'z'])}")

    def make_router(self) -> Router:
        name = self.router.get("name", "")
        if name not in ROUTERS:
            raise UserError(f"experts.router: no '{name}'.{nearest(name, ROUTERS)}")
        settings = {k: v for k, v in self.router.items() if k != "name"}
        made: Router = configs.build(ROUTERS[name], settings, "experts.router")
        return made


class Experts(nnx.Module):
    """`y_t = sum over slots that hold t of gate * expert(x_t)`: `[B, S, D] -> [B, S, D]`; a token in no slot gets 0.

    Scores are computed in float32 or wider. Tokens compete within groups of whole rows, or of parts of a row, in order.
    What an expert costs depends on its slots, not on how many experts there are: slots are gathered, never multiplied
    out.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        config: Mapping[str, Any],
        mlp: str = "gelu",
        bias: bool = False,
    ):
        self.config: ExpertsConfig = configs.build(ExpertsConfig, config, "experts")
        self.rule = self.config.make_router()
        self.router = declare((width, self.config.count), ("embed", None), lecun, keep=True)
        self.mlps = mlp_of(mlp, width, hidden, bias)
        repeated(self.mlps, self.config.count, "experts")

    def __call__(self, stream: Stream) -> tuple[jax.Array, Aux]:
        """The tokens' sums, and the auxiliary losses; statistics say how many of each modality found no slot."""
        x_BSD, valid_BS = stream.x_BSD, stream.mask_BS()
        x_GTD, valid_GT = (grouped_rows(a, self.config.group) for a in (x_BSD, valid_BS))
        logits_GTE = widened(x_GTD) @ widened(self.router[...])
        slots = self.rule.route(logits_GTE, valid_GT)
        y_BSD = self._sums(x_GTD, slots).reshape(x_BSD.shape)
        kinds = {
            name: grouped_rows(own_BS & valid_BS, self.config.group)
            for name, own_BS in modalities(stream).items()
        }
        return y_BSD, self._aux(logits_GTE, valid_GT, kinds, slots)

    def _sums(self, x_GTD: jax.Array, slots: Slots) -> jax.Array:
        graph, state = nnx.split(self.mlps)
        groups, experts, count = slots.index_GEC.shape

        def expert(own: Any, x_ND: jax.Array) -> jax.Array:
            y_ND: jax.Array = nnx.merge(graph, own)(x_ND)
            return y_ND

        x_GECD = jax.vmap(lambda x, index: x[index])(x_GTD, slots.index_GEC)
        x_EGCD = constrain(x_GECD.swapaxes(0, 1), ("experts", "groups", None, None))
        y_EGCD = jax.vmap(expert)(state, x_EGCD.reshape(experts, groups * count, -1))
        y_EGCD = constrain(
            y_EGCD.reshape(experts, groups, count, -1), ("experts", "groups", None, None)
        )
        y_GECD = y_EGCD.swapaxes(0, 1) * slots.gate_GEC[..., None].astype(y_EGCD.dtype)

        def summed(x_TD: jax.Array, index_EC: jax.Array, y_ECD: jax.Array) -> jax.Array:
            return jnp.zeros_like(x_TD).at[index_EC].add(y_ECD)

        return jax.vmap(summed)(x_GTD, slots.index_GEC, y_GECD)

    def _aux(
        self,
        logits_GTE: jax.Array,
        valid_GT: jax.Array,
        kinds: Mapping[str, jax.Array],
        slots: Slots,
    ) -> Aux:
        config, scores_GTE = self.config, jax.nn.softmax(logits_GTE)
        loss = jnp.zeros((), logits_GTE.dtype)
        for name, weight in config.losses.items():
            if name == "z":
                loss = loss + weight * z_loss(logits_GTE, valid_GT)
            else:
                loss = loss + weight * LOSSES[name](scores_GTE, valid_GT)
        for name in (n for n in kinds if n in config.local or n in config.spread):
            threshold = config.threshold.get(name, float(np.log(config.count)))
            local, spread = entropy_losses(scores_GTE, kinds[name], threshold)
            weights = config.local.get(name, 0.0), config.spread.get(name, 0.0)
            loss = loss + weights[0] * local + weights[1] * spread
        left_GT = ~held(slots, valid_GT.shape[1])
        statistics = {
            f"dropped {name}": ((left_GT & own_GT).sum().astype(jnp.float32), own_GT.sum().astype(jnp.float32))
            for name, own_GT in kinds.items()
        }  # fmt: skip
        return Aux(loss=loss.astype(jnp.float32), statistics=statistics)


def route(part: Any, stream: Stream) -> tuple[jax.Array, Aux]:
    """A stream's tokens through experts, or through those of their own modality (as `part.by_layout` has it)."""
    if not isinstance(part, ByModality):
        made: tuple[jax.Array, Aux] = part(stream)
        return made
    if "modality" in stream.attributes:
        raise UserError(
            "Experts by modality need a static layout; the stream has an attribute 'modality'."
        )
    auxes = []

    def own(experts: Any, packed: tuple[jax.Array, jax.Array]) -> jax.Array:
        x_BSD, valid_BS = packed
        layout = tuple(run for run in stream.layout if part.of(run[0]) is experts)
        y_BSD, aux = experts(Stream(x_BSD, valid_BS, layout=layout))
        auxes.append(aux)
        return jnp.asarray(y_BSD)

    y_BSD = part.by_layout(stream.layout, (stream.x_BSD, stream.mask_BS()), own)
    return y_BSD, add_up(auxes)


def held(slots: Slots, tokens: int) -> jax.Array:
    """Which tokens are in a slot, bool `[G, T]`."""

    def of_group(index_EC: jax.Array, gate_EC: jax.Array) -> jax.Array:
        return jnp.zeros(tokens, bool).at[index_EC].max(gate_EC > 0)

    return jax.vmap(of_group)(slots.index_GEC, slots.gate_GEC)


def modalities(stream: Stream) -> dict[str, jax.Array]:
    """Of each modality of the layout its tokens, bool `[B, S]`; empty where there is no layout."""
    names = dict.fromkeys(name for name, _ in stream.layout)
    codes = np.concatenate([[code(n)] * size for n, size in stream.layout]) if names else None
    shape = stream.x_BSD.shape[:2]
    return {name: jnp.broadcast_to(codes == code(name), shape) for name in names}


def grouped_rows(x_BS: jax.Array, size: int) -> jax.Array:
    """`[B, S, ...] -> [G, T, ...]`, T at most `size`, in order: several rows to a group, or several groups to a row.

    As many rows as divide the batch, as few parts as divide the row.
    """
    rows, length = x_BS.shape[:2]
    if length <= size:
        together = max(r for r in range(1, size // length + 1) if rows % r == 0)
        return x_BS.reshape(rows // together, together * length, *x_BS.shape[2:])
    parts = next(p for p in range(-(-length // size), length + 1) if length % p == 0)
    return x_BS.reshape(rows * parts, length // parts, *x_BS.shape[2:])
