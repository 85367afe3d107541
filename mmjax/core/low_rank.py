"""Low-rank deltas of matrices (LoRA, Hu et al. 2022): `W + (alpha / rank) A B`, of which A and B are trained.

They are declared beside the model's own parameters and folded into these before each pass, so that no layer knows of
them. B begins at zero: the adapted model is the base at step 0. All other parameters are frozen unless a rule of the
optimizer states otherwise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers

from mmjax.core.bounds import COUNT, POSITIVE, check
from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration, Spec

A, B = "_lora_a", "_lora_b"  # end the names of a matrix's delta
FACTORS = (A, B)
_MAPPED = ("layers", "experts")  # axes that index separate matrices


@dataclass(frozen=True)
class LowRankConfig:
    """Low-rank deltas of the matrices that a pattern matches.

    Attributes:
      match: regular expressions of whole canonical names: `trunk/layers/.*/attention/(query|value)`. All layers of a
        group have a delta or none.
      rank: r, columns of A and rows of B.
      alpha: the delta is scaled by `alpha / rank`.
    """

    match: tuple[str, ...]
    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        check(self, rank=COUNT, alpha=POSITIVE)


@dataclass(frozen=True)
class LowRank:
    """The delta of one matrix: where it stands, and its scale.

    Attributes:
      mapped: leading axes that index separate matrices.
      a, b: specifications of its factors.
    """

    scale: float
    mapped: int
    a: Spec
    b: Spec

    def added(self, matrix: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        """Return the matrix with its delta, in float32 or wider."""
        dtype = jnp.promote_types(matrix.dtype, jnp.float32)
        product = partial(jnp.tensordot, axes=1)
        for _ in range(self.mapped):
            product = jax.vmap(product)
        return matrix.astype(dtype) + self.scale * product(a.astype(dtype), b.astype(dtype))


Adapters = Mapping[str, LowRank]


def adapt(declaration: Declaration, configs: tuple[LowRankConfig, ...], where: str) -> None:
    """Add the deltas to a model's declaration, in place, and freeze the others by default.

    Raises:
      UserError: a pattern that matches nothing, or what is no matrix; two for one matrix; a group in part.
    """
    adapters = adapters_of(declaration.specs, configs, where)
    if not adapters:
        return
    base = {name: replace(spec, frozen=True) for name, spec in declaration.specs.items()}
    factors = {spec.name: spec for one in adapters.values() for spec in (one.a, one.b)}
    declaration.extend({**base, **factors}, partial(fold, adapters))


def fold(adapters: Adapters, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arrays with each delta added to its matrix; the factors stay among them."""
    changed = {
        name: one.added(
            jnp.asarray(arrays[name]), *(jnp.asarray(arrays[s.name]) for s in (one.a, one.b))
        )
        for name, one in adapters.items()
    }
    return {**arrays, **changed}


def merged(adapters: Adapters, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return the base's parameters with the deltas added for good, each in its dtype; the factors are dropped."""
    factors = {spec.name for one in adapters.values() for spec in (one.a, one.b)}
    whole = fold(adapters, arrays)
    return {n: whole[n].astype(x.dtype) for n, x in arrays.items() if n not in factors}


def adapters_of(
    specs: Mapping[str, Spec], configs: tuple[LowRankConfig, ...], where: str
) -> dict[str, LowRank]:
    """Return the deltas by the name of their matrix; see `adapt`."""
    result: dict[str, LowRank] = {}
    for index, config in enumerate(configs):
        place = f"{where}[{index}]"
        for name in _matched(config, specs, place):
            if name in result:
                raise UserError(f"{place}.match: '{name}' has a delta already. Match it once.")
            result[name] = _low_rank(specs[name], config, place)
    return result


def _matched(config: LowRankConfig, specs: Mapping[str, Spec], where: str) -> list[str]:
    """Return the names of the matrices that the patterns match."""
    if not config.match:
        raise UserError(f"{where}.match is empty; name the matrices that get a delta.")
    canonical = [name for spec in specs.values() for name in spec.canonical]
    names = set[str]()
    for pattern in config.match:
        try:
            hits = {name for name in canonical if re.fullmatch(pattern, name)}
        except re.error as error:
            raise UserError(
                f"{where}.match: '{pattern}' is no regular expression: {error}."
            ) from error
        if not hits:
            close = get_close_matches(pattern, canonical, n=3, cutoff=0.0)
            raise UserError(
                f"{where}.match: '{pattern}' matches the whole of no parameter's name. "
                f"The nearest: {', '.join(close)}."
            )
        names |= hits
    chosen = []
    for name, spec in specs.items():
        inside = [c for c in spec.canonical if c in names]
        if inside and len(inside) < len(spec.canonical):
            raise UserError(
                f"{where}.match matches {', '.join(inside)}, but not the other layers of their group. "
                "Make two groups of it in model.layers; layers keep their names."
            )
        chosen += [name] if inside else []
    return chosen


def _low_rank(spec: Spec, config: LowRankConfig, where: str) -> LowRank:
    """Return the delta of a matrix: its first axes are those of the input, its last those of the output.

    Attention's `[D, heads, K]` has one axis of inputs, its `[heads, K, D]` has two.
    """
    mapped = 0
    while mapped < len(spec.axes) and spec.axes[mapped] in _MAPPED:
        mapped += 1
    inputs = mapped + (2 if spec.axes[mapped : mapped + 1] == ("heads",) else 1)
    outputs = spec.axes[inputs:]
    if len(outputs) != (2 if outputs[:1] == ("heads",) else 1):
        raise UserError(
            f"{where}.match: '{spec.canonical[0]}' {list(spec.shape)} is no matrix, so that it has no low-rank delta."
        )
    size = math.prod(spec.shape[mapped:inputs])
    if config.rank > min(size, math.prod(spec.shape[inputs:])):
        raise UserError(
            f"{where}.rank is {config.rank}, more than '{spec.canonical[0]}' {list(spec.shape)} can have."
        )
    rank, lead = (config.rank,), spec.shape[:mapped]
    a_init = initializers.normal(1 / math.sqrt(size))
    a_axes = (*spec.axes[:inputs], None)
    b_axes = (*spec.axes[:mapped], None, *outputs)
    a = _factor(spec, A, (*spec.shape[:inputs], *rank), a_axes, a_init)
    b = _factor(spec, B, (*lead, *rank, *spec.shape[inputs:]), b_axes, initializers.zeros)
    return LowRank(config.alpha / config.rank, mapped, a, b)


def _factor(
    spec: Spec, suffix: str, shape: tuple[int, ...], axes: tuple[str | None, ...], init: Any
) -> Spec:
    stack = spec.stack and replace(spec.stack, inner=spec.stack.inner + suffix)
    return replace(
        spec, name=spec.name + suffix, shape=shape, axes=axes, init=init, stack=stack, decay=True
    )
