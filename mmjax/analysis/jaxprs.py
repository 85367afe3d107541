"""Analyses of a traced function: dead-code elimination as a question, and the traced derivative.

The count of floating-point operations and the reach of a gradient ask one thing of a jaxpr: when
only some outputs are wanted, which equations and which inputs are needed? `Liveness` answers it
backwards, equation by equation, following the jaxprs inside equations. Only names, shapes and
parameters of equations are read, through `jax.extend.core`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from mmjax.core.errors import UserError

Used = tuple[bool, ...]

# Equations that run one inner jaxpr on their own operands, once, and return its results.
CALLS = frozenset(
    [
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "core_closed_call",
        "remat",
        "remat2",
        "checkpoint",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_partitioning",
        "shard_map",
    ]
)
# Equations that treat several operands alike: result i depends on operand i alone.
_POINTWISE = frozenset(
    ["optimization_barrier", "psum", "psum2", "psum_invariant", "pmax", "pmin", "pvary", "pcast"]
)


def opened(jaxpr: Any) -> Jaxpr:
    """Return the jaxpr itself; older JAX wraps most together with their constants."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def called(eqn: JaxprEqn) -> Jaxpr:
    """Return the inner jaxpr of one of `CALLS`."""
    params = eqn.params
    return opened(next(params[k] for k in ("jaxpr", "call_jaxpr", "call") if k in params))


def scan_split(eqn: JaxprEqn) -> tuple[int, int]:
    """Return (number of constants, number of carries) among the operands of a scan.

    Read from the ranks (a scanned operand or result loses its leading axis inside the body)
    because the parameters that show it differ between JAX versions.
    """
    body = opened(eqn.params["jaxpr"])

    def same(outside: Any, inside: Any) -> bool:
        return len(outside.aval.shape) == len(inside.aval.shape)

    whole = sum(map(same, eqn.invars, body.invars))
    carries = sum(map(same, eqn.outvars, body.outvars))
    return whole - carries, carries


def while_split(eqn: JaxprEqn) -> tuple[int, int]:
    """Return (constants of the condition, constants of the body): they lead the operands of a while."""
    return eqn.params["cond_nconsts"], eqn.params["body_nconsts"]


def _any(a: Used, b: Used) -> Used:
    return tuple(x or y for x, y in zip(a, b, strict=True))


def _has_effect(eqn: JaxprEqn) -> bool:
    """Return whether the equation runs even if its results are unused: prints, callbacks, references.

    Collectives also carry an effect, which only records the name of their mesh axis.
    """
    return any(type(effect).__name__ != "NamedAxisEffect" for effect in eqn.effects)


@dataclass(frozen=True, eq=False)
class Liveness:
    """Dead-code elimination over jaxprs.

    It errs on one side: an input it calls unneeded is unneeded, and one it calls needed may still
    turn out to be (a slice of a stacked array needs the whole, as does a product with 0.0).

    `blocked` names primitives through which need does not pass: what is found needed then is
    needed by some way around them.
    """

    blocked: frozenset[str] = frozenset()
    _seen: dict[tuple[Jaxpr, Used], tuple[Used, list[tuple[JaxprEqn, Used]]]] = field(
        default_factory=dict, repr=False
    )

    def inputs(self, jaxpr: Jaxpr, used: Used) -> Used:
        """Return, for each input of `jaxpr`, whether the `used` outputs need it."""
        return self._walked(jaxpr, used)[0]

    def equations(self, jaxpr: Jaxpr, used: Used) -> list[tuple[JaxprEqn, Used]]:
        """Return the equations that the `used` outputs need, in order, each with its own used outputs.

        Equations with effects are needed always.
        """
        return self._walked(jaxpr, used)[1]

    def _walked(self, jaxpr: Jaxpr, used: Used) -> tuple[Used, list[tuple[JaxprEqn, Used]]]:
        # Layers share inner jaxprs, and the fixed points below ask again: hence the cache.
        if (jaxpr, used) not in self._seen:
            self._seen[jaxpr, used] = self._walk(jaxpr, used)
        return self._seen[jaxpr, used]

    def _walk(self, jaxpr: Jaxpr, used: Used) -> tuple[Used, list[tuple[JaxprEqn, Used]]]:
        needed = []
        live = _variables(jaxpr.outvars, used)
        for eqn in reversed(jaxpr.eqns):
            outs = tuple(v in live for v in eqn.outvars)
            if any(outs) or _has_effect(eqn):
                needed.append((eqn, outs))
                live |= _variables(eqn.invars, self._operands(eqn, outs))
        return tuple(v in live for v in jaxpr.invars), needed[::-1]

    def _operands(self, eqn: JaxprEqn, outs: Used) -> Used:
        name = eqn.primitive.name
        if name in self.blocked:
            return (False,) * len(eqn.invars)
        if name in CALLS:
            return self.inputs(called(eqn), outs)
        if name in _POINTWISE and len(eqn.invars) == len(outs):
            return outs
        if name == "scan":
            return self._scan_operands(eqn, outs)
        if name == "while":
            return self._while_operands(eqn, outs)
        if name == "cond":
            branches = [self.inputs(opened(b), outs) for b in eqn.params["branches"]]
            return (True, *map(any, zip(*branches, strict=True)))
        return (True,) * len(eqn.invars)

    def _scan_operands(self, eqn: JaxprEqn, outs: Used) -> Used:
        consts, carries = scan_split(eqn)
        if eqn.params["length"] == 0:  # the carries pass untouched
            scanned = len(eqn.invars) - consts - carries
            return (False,) * consts + outs[:carries] + (False,) * scanned
        return self.inputs(opened(eqn.params["jaxpr"]), self.used_in_scan(eqn, outs))

    def used_in_scan(self, eqn: JaxprEqn, outs: Used) -> Used:
        """Return the used outputs of one iteration of a scan: a carry also for the iterations after."""
        consts, carries = scan_split(eqn)
        while True:
            needed = self.inputs(opened(eqn.params["jaxpr"]), outs)[consts : consts + carries]
            grown = _any(outs[:carries], needed) + outs[carries:]
            if grown == outs:
                return outs
            outs = grown

    def used_in_while(self, eqn: JaxprEqn, outs: Used) -> Used:
        """Return the used outputs of one iteration of a while loop's body; the condition uses some."""
        of_cond, of_body = while_split(eqn)
        outs = _any(outs, self.inputs(opened(eqn.params["cond_jaxpr"]), (True,))[of_cond:])
        while True:
            grown = _any(outs, self.inputs(opened(eqn.params["body_jaxpr"]), outs)[of_body:])
            if grown == outs:
                return outs
            outs = grown

    def _while_operands(self, eqn: JaxprEqn, outs: Used) -> Used:
        of_cond, of_body = while_split(eqn)
        carried = self.used_in_while(eqn, outs)
        cond = self.inputs(opened(eqn.params["cond_jaxpr"]), (True,))
        body = self.inputs(opened(eqn.params["body_jaxpr"]), carried)
        return cond[:of_cond] + body[:of_body] + carried


