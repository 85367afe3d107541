"""The parameters that the gradient of a loss reaches, read from the trace; no mask is written by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mmjax.analysis.jaxprs import Derivative, Liveness, differentiate

# Linear maps whose transpose is a user's function: which of their operands get a gradient
# is known only to that function.
_CUSTOM = frozenset({"custom_lin", "linear_call"})


@dataclass(frozen=True)
class Reach:
    """The parameters that the gradient of a loss reaches.

    Attributes:
      names: the reached parameters.
      conservative: those of `names` that are reached through custom derivatives alone
        (`jax.custom_vjp`): the rule is not looked into, and may well return zero for them.
    """

    names: frozenset[str]
    conservative: frozenset[str]


def reach(
    loss_fn: Callable[..., Any], params: Mapping[str, Any], *args: Any, has_aux: bool = False
) -> Reach:
    """Find the parameters that the gradient of a loss reaches; nothing is computed.

    The loss is differentiated at abstract values, and dead-code elimination runs backwards from its
    tangent: a parameter is reached if its own tangent survives. So the answer follows scans,
    rematerialisation, `stop_gradient`, `jax.custom_jvp` rules, integer paths (argmax) and choices
    made in Python, and it errs on one side only: a parameter outside it has a gradient that is zero
    whatever the values. Reached are, although their gradient may be zero for some values or all:
    a parameter in any branch of a `lax.cond`, one multiplied by 0.0 or subtracted from itself, one
    behind a mask or a select, and the whole of a stacked parameter of which only a slice is used.

    Args:
      loss_fn: `loss_fn(params, *args)`, a scalar, or (scalar, auxiliary outputs) with `has_aux`.
        Gradients of the auxiliary outputs do not count.
      params: name to array or `jax.ShapeDtypeStruct`; integer ones are never reached.
      *args: arrays, `jax.ShapeDtypeStruct`s, typed PRNG keys, and trees of them. All are traced:
        close over what must stay a Python value.
      has_aux: whether the loss comes with auxiliary outputs.

    Raises:
      UserError: the loss is not a floating-point scalar, or a parameter is not an array.
    """
    derivative = differentiate(loss_fn, dict(params), args, has_aux)
    surely = _survivors(derivative, Liveness(blocked=_CUSTOM))
    names = _survivors(derivative, Liveness())
    return Reach(names=names, conservative=names - surely)


def reached(
    loss_fn: Callable[..., Any], params: Mapping[str, Any], *args: Any, has_aux: bool = False
) -> frozenset[str]:
    """Return the names in `reach(loss_fn, params, *args)`, the conservative ones among them."""
    return reach(loss_fn, params, *args, has_aux=has_aux).names


def _survivors(derivative: Derivative, liveness: Liveness) -> frozenset[str]:
    jaxpr, count = derivative.jaxpr, len(derivative.names)
    used = (True,) + (False,) * (len(jaxpr.outvars) - 1)
    tangents = liveness.inputs(jaxpr, used)[count : 2 * count]
    return frozenset(n for n, live in zip(derivative.names, tangents, strict=True) if live)
