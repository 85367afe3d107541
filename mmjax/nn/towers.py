"""Towers: the stacks of a model by name, which modalities each reads, and which of them read others."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmjax.core import config as configs
from mmjax.core.bounds import COUNT, POSITIVE, check, check_choices
from mmjax.core.errors import UserError, nearest
from mmjax.nn.by_modality import SHARED, PerModality, check_parts
from mmjax.nn.trunk import GroupConfig

TRUNK = "trunk"  # the tower of a config that names none
DTYPES = ("", "float32", "bfloat16")
REMATS = ("none", "dots", "full")


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
      first_norm: a norm like the last one before the first layer (CLIP's `ln_pre`).
      dtype: of the tower's arithmetic; that of the run (`dtype.compute`) if empty.
      reads: towers whose output tokens are tokens of this one, beside those of its modalities.
      context: the tower whose output the cross-attention of this one reads; none if empty.
      causal: whether a token sees only those before it, whatever else the objective's mask hides.
      connectors: what stands between it and a tower of `reads` or `context`, by that tower's name: `{name: ..., ...}`,
        see `mmjax.connectors.base`. Without one, both have the same width.
    """

    width: int
    layers: tuple[GroupConfig, ...]
    remat: str = field(default="none", metadata=configs.FREE)
    norm: str = "layer"
    norm_eps: float = 1e-6
    per_modality: PerModality = SHARED
    first_norm: bool = False
    dtype: str = ""
    reads: tuple[str, ...] = ()
    context: str = ""
    causal: bool = False
    connectors: dict[str, dict[str, Any]] = field(
        default_factory=dict, metadata=configs.holds("connectors", {"attention_impl": "free"})
    )

    def __post_init__(self) -> None:
        check(self, width=COUNT, norm_eps=POSITIVE)
        check_parts(self, ("norm",))
        check_choices(self, dtype=DTYPES, remat=REMATS)

    @property
    def sources(self) -> tuple[str, ...]:
        """The towers whose output it takes, as tokens or as context."""
        return (*self.reads, *([self.context] if self.context else []))


@dataclass(frozen=True)
class Tower:
    """A tower without its layers; see `TowerConfig`. `below` holds its name and those of all that reach it."""

    width: int
    reads: tuple[str, ...] = ()
    context: str = ""
    causal: bool = False
    dtype: str = ""
    below: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Towers:
    """The connections of a model's towers.

    Attributes:
      towers: by name, in order.
      readers: the tower that reads each modality.
    """

    towers: tuple[tuple[str, Tower], ...]
    readers: tuple[tuple[str, str], ...]

    def __getitem__(self, name: str) -> Tower:
        return dict(self.towers)[name]

    def reader(self, modality: str) -> str:
        """Return the tower that reads a modality; an empty name for a segment that is no modality."""
        return dict(self.readers).get(modality, "")

    def joint(self, modalities: Iterable[str], owner: str = "the pass") -> str:
        """Return the tower whose output holds all of these modalities: that which reads them, or reads those that do.

        Args:
          owner: whoever needs it, for the error.

        Raises:
          UserError: there is none, or more than one.
        """
        if len(self.towers) == 1:
            return self.towers[0][0]
        names = [name for name in dict.fromkeys(modalities) if self.reader(name)]
        readers = {self.reader(name) for name in names}
        if len(readers) == 1:
            return readers.pop()
        whole = [name for name, tower in self.towers if names and readers <= tower.below]
        nearest_ = [name for name in whole if not (self[name].below - {name}) & {*whole}]
        if len(nearest_) != 1:
            raise UserError(self._apart(names, nearest_, owner))
        return nearest_[0]

    def _apart(self, names: list[str], joined_by: list[str], owner: str) -> str:
        listed = ", ".join(
            f"'{n}' by tower '{self.reader(n)}' (width {self[self.reader(n)].width})" for n in names
        )
        why = f"towers {', '.join(joined_by)} all join them" if joined_by else "no tower joins them"
        return (
            f"{owner} needs one tower for modalities {names}, which are read {listed or 'by none'}; {why}. Name one "
            "tower in modalities.NAME.tower, or let one tower name theirs in model.towers.NAME.reads."
        )