def _variables(atoms: Any, used: Used) -> set[Any]:
    return {a for a, w in zip(atoms, used, strict=True) if w and not isinstance(a, Literal)}


@dataclass(frozen=True)
class Derivative:
    """A loss and its directional derivative, traced together.

    Attributes:
      jaxpr: inputs: the differentiated leaves of the parameters, one tangent for each of them, then
        everything else; outputs: the tangent of the loss, the loss, the auxiliary outputs.
      names: the names of the differentiated leaves, in the order of the inputs.
    """

    jaxpr: Jaxpr
    names: tuple[str, ...]


def differentiate(
    loss_fn: Callable[..., Any], params: Any, args: tuple[Any, ...], has_aux: bool
) -> Derivative:
    """Trace `loss_fn(params, *args)` and its tangent, on arrays or `jax.ShapeDtypeStruct`s.

    Forward mode, because it keeps the program's shape: each dot product of the loss appears once,
    beside one for each tangent of an operand, rematerialised or not; and a tangent that is zero
    for a reason of structure (a stopped gradient, an integer in between) never appears. Nothing is
    computed. Integer and boolean leaves of `params` are not differentiated.

    Raises:
      UserError: the loss is not a floating-point scalar, or a leaf of `params` is not an array.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    leaves = [leaf for _, leaf in paths]
    inexact = [_is_inexact(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
    chosen = [leaf for leaf, yes in zip(leaves, inexact, strict=True) if yes]
    others = [leaf for leaf, yes in zip(leaves, inexact, strict=True) if not yes]

    def loss_of(chosen: list[Any], others: list[Any], args: tuple[Any, ...]) -> tuple[Any, Any]:
        parts = iter(chosen), iter(others)
        tree = jax.tree.unflatten(treedef, [next(parts[0 if yes else 1]) for yes in inexact])
        out = loss_fn(tree, *args)
        loss, aux = out if has_aux else (out, ())
        return _checked(loss), aux

    def values_and_tangent(chosen: Any, tangents: Any, others: Any, args: Any) -> tuple[Any, ...]:
        loss, tangent, aux = jax.jvp(
            lambda p: loss_of(p, others, args), (chosen,), (tangents,), has_aux=True
        )
        return tangent, loss, aux

    jaxpr = opened(jax.make_jaxpr(values_and_tangent)(chosen, chosen, others, args))
    return Derivative(jaxpr, tuple(n for n, yes in zip(names, inexact, strict=True) if yes))


def _is_inexact(name: str, leaf: Any) -> bool:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise UserError(
            f"Parameter '{name}' is {type(leaf).__name__}, not an array or a ShapeDtypeStruct. "
            "Pass arrays as parameters and close over the rest."
        )
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _checked(loss: Any) -> jax.Array:
    if not hasattr(loss, "dtype"):
        raise UserError(
            f"The loss is {type(loss).__name__}, not a scalar array. Return a scalar, "
            "or with has_aux=True the pair (scalar, auxiliary outputs)."
        )
    if loss.shape != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise UserError(
            f"The loss has shape {loss.shape} and type {loss.dtype}. "
            "Return a floating-point scalar, for instance the mean over the batch."
        )
    return loss
