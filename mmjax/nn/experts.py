"""Mixtures of experts: MLPs of which each token meets those that a learned router gives it to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers

from mmjax.core.bounds import AMOUNT, COUNT, FieldError, check, check_choices
from mmjax.core.errors import UserError, nearest
from mmjax.core.parameters import declare, mark_copies, stack_copies
from mmjax.core.sharding import constrain
from mmjax.nn.by_modality import ByModality
from mmjax.nn.dense import Dense, lecun, mlp_of
from mmjax.nn.masks import code
from mmjax.nn.router_losses import (
    balance_loss,
    entropy_losses,
    importance_loss,
    load_loss,
    z_loss,
)
from mmjax.nn.routers.base import Dispatch, Router, widened
from mmjax.nn.routers.expert_choice import ExpertChoice
from mmjax.nn.stream import Aux, Stream, add_up, fold, no_aux

LOSSES = ("importance", "load", "balance", "z")
OVER = ("group", "batch")


@dataclass(frozen=True)
class ExpertsConfig:
    """The `experts` of a block.

    Attributes:
      count: how many.
      router: `{name: expert_choice, token_choice or soft, ...}`, its keys those of the class in
        `mmjax/nn/routers/NAME.py`.
      group_size: tokens that compete for slots, at most.
      min_groups: how many groups at least, where there are as many rows. Where it is the number of devices that share a
        batch, none spans two of them, whose tokens would have to be gathered; routing does not depend on the mesh.
      losses: weight of `importance`, `load`, `balance` and `z`, see there.
      losses_over: `group`, where the first three are of each group and their mean is taken, as V-MoE (Riquelme et al.
        2021) and Switch (Fedus et al. 2022) have it; or `batch`, where they are of all tokens together, a weaker pull.
      local_entropy, global_entropy: by modality, the weights of LIMoE's entropy losses: of each token's scores, and of
        their mean.
      entropy_floor: of `global_entropy`, by modality; log(count) where it is not given.
      causal: of experts that choose: a second router that predicts from a token alone whether an expert takes it, for
        generation; see `CausalConfig`.
    """

    count: int
    router: Router = ExpertChoice()
    group_size: int = 2048
    min_groups: int = 1
    losses: dict[str, float] = field(default_factory=dict)
    losses_over: str = "group"
    local_entropy: dict[str, float] = field(default_factory=dict)
    global_entropy: dict[str, float] = field(default_factory=dict)
    entropy_floor: dict[str, float] = field(default_factory=dict)
    causal: CausalConfig | None = None

    def __post_init__(self) -> None:
        check(self, count=COUNT, group_size=COUNT, min_groups=COUNT)
        check(
            self, losses=AMOUNT, local_entropy=AMOUNT, global_entropy=AMOUNT, entropy_floor=AMOUNT
        )
        check_choices(self, losses=LOSSES, losses_over=OVER)
        balancing = {
            **self.losses,
            "local_entropy": self.local_entropy,
            "global_entropy": self.global_entropy,
        }
        named = [name for name, value in balancing.items() if value and name != "z"]
        if self.count == 1 and named:
            words = f"is 1, and '{named[0]}' balances experts. Raise it, or remove '{named[0]}'."
            raise FieldError(self, "count", words)
        self._check_router()

    def _check_router(self) -> None:
        router, name = self.router, type(self.router).__name__
        if router.top_k > self.count:
            words = f"is {router.top_k}, of {self.count} experts; it is at most their number."
            raise FieldError(self, "router.top_k", words)
        if not router.has_losses and (self.losses or self.local_entropy or self.global_entropy):
            words = f"is {name}, which has no auxiliary losses; remove losses, local_entropy and global_entropy."
            raise FieldError(self, "router", words)
        if "load" in self.losses and not router.noise:
            words = "needs a router with noise; set router.noise of token_choice."
            raise FieldError(self, "losses.load", words)
        if self.causal and not router.sees_all:
            words = "is for a router whose experts choose, as expert_choice; others need none."
            raise FieldError(self, "causal", words)

    def modalities(self) -> set[str]:
        """Return the modalities that the losses name."""
        return {*self.local_entropy, *self.global_entropy, *self.entropy_floor}


@dataclass(frozen=True)
class CausalConfig:
    """MoMa's auxiliary router (Lin et al. 2024): two layers with a SiLU between them, one logit for each expert.

    It learns by binary cross-entropy which tokens each expert took, and nothing else learns by that. In generation a
    token goes to the experts whose logit is above 0.

    Attributes:
      mlp_dim: size of the hidden layer.
      weight: of its loss.
    """

    mlp_dim: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        check(self, mlp_dim=COUNT, weight=AMOUNT)


class CausalRouter(nnx.Module):
    """`silu(x W1 + b1) W2 + b2`, `[..., D] -> [..., E]`."""

    def __init__(self, width: int, hidden: int, count: int):
        self.up = Dense(width, hidden, ("embed", None))
        self.out = Dense(hidden, count, (None, None))

    def __call__(self, x: jax.Array) -> jax.Array:
        return widened(self.out(jax.nn.silu(self.up(x))))


class Experts(nnx.Module):
    """`y_t = sum over slots that hold t of gate * expert(x_t)`: `[B, S, D] -> [B, S, D]`; a token in no slot gets 0.

    Scores are computed in float32 or wider. Tokens compete within groups of whole rows, or of parts of a row, in order.
    What an expert costs depends on its slots, not on how many experts there are. Slots that hold a token each are
    gathered, not multiplied out; those of the soft router are means of tokens, which costs products.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        config: ExpertsConfig,
        mlp: str = "gelu",
        bias: bool = False,
    ):
        self.config, self.routing = config, config.router
        routing = self.routing
        count = self.config.count * routing.slots_per_expert
        self.router = declare((width, count), ("embed", None), lecun, keep_dtype=True)
        self.scale = (
            declare((), (), initializers.ones, keep_dtype=True) if routing.normalise else None
        )
        causal = self.config.causal
        self.causal = CausalRouter(width, causal.mlp_dim, self.config.count) if causal else None
        self.mlps = mlp_of(mlp, width, hidden, bias)
        stack_copies(self.mlps, self.config.count, "experts")
        mark_copies(self.mlps, self.config.count / routing.experts_per_token(self.config.count))

    def __call__(self, stream: Stream, key: jax.Array | None) -> tuple[jax.Array, Aux]:
        """Return the tokens' sums, and the auxiliary losses; statistics count how many of each modality got no slot.

        Args:
          key: of the router's noise, where it has some; none is added if None. It is drawn for the tokens as they
            lie, so that other micro-batches draw others.
        """
        x_BSD, valid_BS = stream.x_BSD, stream.mask_BS()
        x_GTD, valid_GT = self._grouped(x_BSD), self._grouped(valid_BS)
        logits_GTL = self.logits(x_GTD)
        noisy_GTL, deviation = logits_GTL, self.routing.noise / self.config.count
        if deviation and key is not None:
            noise = jax.random.normal(key, logits_GTL.shape, logits_GTL.dtype)
            noisy_GTL = logits_GTL + deviation * noise
        dispatch = self.routing.route(noisy_GTL, valid_GT)
        y_BSD = self._sums(x_GTD, dispatch).reshape(x_BSD.shape)
        by_modality = {
            name: self._grouped(own_BS & valid_BS) for name, own_BS in modalities(stream).items()
        }
        loss = self._losses(logits_GTL, noisy_GTL, valid_GT, by_modality)
        aux = usage(dispatch, by_modality, valid_GT.shape[1])
        if self.causal is not None:
            extra, agreed = self._causal_loss(x_GTD, dispatch, valid_GT)
            loss, aux = loss + extra, add_up([aux, agreed])
        return y_BSD, replace(aux, loss=loss.astype(jnp.float32))

    def check(self, modalities: Iterable[str]) -> None:
        """Raise `UserError` if the losses name a modality that is not among these."""
        known = list(modalities)
        for name in sorted(self.config.modalities() - {*known}):
            raise UserError(
                f"experts: local, spread or threshold name '{name}', which is no modality.{nearest(name, known)}"
            )

    def logits(self, x: jax.Array) -> jax.Array:
        """Return the router's logits, `[..., D] -> [..., experts * slots_per_expert]`, in float32 or wider."""
        x, router = widened(x), widened(self.router[...])
        if self.scale is not None:
            x, router = _unit(x, -1) * self.scale[...], _unit(router, 0)
        return x @ router

    def causal_call(self, x_BSD: jax.Array) -> jax.Array:
        """Apply the experts as `__call__` does, but to tokens that know nothing of others: each to the experts that its
        causal router predicts.

        Every expert is applied to every token, and the outputs of those that do not take it are dropped.
        """
        if self.causal is None:
            raise UserError(
                "A block with experts cannot take a stream token by token: which tokens an expert takes depends on "
                "all of their group. Train it with `experts.causal`, a router that knows only the token."
            )
        graph, state = nnx.split(self.mlps)
        y_EBSD = jax.vmap(lambda arrays: nnx.merge(graph, arrays)(x_BSD))(state)
        gate_BSE = jnp.where(self.causal(x_BSD) > 0, self.routing.scores(self.logits(x_BSD)), 0)
        return jnp.einsum("bse,ebsd->bsd", gate_BSE.astype(x_BSD.dtype), y_EBSD)

    def _grouped(self, x_BS: jax.Array) -> jax.Array:
        return grouped_rows(x_BS, self.config.group_size, self.config.min_groups)

    def _sums(self, x_GTD: jax.Array, dispatch: Dispatch) -> jax.Array:
        graph, state = nnx.split(self.mlps)

        def expert(arrays: Any, x_ND: jax.Array) -> jax.Array:
            y_ND: jax.Array = nnx.merge(graph, arrays)(x_ND)
            return y_ND

        x_GECD = dispatch.gather(x_GTD)
        groups, experts, count, _ = x_GECD.shape
        x_EGCD = constrain(x_GECD.swapaxes(0, 1), ("experts", "groups", None, None))
        y_EGCD = jax.vmap(expert)(state, x_EGCD.reshape(experts, groups * count, -1))
        y_EGCD = constrain(
            y_EGCD.reshape(experts, groups, count, -1), ("experts", "groups", None, None)
        )
        return dispatch.combine(y_EGCD.swapaxes(0, 1), x_GTD.shape[1])

    def _losses(
        self,
        logits_GTE: jax.Array,
        noisy_GTE: jax.Array,
        valid_GT: jax.Array,
        by_modality: Mapping[str, jax.Array],
    ) -> jax.Array:
        config, scores_GTE = self.config, jax.nn.softmax(logits_GTE)
        loss = jnp.zeros((), logits_GTE.dtype)
        for name, weight in config.losses.items():
            loss = loss + weight * self._loss_term(
                name, logits_GTE, noisy_GTE, scores_GTE, valid_GT
            )
        for name in (
            n for n in by_modality if n in config.local_entropy or n in config.global_entropy
        ):
            threshold = config.entropy_floor.get(name, float(np.log(config.count)))
            local, spread = entropy_losses(scores_GTE, by_modality[name], threshold)
            weights = config.local_entropy.get(name, 0.0), config.global_entropy.get(name, 0.0)
            loss = loss + weights[0] * local + weights[1] * spread
        return loss

    def _loss_term(
        self,
        name: str,
        logits_GTE: jax.Array,
        noisy_GTE: jax.Array,
        scores_GTE: jax.Array,
        valid_GT: jax.Array,
    ) -> jax.Array:
        if self.config.losses_over == "batch":
            logits_GTE, noisy_GTE, scores_GTE, valid_GT = (
                x.reshape(1, -1, *x.shape[2:])
                for x in (logits_GTE, noisy_GTE, scores_GTE, valid_GT)
            )
        if name == "z":
            return z_loss(logits_GTE, valid_GT)
        if name == "load":
            deviation, top = self.routing.noise / self.config.count, self.routing.top_k
            return load_loss(logits_GTE, noisy_GTE, deviation, top, valid_GT)
        return {"importance": importance_loss, "balance": balance_loss}[name](scores_GTE, valid_GT)

    def _causal_loss(
        self, x_GTD: jax.Array, dispatch: Dispatch, valid_GT: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """Return the causal router's loss, and how often it is right of a token and an expert."""
        assert self.causal is not None and self.config.causal is not None
        logits_GTE = self.causal(jax.lax.stop_gradient(x_GTD))
        took_GTE = jax.lax.stop_gradient(dispatch.parts(x_GTD.shape[1])) > 0
        entropy_GTE = jax.nn.softplus(jnp.where(took_GTE, -logits_GTE, logits_GTE))
        there_GT1 = valid_GT[..., None]
        count = valid_GT.sum() * self.config.count
        loss = jnp.where(there_GT1, entropy_GTE, 0).sum() / jnp.maximum(count, 1)
        right = (((logits_GTE > 0) == took_GTE) & there_GT1).sum()
        statistics = {"causal agreement": (right.astype(jnp.float32), count.astype(jnp.float32))}
        return self.config.causal.weight * loss, replace(no_aux(), statistics=statistics)


def _unit(x: jax.Array, axis: int) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis=axis, keepdims=True) + 1e-12)


