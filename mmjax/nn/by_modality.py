"""Parts with a copy per modality: each token uses its own modality's (Mixture-of-Transformers, VLMo, BEiT-3).

A block says which of its parts are untied and for which modalities:

    untie: ["query", "key", "value", "out", "mlp"]
    modalities: ["text", "image"]                  a copy each
    modalities: {"text": "text", "speech": "sound", "notes": "sound"}      two copies, one of them for two modalities

Each copy is a parameter of its own (`mlp/text/up/kernel`), never a slice of a larger one. A token passes one copy, so
that the products cost what they cost a block without copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.core.bounds import FieldError, check_choices
from mmjax.core.errors import UserError, nearest
from mmjax.core.parameters import as_copy
from mmjax.nn.masks import code
from mmjax.nn.stream import Stream

Modalities = Sequence[str] | Mapping[str, str]
Call = Callable[[Any, jax.Array], jax.Array]


@dataclass(frozen=True)
class Kinds:
    """Of which modality each token of a stream is.

    Attributes:
      layout: static segments (modality, length); each modality then costs slices.
      codes_BS: the `code` of each token's modality, int `[B or 1, S]`, where the program learns it only as it
        runs; it goes before the layout. Every copy is then applied to all tokens.
    """

    layout: tuple[tuple[str, int], ...] = ()
    codes_BS: jax.Array | None = None


ONE = Kinds()  # of tokens that no part tells apart


def kinds(stream: Stream) -> Kinds:
    """By `attributes["modality"]` if the stream has it, else by its layout."""
    return Kinds(stream.layout, stream.attributes.get("modality"))


class ByModality(nnx.Module):
    """A copy of a part (a parameter or a module) per expert.

    Args:
      make: makes the part; its copies begin apart.
      experts: modality -> name of its expert.
    """

    def __init__(self, make: Callable[[], Any], experts: Mapping[str, str]):
        self.experts = dict(experts)
        names = _distinct(experts.values())
        for name in names:
            if hasattr(self, name) or "/" in name:
                raise UserError(f"modalities: no copy can have the name '{name}'. Use another.")
            setattr(self, name, make())
            as_copy(getattr(self, name), len(names))

    def expert(self, modality: str) -> str:
        """The name of a modality's copy."""
        if modality not in self.experts:
            raise UserError(
                f"The stream has tokens of modality '{modality}', for which there is no copy."
                f"{nearest(modality, self.experts)} Add it to `modalities` of the block (or of the trunk's norm)."
            )
        return self.experts[modality]

    def of(self, modality: str) -> Any:
        """A modality's copy."""
        return getattr(self, self.expert(modality))

    def by_layout(
        self, layout: Sequence[tuple[str, int]], x: Any, call: Callable[[Any, Any], jax.Array]
    ) -> jax.Array:
        """Each copy once, on all its segments together; the results in the order of the tokens.

        Args:
          x: an array `[B, S, ...]`, or a tuple of such.
        """
        size = jax.tree.leaves(x)[0].shape[1]
        if sum(length for _, length in layout) != size:
            raise ValueError(f"layout {layout} of a stream of {size} tokens")
        named = [(self.expert(modality), length) for modality, length in layout]
        runs = [(e, sum(n for _, n in each)) for e, each in groupby(named, lambda run: run[0])]
        lengths = [length for _, length in runs]
        leaves, tree = jax.tree.flatten(x)
        pieces = [_split(leaf, lengths) for leaf in leaves]
        done = {}
        for expert in _distinct(e for e, _ in runs):
            at = [i for i, (e, _) in enumerate(runs) if e == expert]
            own = [jnp.concatenate([piece[i] for i in at], axis=1) for piece in pieces]
            y = call(getattr(self, expert), jax.tree.unflatten(tree, own))
            done[expert] = iter(_split(y, [lengths[i] for i in at]))
        return jnp.concatenate([next(done[e]) for e, _ in runs], axis=1)

    def by_codes(self, codes_BS: jax.Array, x: jax.Array, call: Call) -> jax.Array:
        """Every copy on all tokens, at the cost of as many products; zero for a token of none of them."""
        total: Any = 0
        for expert in _distinct(self.experts.values()):
            y = call(getattr(self, expert), x)
            own = [codes_BS == code(m) for m, e in self.experts.items() if e == expert]
            is_own = jnp.stack(own).any(axis=0)
            total = jnp.where(is_own.reshape(*is_own.shape, *[1] * (y.ndim - 2)), y, total)
        return jnp.asarray(total)


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _split(x: jax.Array, lengths: Sequence[int]) -> list[jax.Array]:
    # One operation whose transpose is one concatenation; slices would each be padded to the whole.
    return jnp.split(x, list(accumulate(lengths))[:-1], axis=1)


def plainly(part: Any, x: jax.Array) -> jax.Array:
    """`part(x)`."""
    y: jax.Array = part(x)
    return y


def apply(part: Any, x: jax.Array, kinds: Kinds, call: Call = plainly) -> jax.Array:
    """`call(part, x)` for tokens `[B, S, ...]`, each by its own copy where the part has copies.

    `call` treats each token on its own.

    Raises:
      UserError: a modality without a copy, or a stream that does not say what its tokens are.
    """
    if not isinstance(part, ByModality):
        return call(part, x)
    if kinds.codes_BS is not None:
        return part.by_codes(kinds.codes_BS, x, call)
    if not kinds.layout:
        raise UserError(
            "The block is untied by modality, but its stream has neither a layout nor an attribute 'modality'."
        )
    return part.by_layout(kinds.layout, x, call)


@dataclass(frozen=True)
class Untied:
    """Which parts of a block have copies, and for whom: modality -> expert."""

    parts: frozenset[str] = frozenset()
    experts: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, part: str, make: Callable[[], Any]) -> Any:
        """The part, or its copies."""
        return ByModality(make, self.experts) if part in self.parts else make()


TIED = Untied()


class HasCopies(Protocol):
    """The config of a block whose parts may have copies."""

    @property
    def untie(self) -> tuple[str, ...]:
        """The parts that have copies."""

    @property
    def modalities(self) -> Modalities:
        """The modalities that have one, see the module's docstring."""


def check_untied(block: HasCopies, known: Iterable[str]) -> None:
    """Raise unless `untie` names parts that the block has, and one of `untie` and `modalities` has the other.

    Raises:
      FieldError: names the key.
    """
    check_choices(block, untie=known)
    if bool(block.untie) != bool(block.modalities):
        raise FieldError(
            block,
            "untie",
            f"is {list(block.untie)} and modalities {block.modalities or []}: name the parts that have copies, and "
            "the modalities that have one; or neither.",
        )


def untied(block: HasCopies) -> Untied:
    """Return which parts of a block have copies."""
    return Untied(frozenset(block.untie), experts(block.modalities))


def experts(modalities: Modalities) -> dict[str, str]:
    """Modality -> expert, from a list (an expert each) or as it is."""
    if isinstance(modalities, str):
        raise UserError(f"modalities is '{modalities}': write a list, or modality: expert.")
    if isinstance(modalities, Mapping):
        return dict(modalities)
    return {name: name for name in modalities}
