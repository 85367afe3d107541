"""Parts with a copy per modality: each token uses its own modality's (Mixture-of-Transformers, VLMo, BEiT-3).

The key `per_modality` of a block (or of the model, for its last norm) states which of its parts have copies, for which
modalities:

    {"parts": ["query", "key", "value", "out", "mlp"], "modalities": ["text", "image"]}          a copy each
    {"parts": ["mlp"], "modalities": {"text": "text", "speech": "sound", "notes": "sound"}}      two copies

Each copy is a parameter of its own (`mlp/text/up/kernel`), never a slice of a larger one. A token passes one copy, so
that the products cost what they cost a block without copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import accumulate, groupby
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.core.bounds import FieldError
from mmjax.core.errors import UserError, nearest
from mmjax.core.parameters import mark_copies
from mmjax.nn.masks import code
from mmjax.nn.stream import Stream

Modalities = Sequence[str] | Mapping[str, str]
Call = Callable[[Any, jax.Array], jax.Array]


@dataclass(frozen=True)
class TokenModalities:
    """The modality of each token of a stream.

    Attributes:
      layout: static segments (modality, length); each modality then costs slices.
      codes_BS: the `code` of each token's modality, int `[B or 1, S]`, where the program learns it only as it
        runs; it goes before the layout. Every copy is then applied to all tokens.
    """

    layout: tuple[tuple[str, int], ...] = ()
    codes_BS: jax.Array | None = None


NO_MODALITIES = TokenModalities()  # no part distinguishes these tokens


def modality_of(stream: Stream) -> TokenModalities:
    """Return the modalities by `attributes["modality"]` if the stream has it, else by its layout."""
    return TokenModalities(stream.layout, stream.attributes.get("modality"))


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
            mark_copies(getattr(self, name), len(names))

    def check(self, modalities: Iterable[str]) -> None:
        """Raise `UserError` for a copy whose modality is not among these but looks like one that has no copy.

        Other names may be those of tokens that an objective adds to a stream.
        """
        known = list(modalities)
        missing = [name for name in known if name not in self.experts]
        for name in self.experts.keys() - {*known}:
            if get_close_matches(name, missing, n=1, cutoff=0.5):
                raise UserError(
                    f"per_modality.modalities names '{name}', which is no modality.{nearest(name, missing)} "
                    f"(config.modalities: {', '.join(known)}.)"
                )

    def expert(self, modality: str) -> str:
        """Return the name of a modality's copy."""
        if modality not in self.experts:
            raise UserError(
                f"The stream has tokens of modality '{modality}', for which there is no copy."
                f"{nearest(modality, self.experts)} Add it to `per_modality.modalities` of the block (or of the model)."
            )
        return self.experts[modality]

    def of(self, modality: str) -> Any:
        """Return a modality's copy."""
        return getattr(self, self.expert(modality))

    def by_layout(
        self, layout: Sequence[tuple[str, int]], x: Any, call: Callable[[Any, Any], jax.Array]
    ) -> jax.Array:
        """Apply each copy once, to all its segments together; return the results in the order of the tokens.

        Args:
          x: an array `[B, S, ...]`, or a tuple of arrays.
        """
        size = jax.tree.leaves(x)[0].shape[1]
        if sum(length for _, length in layout) != size:
            raise ValueError(f"layout {layout} of a stream of {size} tokens")
        named = [(self.expert(modality), length) for modality, length in layout]
        runs = [(e, sum(n for _, n in group)) for e, group in groupby(named, lambda run: run[0])]
        lengths = [length for _, length in runs]
        leaves, tree = jax.tree.flatten(x)
        pieces = [_split(leaf, lengths) for leaf in leaves]
        done = {}
        for expert in _distinct(e for e, _ in runs):
            at = [i for i, (e, _) in enumerate(runs) if e == expert]
            segments = [jnp.concatenate([piece[i] for i in at], axis=1) for piece in pieces]
            y = call(getattr(self, expert), jax.tree.unflatten(tree, segments))
            done[expert] = iter(_split(y, [lengths[i] for i in at]))
        return jnp.concatenate([next(done[e]) for e, _ in runs], axis=1)

    def by_codes(self, codes_BS: jax.Array, x: jax.Array, call: Call) -> jax.Array:
        """Apply every copy to all tokens, at the cost of as many products; a token of none of them gets zero."""
        total: Any = 0
        for expert in _distinct(self.experts.values()):
            y = call(getattr(self, expert), x)
            matches = [codes_BS == code(m) for m, e in self.experts.items() if e == expert]
            is_own = jnp.stack(matches).any(axis=0)
            total = jnp.where(is_own.reshape(*is_own.shape, *[1] * (y.ndim - 2)), y, total)
        return jnp.asarray(total)


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _split(x: jax.Array, lengths: Sequence[int]) -> list[jax.Array]:
    # One operation whose transpose is one concatenation; slices would each be padded to the whole.
    return jnp.split(x, list(accumulate(lengths))[:-1], axis=1)


def call_part(part: Any, x: jax.Array) -> jax.Array:
    """Return `part(x)`."""
    y: jax.Array = part(x)
    return y


def apply_per_modality(
    part: Any, x: jax.Array, token_modalities: TokenModalities, call: Call = call_part
) -> jax.Array:
    """Return `call(part, x)` for tokens `[B, S, ...]`, each by its own copy if the part has copies.

    `call` treats each token on its own.

    Raises:
      UserError: a modality without a copy, or a stream that does not state the modality of its tokens.
    """
    if not isinstance(part, ByModality):
        return call(part, x)
    if token_modalities.codes_BS is not None:
        return part.by_codes(token_modalities.codes_BS, x, call)
    if not token_modalities.layout:
        raise UserError(
            "The block is untied by modality, but its stream has neither a layout nor an attribute 'modality'."
        )
    return part.by_layout(token_modalities.layout, x, call)


@dataclass(frozen=True)
class PerModality:
    """The parts of a block that have a copy per modality.

    Attributes:
      parts: those that have copies, out of those that the block names.
      modalities: those that have a copy each, or modality -> name of its copy, which several may share.
    """

    parts: tuple[str, ...] = ()
    modalities: tuple[str, ...] | dict[str, str] = ()

    def __post_init__(self) -> None:
        if bool(self.parts) != bool(self.modalities):
            words = f"is {list(self.parts)} and modalities {self.modalities or []}: name the parts that have copies, "
            raise FieldError(self, "parts", f"{words}and the modalities that have one; or neither.")

    def __call__(self, part: str, make: Callable[[], Any]) -> Any:
        """Return the part, or its copies."""
        return ByModality(make, experts(self.modalities)) if part in self.parts else make()


SHARED = PerModality()


def check_parts(block: Any, known: Iterable[str]) -> None:
    """Raise unless the block's `per_modality` names parts that the block has.

    Raises:
      FieldError: suggests the nearest name.
    """
    known = list(known)
    for part in block.per_modality.parts:
        if part not in known:
            words = f"names '{part}'.{nearest(part, known)}"
            raise FieldError(block, "per_modality.parts", words)


def experts(modalities: Modalities) -> dict[str, str]:
    """Return a dict from modality to expert, from a list (an expert each) or as it is."""
    if isinstance(modalities, str):
        raise UserError(f"modalities is '{modalities}': write a list, or modality: expert.")
    if isinstance(modalities, Mapping):
        return dict(modalities)
    return {name: name for name in modalities}