class Widths:
    """The sizes of a token that objectives build their heads for: of each modality, or of several that are joined."""

    def __init__(self, towers: Towers):
        self.towers = towers

    @classmethod
    def same(cls, width: int) -> Widths:
        """Return the widths of a model with one tower."""
        return cls(Towers(((TRUNK, Tower(width, below=frozenset({TRUNK}))),), ()))

    def __getitem__(self, modality: str) -> int:
        """Return the width of the tower that reads a modality."""
        return self.one((modality,), modality)

    def one(self, modalities: Iterable[str], owner: str) -> int:
        """Return the width of the tower whose output holds all of these modalities, see `Towers.joint`."""
        return self.towers[self.towers.joint(modalities, owner)].width


def connect(
    configs_of: Mapping[str, TowerConfig], modalities: Mapping[str, Any], taken: Container[str]
) -> Towers:
    """Return how towers and modalities are connected.

    Args:
      configs_of: the towers by name.
      modalities: by name; `tower` of each names its reader.
      taken: names that a tower may not have.

    Raises:
      UserError: names a key whose value connects nothing.
    """
    for name in configs_of:
        if not re.fullmatch(r"[A-Za-z]\w*", name):
            raise UserError(
                f"model.towers: '{name}' is no name; use letters, digits and underscores, a letter first."
            )
        if name in taken:
            raise UserError(
                f"model.towers: '{name}' is the name of another part of the model. Give the tower another name."
            )
    readers = {m: _reader(m, modality.tower, configs_of) for m, modality in modalities.items()}
    for name, config in configs_of.items():
        _check_sources(name, config, configs_of)
    below = {name: _below(name, configs_of, ()) for name in configs_of}
    for name, config in configs_of.items():
        _check_disjoint(name, config, below)
        if modalities and not config.reads and name not in readers.values():
            raise UserError(
                f"model.towers.{name} reads nothing: no modality names it. Set modalities.NAME.tower={name}, or "
                f"model.towers.{name}.reads to other towers, or remove it."
            )
    towers = tuple(
        (n, Tower(c.width, c.reads, c.context, c.causal, c.dtype, below[n]))
        for n, c in configs_of.items()
    )
    return Towers(towers, tuple(readers.items()))


def _reader(modality: str, tower: str, towers: Mapping[str, TowerConfig]) -> str:
    """Return the tower that reads a modality."""
    if not tower:
        if len(towers) == 1:
            return next(iter(towers))
        if TRUNK in towers:
            return TRUNK
        raise UserError(
            f"modalities.{modality}.tower is empty, so no tower reads '{modality}'. Set it to one of: "
            f"{', '.join(towers)}."
        )
    if tower not in towers:
        raise UserError(
            f"modalities.{modality}.tower is '{tower}', which model.towers does not name.{nearest(tower, towers)}"
        )
    return tower


def _check_sources(name: str, config: TowerConfig, towers: Mapping[str, TowerConfig]) -> None:
    """Raise unless the towers that a tower reads exist, and have its width or a connector."""
    for key, sources in (
        ("reads", config.reads),
        ("context", [config.context] if config.context else []),
    ):
        for source in sources:
            if source not in towers:
                raise UserError(
                    f"model.towers.{name}.{key} names tower '{source}', which model.towers does not "
                    f"have.{nearest(source, towers)}"
                )
            if towers[source].width != config.width and source not in config.connectors:
                raise UserError(
                    f"model.towers.{name}.{key} names tower '{source}' of width {towers[source].width}, and its own "
                    f"width is {config.width}. Give both one width, or set model.towers.{name}.connectors.{source}."
                )
    for source in config.connectors:
        if source not in config.sources:
            raise UserError(
                f"model.towers.{name}.connectors has '{source}', which the tower does not read: its reads and context "
                f"are {list(config.sources)}.{nearest(source, config.sources)}"
            )


def _below(name: str, towers: Mapping[str, TowerConfig], path: tuple[str, ...]) -> frozenset[str]:
    """Return a tower and all towers whose output reaches it."""
    if name in path:
        cycle = " -> ".join((*path[path.index(name) :], name))
        raise UserError(f"model.towers: {cycle} is a cycle of `reads` and `context`. Remove one.")
    inner = (_below(source, towers, (*path, name)) for source in towers[name].sources)
    return frozenset({name}).union(*inner)


def _check_disjoint(name: str, config: TowerConfig, below: Mapping[str, frozenset[str]]) -> None:
    """Raise where a tower's output would reach another on two ways."""
    seen: set[str] = set()
    for source in config.sources:
        if twice := sorted(seen & below[source]):
            raise UserError(
                f"model.towers.{name}: tower '{twice[0]}' reaches it on two ways, by {list(config.sources)}. Keep one."
            )
        seen |= below[source]
