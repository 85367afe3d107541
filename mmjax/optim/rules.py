"""Rules by parameter path: another learning rate, weight decay on or off, freezing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType

import numpy as np

from mmjax.core.bounds import AMOUNT, check
from mmjax.core.errors import UserError
from mmjax.core.parameters import BufferSpec, Spec


@dataclass(frozen=True)
class RuleConfig:
    """Settings for the parameters that match a pattern; a later rule overrides an earlier one.

    Attributes:
      match: a regular expression of whole canonical names, as `mmjax show` and errors give them:
        `stems/text/.*`, `trunk/layers/00[0-5]/.*`, `.*/bias`.
      learning_rate: a factor of the rate.
      weight_decay: whether it applies; by default to matrices.
      freeze: no update, no optimizer state, no gradient. All layers of a group freeze or none.
    """

    match: str
    learning_rate: float | None = None
    weight_decay: bool | None = None
    freeze: bool | None = None

    def __post_init__(self) -> None:
        check(self, learning_rate=AMOUNT)


@dataclass(frozen=True)
class Ruled:
    """The settings that the rules give one parameter; a stacked one has a number for each of its layers.

    Attributes:
      scale: factor of the learning rate, float64 `[]` or `[layers]`.
      decays: whether weight decay applies, float64 of 0 and 1, `[]` or `[layers]`.
      frozen: whether it stays as it is.
    """

    scale: np.ndarray
    decays: np.ndarray
    frozen: bool


def apply_rules(rules: Sequence[RuleConfig], specs: Mapping[str, Spec]) -> dict[str, Ruled]:
    """Return the settings of each parameter; of buffers among `specs`, which a rule may freeze, as well.

    Raises:
      UserError: a pattern that is no regular expression or matches nothing; a group frozen in part.
    """
    matched = [
        matches(r.match, _matchable(r, specs), f"optimizer.rules[{i}].match")
        for i, r in enumerate(rules)
    ]
    result = {}
    for name, spec in specs.items():
        per_layer = [
            _last(c, spec.decay, [r for r, m in zip(rules, matched, strict=True) if c in m])
            for c in spec.canonical
        ]
        scale, decays, frozen = (np.array(x) for x in zip(*per_layer, strict=True))
        if frozen.any() != frozen.all():
            part = ", ".join(c for c, yes in zip(spec.canonical, frozen, strict=True) if yes)
            raise UserError(
                f"optimizer.rules freeze {part}, but not the other layers of their group. "
                "Make two groups of it in model.layers; layers keep their names."
            )
        shape = (len(per_layer),) if spec.stack else ()
        result[name] = Ruled(
            scale.astype(float).reshape(shape), decays.astype(float).reshape(shape), bool(frozen[0])
        )
    return result


def _matchable(rule: RuleConfig, specs: Mapping[str, Spec]) -> list[str]:
    """Return the canonical names that a rule may match: those of buffers only where it freezes."""
    chosen = [s for s in specs.values() if rule.freeze is not None or not isinstance(s, BufferSpec)]
    return [name for spec in chosen for name in spec.canonical]


def trained(
    rules: Sequence[RuleConfig],
    specs: Mapping[str, Spec],
    buffers: Mapping[str, Spec] = MappingProxyType({}),
) -> frozenset[str]:
    """Return the parameters that no rule freezes."""
    ruled = apply_rules(rules, {**specs, **buffers})
    return frozenset(name for name in specs if not ruled[name].frozen)


def matches(pattern: str, names: Iterable[str], where: str) -> frozenset[str]:
    """Return the names that a pattern matches whole; an error if it matches none."""
    names = list(names)
    try:
        result = frozenset(n for n in names if re.fullmatch(pattern, n))
    except re.error as error:
        raise UserError(f"{where} = '{pattern}' is no regular expression: {error}.") from error
    if not result:
        close = get_close_matches(pattern, names, n=3, cutoff=0.0)
        raise UserError(
            f"{where} = '{pattern}' matches the whole of no parameter's name. "
            f"The nearest: {', '.join(close)}."
        )
    return result


def _last(name: str, decay: bool, rules: Sequence[RuleConfig]) -> tuple[float, bool, bool]:
    scale, decays, frozen = 1.0, decay, False
    for rule in rules:
        scale = scale if rule.learning_rate is None else rule.learning_rate
        decays = decays if rule.weight_decay is None else rule.weight_decay
        frozen = frozen if rule.freeze is None else rule.freeze
    return scale, decays, frozen
