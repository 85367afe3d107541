"""The model: stems, one trunk, heads. A pure function of parameters, batch and key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import jax
from flax import nnx

from mmjax.core import config as configs
from mmjax.core.bounds import COUNT, POSITIVE, FieldError, check
from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.core.sharding import constrain
from mmjax.core.teachers import TeacherConfig
from mmjax.modalities.base import PRESENT, Modality, as_rows
from mmjax.nn.by_modality import SHARED, PerModality, check_parts
from mmjax.nn.experts import Experts
from mmjax.nn.masks import FULL, Mask
from mmjax.nn.stream import Aux, Stream, concatenate
from mmjax.nn.trunk import GroupConfig, Trunk

TRUNK = "trunk"  # the tower that every modality reads where a config names no other


@dataclass(frozen=True)
class TowerConfig:
    """A stack of layers.

    Attributes:
      width: size of a token.
      layers: groups of blocks, in order.
      remat: what the backward pass computes again: `none`, `dots` or `full`.
      norm: the last norm, `layer` or `rms`.
      norm_eps: its eps.
      per_modality: which modalities have a last norm each (`parts: ["norm"]`), see `mmjax.nn.by_modality`.
    """

    width: int
    layers: tuple[GroupConfig, ...]
    remat: str = field(default="none", metadata=configs.FREE)
    norm: str = "layer"
    norm_eps: float = 1e-6
    per_modality: PerModality = SHARED

    def __post_init__(self) -> None:
        check(self, width=COUNT, norm_eps=POSITIVE)
        check_parts(self, ("norm",))


@dataclass(frozen=True)
class ModelConfig:
    """The encoder: its towers, or the keys of one tower, the trunk, as a short form of `towers: {"trunk": {...}}`.

    Attributes:
      width, layers, remat, norm, norm_eps, per_modality: of the trunk, see `TowerConfig`.
      towers: towers by name. One can be built today: `trunk`.
      teachers: copies of parameters that objectives read, by name, see `TeacherConfig`.
    """

    width: int | None = None
    layers: tuple[GroupConfig, ...] | None = None
    remat: str = field(default="none", metadata=configs.FREE)
    norm: str = "layer"
    norm_eps: float = 1e-6
    per_modality: PerModality = SHARED
    towers: dict[str, TowerConfig] = field(default_factory=dict)
    teachers: dict[str, TeacherConfig] = field(default_factory=dict, metadata=configs.SCHEDULE)

    def __post_init__(self) -> None:
        if not self.towers:
            for key in ("width", "layers"):
                if getattr(self, key) is None:
                    raise FieldError(self, key, "is missing.")
            _ = self.trunk  # checks the keys
            return
        if list(self.towers) != [TRUNK]:
            words = f"names {', '.join(self.towers)}; one tower can be built, and its name is '{TRUNK}'."
            raise FieldError(self, "towers", words)
        for name in (f.name for f in fields(TowerConfig)):
            if getattr(self, name) != getattr(ModelConfig, name, None):
                raise FieldError(self, name, f"is set beside towers; set towers.{TRUNK}.{name}.")

    @property
    def trunk(self) -> TowerConfig:
        """The tower, whichever way it is written."""
        if self.towers:
            return self.towers[TRUNK]
        keys = {f.name: getattr(self, f.name) for f in fields(TowerConfig)}
        try:
            return TowerConfig(**keys)
        except FieldError as error:  # the keys are the model's own in the short form
            raise FieldError(self, error.key, error.words) from error

    @property
    def where(self) -> str:
        """The path of the tower's block in a config."""
        return f"model.towers.{TRUNK}" if self.towers else "model"


def tower_of(block: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the path and the block of the trunk in a config, whichever way it is written."""
    model = block["model"]
    if model.get("towers"):
        return f"model.towers.{TRUNK}", model["towers"][TRUNK]
    return "model", model


class Model(nnx.Module):
    """Stems by modality, the trunk they share, and the heads that objectives declare."""

    teacher_of: Any = None  # set where the config has teachers

    def __init__(
        self, config: ModelConfig, modalities: Mapping[str, Modality], heads: Mapping[str, Any]
    ):
        tower = config.trunk
        self.stems = nnx.Dict({name: m.stem(tower.width) for name, m in modalities.items()})
        self.trunk = Trunk(
            tower.layers,
            tower.width,
            tower.remat,
            f"{config.where}.layers",
            per_modality=tower.per_modality,
            norm=tower.norm,
            norm_eps=tower.norm_eps,
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
        states which rows exist (`rows_B`) where the arrays do, as those of `mmjax.objectives.base.with_rows`.
        """
        stem, is_instance = self.stems[modality], PRESENT in arrays
        arrays, exists_B = as_rows(arrays)
        stream: Stream = stem(arrays) if values is None else stem(arrays, values)
        x_BSD = constrain(stream.x_BSD, ("batch", "tokens", None))
        layout = ((modality, x_BSD.shape[1]),)
        stream = replace(stream, x_BSD=x_BSD, layout=layout, rows_B=exists_B)
        return replace(stream, valid_BS=stream.mask_BS()) if is_instance else stream

    def teacher(self, name: str) -> Model:
        """Return the model with the parameters that a teacher copies in its place; it has no gradient.

        Give its passes no key: a teacher drops nothing.
        """
        if self.teacher_of is None:
            raise UserError(f"no teacher '{name}': the config has no model.teachers.")
        taught: Model = self.teacher_of(name)
        return taught

    def encode(
        self, streams: Iterable[Stream], key: jax.Array | None, mask: Mask = FULL
    ) -> tuple[Stream, Aux]:
        """Run the trunk once over the tokens of all `streams`, under a mask; without a key nothing is drawn."""
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
