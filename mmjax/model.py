"""The model: stems, one trunk, heads. A pure function of parameters, batch and key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from flax import nnx

from mmjax.core import config as configs
from mmjax.core.bounds import COUNT, POSITIVE, check
from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.core.sharding import constrain
from mmjax.modalities.base import PRESENT, Modality, as_rows
from mmjax.nn.experts import Experts
from mmjax.nn.masks import FULL, Mask
from mmjax.nn.stream import Aux, Stream, concatenate
from mmjax.nn.trunk import GroupConfig, Trunk

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class ModelConfig:
    """The encoder.

    Attributes:
      width: size of a token.
      groups: the trunk's layers.
      remat: what the backward pass computes again: `none`, `dots` or `full`.
      norm: the last norm, `layer` or `rms`.
      norm_eps: its eps.
      norm_modalities: modalities (or modality: expert) that have a last norm each; empty for one of all.
    """

    width: int
    groups: tuple[GroupConfig, ...]
    remat: str = field(default="none", metadata=configs.FREE)
    norm: str = "layer"
    norm_eps: float = 1e-6
    norm_modalities: Any = ()

    def __post_init__(self) -> None:
        check(self, width=COUNT, norm_eps=POSITIVE)


class Model(nnx.Module):
    """Stems by modality, the trunk they share, and the heads that objectives declare."""

    def __init__(
        self, config: ModelConfig, modalities: Mapping[str, Modality], heads: Mapping[str, Any]
    ):
        self.stems = nnx.Dict({name: m.stem(config.width) for name, m in modalities.items()})
        self.trunk = Trunk(
            config.groups,
            config.width,
            config.remat,
            norm_modalities=config.norm_modalities,
            norm=config.norm,
            norm_eps=config.norm_eps,
        )
        self.heads = nnx.Dict({name: nnx.Dict(parts) for name, parts in heads.items()})
        for _, part in nnx.iter_modules(self):
            if isinstance(part, Experts):
                part.check(modalities)

    def tokens(
        self, modality: str, arrays: Mapping[str, jax.Array], values: jax.Array | None = None
    ) -> Stream:
        """Return the stem's stream for one modality's arrays (leading batch axis), or for other values, see `Stem`.

        Instances of an example are rows, `[B N, S, D]`; no token of one that is not present is valid. The stream
        says which rows exist (`rows_B`) where the arrays do, as those of `mmjax.objectives.base.with_rows`.
        """
        stem, is_instance = self.stems[modality], PRESENT in arrays
        arrays, exists_B = as_rows(arrays)
        stream: Stream = stem(arrays) if values is None else stem(arrays, values)
        x_BSD = constrain(stream.x_BSD, ("batch", "tokens", None))
        layout = ((modality, x_BSD.shape[1]),)
        stream = replace(stream, x_BSD=x_BSD, layout=layout, rows_B=exists_B)
        return replace(stream, valid_BS=stream.mask_BS()) if is_instance else stream

    def encode(
        self, streams: Iterable[Stream], key: jax.Array | None, mask: Mask = FULL
    ) -> tuple[Stream, Aux]:
        """One pass of the trunk over the tokens of all `streams` together, under a mask; without a key none draws."""
        return self.trunk(replace(concatenate(list(streams)), mask=mask), key)


def declare_model(
    config: ModelConfig,
    modalities: Mapping[str, Modality],
    heads: Iterable[tuple[str, Mapping[str, Any]]],
) -> Declaration:
    """Declare the model; heads of one name are one head, whose parts must agree where they meet."""
    joined: dict[str, dict[str, Any]] = {}
    for name, parts in heads:
        for part, module in parts.items():
            known = joined.setdefault(name, {}).setdefault(part, module)
            if known is not module and _shapes(known) != _shapes(module):
                raise UserError(
                    f"two tasks declare head '{name}', part '{part}', with different shapes: "
                    f"{_shapes(known)} and {_shapes(module)}. Give one of the objectives another head name."
                )
    return Declaration(Model(config, modalities, joined))


def _shapes(module: Any) -> dict[str, tuple[int, ...]]:
    _, state = nnx.split(nnx.Dict({"part": module}))
    return {"/".join(map(str, path[1:])): v.shape for path, v in nnx.to_flat_state(state)}
