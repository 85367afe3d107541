"""The model: stems, towers, heads. A pure function of parameters, batch and key."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import jax
from flax import nnx

from mmjax.core import config as configs
from mmjax.core.bounds import FieldError
from mmjax.core.errors import UserError
from mmjax.core.extensions import check_type
from mmjax.core.parameters import Declaration, compute_in
from mmjax.core.sharding import constrain
from mmjax.core.teachers import TeacherConfig
from mmjax.modalities.base import PRESENT, Modality, as_rows, stem_of
from mmjax.nn.by_modality import SHARED, ByModality, PerModality
from mmjax.nn.experts import Experts
from mmjax.nn.masks import FULL, Causal, Mask
from mmjax.nn.modality_token import add_modality_token, with_modality_token
from mmjax.nn.stream import Aux, Stream, add_up, concatenate, cut, fold
from mmjax.nn.towers import TRUNK, TowerConfig, Towers, Widths, connect
from mmjax.nn.trunk import GroupConfig, Trunk

_OF_ALL = ("towers", "teachers")  # keys of a model that are not those of one tower


@dataclass(frozen=True)
class ModelConfig:
    """The encoder: its towers, or the keys of one tower, the trunk, as a short form of `towers: {"trunk": {...}}`.

    Attributes:
      width, layers, remat, norm, norm_eps, per_modality: of the trunk, see `TowerConfig`.
      towers: towers by names of your choice; `modalities.NAME.tower` states which of them reads a modality.
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
        name = next(iter(self.towers))
        for key in (f.name for f in fields(ModelConfig) if f.name not in _OF_ALL):
            if getattr(self, key) != getattr(ModelConfig, key, None):
                raise FieldError(self, key, f"is set beside towers; set towers.{name}.{key}.")

    @property
    def trunk(self) -> TowerConfig:
        """The tower `trunk`, whichever way it is written."""
        if self.towers:
            return self.towers[TRUNK]
        keys = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("towers", "teachers")
        }
        try:
            return TowerConfig(**keys)
        except FieldError as error:  # the keys are the model's own in the short form
            raise FieldError(self, error.key, error.words) from error

    @property
    def stacks(self) -> Mapping[str, TowerConfig]:
        """The towers by name, whichever way they are written."""
        return self.towers or {TRUNK: self.trunk}

    def where(self, name: str) -> str:
        """Return the path of a tower's block in a config."""
        return f"model.towers.{name}" if self.towers else "model"