def usage(dispatch: Dispatch, by_modality: Mapping[str, jax.Array], tokens: int) -> Aux:
    """Return the usage by modality: how many tokens found no slot, and how much of its tokens each expert has."""
    parts_GTE = jax.lax.stop_gradient(dispatch.parts(tokens)).astype(jnp.float32)
    left_GT, aux = parts_GTE.sum(axis=-1) == 0, no_aux()
    for name, own_GT in by_modality.items():
        count = own_GT.sum().astype(jnp.float32)
        aux.statistics[f"dropped {name}"] = ((left_GT & own_GT).sum().astype(jnp.float32), count)
        aux.usage[name] = jnp.where(own_GT[..., None], parts_GTE, 0).sum(axis=(0, 1))
    return aux


def route(part: Any, stream: Stream, key: jax.Array | None) -> tuple[jax.Array, Aux]:
    """Apply experts to a stream's tokens, all or those of each token's modality (by `part.by_layout`)."""
    if not isinstance(part, ByModality):
        result: tuple[jax.Array, Aux] = part(stream, key)
        return result
    if "modality" in stream.attributes:
        raise UserError(
            "Experts by modality need a static layout; the stream has an attribute 'modality'."
        )
    auxes = list[Aux]()

    def apply_experts(experts: Any, packed: tuple[jax.Array, jax.Array]) -> jax.Array:
        x_BSD, valid_BS = packed
        layout = tuple(run for run in stream.layout if part.of(run[0]) is experts)
        y_BSD, aux = experts(Stream(x_BSD, valid_BS, layout=layout), fold(key, len(auxes)))
        auxes.append(aux)
        return jnp.asarray(y_BSD)

    y_BSD = part.by_layout(stream.layout, (stream.x_BSD, stream.mask_BS()), apply_experts)
    return y_BSD, add_up(auxes)


def modalities(stream: Stream) -> dict[str, jax.Array]:
    """Return the tokens of each modality of the layout, bool `[B, S]`; empty if there is no layout."""
    names = dict.fromkeys(name for name, _ in stream.layout)
    codes = np.concatenate([[code(n)] * size for n, size in stream.layout]) if names else None
    shape = stream.x_BSD.shape[:2]
    return {name: jnp.broadcast_to(codes == code(name), shape) for name in names}


def grouped_rows(x_BS: jax.Array, size: int, groups: int = 1) -> jax.Array:
    """Reshape `[B, S, ...] -> [G, T, ...]`, T at most `size`, in order: several rows to a group, or several groups to a
    row.

    As many rows as divide the batch and leave `min_groups` of them, as few parts as divide the row.
    """
    rows, length = x_BS.shape[:2]
    if length <= size:
        most = max(1, min(size // length, rows // groups))
        together = max(r for r in range(1, most + 1) if rows % r == 0)
        return x_BS.reshape(rows // together, together * length, *x_BS.shape[2:])
    parts = next(p for p in range(-(-length // size), length + 1) if length % p == 0)
    return x_BS.reshape(rows * parts, length // parts, *x_BS.shape[2:])