def towers_in(block: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the blocks of the towers in a config by their path there, whichever way they are written."""
    model = block["model"]
    if model.get("towers"):
        return {f"model.towers.{name}": tower for name, tower in model["towers"].items()}
    return {"model": model}


class Model(nnx.Module):
    """Stems by modality, the towers that read them, each an attribute of its name, and heads of objectives."""

    teacher_of: Any = None  # set where the config has teachers

    def __init__(
        self, config: ModelConfig, modalities: Mapping[str, Modality], heads: Mapping[str, Any]
    ):
        self.towers = connect_towers(config, modalities)
        widths = Widths(self.towers)
        self.stems = nnx.Dict({name: stem_of(m, widths[name]) for name, m in modalities.items()})
        for name, modality in modalities.items():
            if modality.modality_token:
                add_modality_token(self.stems[name], widths[name])
        for name, tower in config.stacks.items():
            setattr(self, name, _stack(tower, config.where(name)))
        self.connectors = nnx.Dict(
            {n: nnx.Dict(_connectors(n, config)) for n, t in config.stacks.items() if t.connectors}
        )
        self.heads = nnx.Dict({name: nnx.Dict(parts) for name, parts in heads.items()})
        for kind in (Trunk, Experts, ByModality):  # a trunk adds the path of the layer
            for _, part in nnx.iter_modules(self):
                if isinstance(part, kind):
                    part.check(modalities)

    def tower(self, name: str) -> Trunk:
        """Return the layers of a tower."""
        module: Trunk = getattr(self, name)
        return module

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
        check_type(stream, Stream, "__call__", stem)
        stream = with_modality_token(stem, stream)
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
        self,
        streams: Iterable[Stream],
        key: jax.Array | None,
        mask: Mask = FULL,
        tower: str | None = None,
    ) -> tuple[Stream, Aux]:
        """Run a tower once over the tokens of all `streams`, under a mask; without a key nothing is drawn.

        Streams of modalities that other towers read pass these first, under the same mask. The tokens that a tower
        reads by cross-attention, its context, are not among those that come out.

        Args:
          tower: its name; by default the one whose output holds all modalities of the streams, see `Towers.joint`.
        """
        streams = list(streams)
        if tower is None:
            tower = self.towers.joint(name for s in streams for name, _ in s.layout)
        return self._run(tower, streams, key, mask)

    def _run(
        self, name: str, streams: list[Stream], key: jax.Array | None, mask: Mask
    ) -> tuple[Stream, Aux]:
        tower, auxes = self.towers[name], list[Aux]()
        tokens: list[Stream | None] = list(streams)
        for source in tower.reads:
            at = self._below(source, streams)
            if at:
                below = [streams[i] for i in at]
                out, aux = self._run(source, below, key, mask)
                auxes.append(aux)
                if source in self._connectors(name):
                    out, aux = self._connected(name, source, out, key)
                    auxes.append(aux)
                    outputs: list[Stream | None] = [replace(out, coordinates={})]
                    outputs += [None] * (len(at) - 1)  # the connector made one stream of all
                else:
                    pieces = cut(out.x_BSD, [s.x_BSD.shape[1] for s in below])
                    outputs = [
                        replace(s, x_BSD=piece, coordinates={})
                        for s, piece in zip(below, pieces, strict=True)
                    ]
                for i, output in zip(at, outputs, strict=True):
                    tokens[i] = output
        context = None
        if tower.context:
            at = self._below(tower.context, streams)
            context, aux = self._context(name, [streams[i] for i in at], key)
            auxes.append(aux)
            tokens = [t for i, t in enumerate(tokens) if i not in at]
        joined = concatenate([t for t in tokens if t is not None])
        stream = replace(joined, mask=self.mask_in(name, mask), context=context)
        out, aux = self._apply(name, stream, key)
        return replace(out, context=None), add_up([*auxes, aux]) if auxes else aux

    def _below(self, source: str, streams: list[Stream]) -> list[int]:
        """Return the indices of the streams that reach a tower's source."""
        reach = self.towers[source].below
        return [i for i, s in enumerate(streams) if self._reader(s) in reach]

    def _reader(self, stream: Stream) -> str:
        """Return the tower that reads a stream; an empty name for tokens of no modality."""
        readers = {self.towers.reader(name) for name, _ in stream.layout} - {""}
        if len(readers) > 1:
            raise UserError(
                f"a stream holds tokens of modalities {[n for n, _ in stream.layout]}, which towers "
                f"{', '.join(sorted(readers))} read. Give these modalities one tower in modalities.NAME.tower."
            )
        return readers.pop() if readers else ""

    def _context(
        self, name: str, streams: list[Stream], key: jax.Array | None
    ) -> tuple[Stream, Aux]:
        source = self.towers[name].context
        if not streams:
            raise UserError(
                f"model.towers.{name}.context is '{source}', and the pass has no tokens that reach tower '{source}'. "
                "Give the task a modality that it reads."
            )
        out, aux = self._run(source, streams, key, FULL)
        if source not in self._connectors(name):
            return out, aux
        out, added = self._connected(name, source, out, key)
        return out, add_up([aux, added])

    def _connectors(self, name: str) -> Mapping[str, Any]:
        """Return the connectors of a tower, by the tower that each reads."""
        modules: Mapping[str, Any] = self.connectors.get(name, {})
        return modules

    def _connected(
        self, name: str, source: str, stream: Stream, key: jax.Array | None
    ) -> tuple[Stream, Aux]:
        """Return a tower's output as another reads it, through their connector."""
        number = zlib.crc32(f"{source} {name}".encode())
        try:
            out, aux = self._connectors(name)[source](stream, fold(key, number))
        except UserError as error:
            raise UserError(f"model.towers.{name}.connectors.{source}: {error}") from error
        return out, aux

    def mask_in(self, name: str, mask: Mask) -> Mask:
        """Return the mask under which a tower runs."""
        return mask & Causal() if self.towers[name].causal else mask

    def _apply(self, name: str, stream: Stream, key: jax.Array | None) -> tuple[Stream, Aux]:
        """Run a tower's layers in its dtype, with draws of its own."""
        key = key if name == TRUNK else fold(key, zlib.crc32(name.encode()))
        dtype, outside = self.towers[name].dtype, stream.x_BSD.dtype
        if not dtype:
            return self.tower(name)(stream, key)
        context = stream.context
        if context is not None:
            context = replace(context, x_BSD=context.x_BSD.astype(dtype))
        inner = replace(stream, x_BSD=stream.x_BSD.astype(dtype), context=context)
        out, aux = self.tower(name)(inner, key)
        return replace(out, x_BSD=out.x_BSD.astype(outside)), aux


def _connectors(name: str, config: ModelConfig) -> dict[str, Any]:
    """Return the connectors of a tower, by the tower that each reads."""
    tower, modules = config.stacks[name], dict[str, Any]()
    for source, block in tower.connectors.items():
        where = f"{config.where(name)}.connectors.{source}"
        connector = configs.component("connectors", block, where)
        try:
            modules[source] = connector.build(config.stacks[source].width, tower.width)
        except UserError as error:  # what the keys alone do not show
            raise UserError(f"{where}: {error}") from error
    return modules


def _stack(tower: TowerConfig, where: str) -> Trunk:
    """Return the layers of a tower."""
    stack = Trunk(
        tower.layers,
        tower.width,
        tower.remat,
        f"{where}.layers",
        per_modality=tower.per_modality,
        norm=tower.norm,
        norm_eps=tower.norm_eps,
        first_norm=tower.first_norm,
    )
    if tower.dtype:
        compute_in(stack, tower.dtype)
    return stack


def connect_towers(config: ModelConfig, modalities: Mapping[str, Modality]) -> Towers:
    """Return how a model's towers are connected; see `mmjax.nn.towers.connect`."""
    return connect(
        config.stacks, modalities, {"stems", "heads", "towers", "connectors", *dir(Model)}
    )


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
