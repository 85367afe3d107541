"""Model FLOPs: the dot products and convolutions of a function, counted in its jaxpr.

A dot product of an (M, K) by a (K, N) matrix is 2*M*N*K floating-point operations, a multiplication
and an addition for each pair; a complex pair is four times that. A convolution
counts the pairs that meet, not those with padding or with the holes of a dilation, so that a convolution
and its two transposes cost the same. Everything else (element-wise work, reductions, factorisations,
Fourier transforms) is not counted, as is the custom when a share of a chip's peak is stated. Attention
counts as XLA does it, all pairs of tokens, whatever kernel the platform has for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxprs_in_params
from jax.sharding import PartitionSpec

from mmjax.analysis.jaxprs import (
    CALLS,
    Liveness,
    Used,
    called,
    differentiate,
    opened,
    while_split,
)
from mmjax.nn.attention_kernels import xla_alone

# Kernels whose inside a jaxpr does not show; names with these beginnings.
_OPAQUE = ("pallas_call", "ffi_call", "dot_product_attention", "scaled_matmul", "pure_callback")

# The shard_map equations around an equation, outermost first.
Within = tuple[JaxprEqn, ...]


@dataclass(frozen=True)
class Count:
    """Floating-point operations, and what to know about the number.

    Attributes:
      flops: operations of dot products and convolutions.
      uncounted: what may hold more of them: loops of unknown length (their body counts once) and
        kernels that cannot be looked into (they count what they state of themselves, else nothing).
      as_written: what may repeat work that model FLOPs exclude: the backward rules of
        `jax.custom_vjp` functions and gradients that the function itself takes of rematerialised
        functions. They count as they are written.
    """

    flops: int
    uncounted: tuple[str, ...] = ()
    as_written: tuple[str, ...] = ()


def model_flops(fun: Callable[..., Any], *args: Any) -> int:
    """Return floating-point operations of the dot products and convolutions of `fun(*args)`.

    `fun` is traced on arrays or `jax.ShapeDtypeStruct`s and nothing is computed. Work that no
    output needs does not count. Calls count their inside; a scan counts its body times its length;
    a while loop likewise if it compares a counter that starts at a constant, grows by a constant,
    and ends at a constant (as `fori_loop` does), and once otherwise; a conditional counts its
    largest branch; a `shard_map` counts its body times the shards that its specs make. A gradient
    taken inside `fun` counts with whatever it recomputes: see `train_flops`.
    """
    return count(fun, *args).flops


def count(fun: Callable[..., Any], *args: Any) -> Count:
    """Return the same as `model_flops`, with what could not be counted."""
    with xla_alone():
        return _count(opened(jax.make_jaxpr(fun)(*args)), used=None)


def train_flops(loss_fn: Callable[..., Any], params: Any, *args: Any, has_aux: bool = False) -> int:
    """Return floating-point operations of one value-and-gradient of `loss_fn(params, *args)`.

    The gradient is with respect to the floating-point leaves of `params`. Rematerialised work is
    not counted, and neither is the backward pass into what is not differentiated (arguments, frozen
    parts, stopped gradients).

    Counted in the trace of the loss and its *tangent*. A bilinear y = a . b has the tangent
    da . b + a . db, the first term only if `a` depends on the parameters, the second only if `b`
    does; the backward pass holds the transpose of each term, with the same three dimensions and so
    at the same cost. Unlike the backward pass, the tangent recomputes nothing under
    `jax.checkpoint`, so no policy changes the count. Functions with a `jax.custom_vjp` have no
    tangent; their backward rule is traced and counts as it is written.

    Args:
      loss_fn: returns a scalar, or (scalar, auxiliary outputs) with `has_aux`.
      params: a tree of arrays or `jax.ShapeDtypeStruct`s.
      *args: trees of arrays, `jax.ShapeDtypeStruct`s or PRNG keys; close over Python values.
      has_aux: whether the loss comes with auxiliary outputs. Work for these counts.

    Raises:
      UserError: the loss is not a floating-point scalar, or a parameter is not an array.
    """
    return count_train(loss_fn, params, *args, has_aux=has_aux).flops


def count_train(
    loss_fn: Callable[..., Any], params: Any, *args: Any, has_aux: bool = False
) -> Count:
    """Return the same as `train_flops`, with what could not be counted."""
    with xla_alone():
        return _count(differentiate(loss_fn, params, args, has_aux).jaxpr, used=None)


def _count(jaxpr: Jaxpr, used: Used | None) -> Count:
    counter = _Counter()
    flops = counter.jaxpr(jaxpr, used or (True,) * len(jaxpr.outvars), ())
    return Count(flops, tuple(sorted(counter.uncounted)), tuple(sorted(counter.as_written)))


class _Counter:
    """Walks the needed equations of a jaxpr and of the jaxprs inside it, and takes notes."""

    def __init__(self) -> None:
        self.liveness = Liveness()
        self.uncounted: set[str] = set()
        self.as_written: set[str] = set()

    def jaxpr(self, jaxpr: Jaxpr, used: Used, within: Within) -> int:
        """Return the operations that the used outputs need; `within` are the `shard_map`s around it."""
        needed = self.liveness.equations(jaxpr, used)
        return sum(self.equation(eqn, outs, within) for eqn, outs in needed)

    def equation(self, eqn: JaxprEqn, outs: Used, within: Within) -> int:
        name = eqn.primitive.name
        if name in _PRODUCTS:
            return _PRODUCTS[name](eqn) * (4 if _is_complex(eqn) else 1)
        if name == "shard_map":
            return self._shard_map(eqn, outs, within)
        if name in CALLS:
            if eqn.params.get("differentiated"):
                self.as_written.add("gradient of a rematerialised function inside the function")
            return self.jaxpr(called(eqn), outs, within)
        if name == "scan":
            body = opened(eqn.params["jaxpr"])
            once = self.jaxpr(body, self.liveness.used_in_scan(eqn, outs), within)
            return eqn.params["length"] * once
        if name == "while":
            return self._while(eqn, outs, within)
        if name == "cond":
            return max(self.jaxpr(opened(b), outs, within) for b in eqn.params["branches"])
        if name == "custom_lin":
            return self._custom_backward(eqn, within)
        if name.startswith(_OPAQUE):
            return self._opaque(eqn)
        return self._unknown(eqn, within)

    def _shard_map(self, eqn: JaxprEqn, outs: Used, within: Within) -> int:
        """Count each shard once: what mesh axes outside the specs repeat is the same work."""
        sizes = eqn.params["mesh"].shape
        named = _named_axes([*eqn.params["in_specs"], *eqn.params["out_specs"]])
        body = self.jaxpr(called(eqn), outs, (*within, eqn))
        return body * math.prod(sizes[axis] for axis in named)

    def _while(self, eqn: JaxprEqn, outs: Used, within: Within) -> int:
        trips = _trip_count(eqn)
        targets = self.liveness.used_in_while(eqn, outs)
        body = self.jaxpr(opened(eqn.params["body_jaxpr"]), targets, within)
        cond = self.jaxpr(opened(eqn.params["cond_jaxpr"]), (True,), within)
        if trips is None:
            if body or cond:
                self.uncounted.add("while loop of unknown length: counted once")
            return body + cond
        return trips * body + (trips + 1) * cond

    def _custom_backward(self, eqn: JaxprEqn, within: Within) -> int:
        """Return the backward rule of a `jax.custom_vjp`, by transposing the equation for its tangent."""
        saved = eqn.params["num_res"]
        name = getattr(eqn.params["bwd"], "__name__", "unnamed")
        residuals, tangents = eqn.invars[:saved], eqn.invars[saved:]
        results = [v for v in eqn.outvars if jnp.issubdtype(_aval(v).dtype, jnp.inexact)]

        def backward(residuals: list[Any], tangents: list[Any], cotangents: list[Any]) -> Any:
            def tangent(*tangents: Any) -> Any:
                out = eqn.primitive.bind(*residuals, *tangents, **eqn.params)
                return [o for v, o in zip(eqn.outvars, out, strict=True) if v in results]

            return jax.linear_transpose(tangent, *tangents)(cotangents)

        try:
            traced = _trace_within(within, backward, residuals, tangents, results)
        except (TypeError, ValueError, NameError):
            if not within:
                raise
            self.uncounted.add(f"backward rule {name} inside a shard_map")
            return 0
        flops = self.jaxpr(traced, (True,) * len(traced.outvars), within)
        if flops:
            self.as_written.add(f"backward rule {name}")
        return flops

    def _opaque(self, eqn: JaxprEqn) -> int:
        stated = eqn.params.get("cost_estimate")
        name = eqn.params.get("name") or eqn.params.get("target_name") or ""
        if stated is None:
            self.uncounted.add(f"{eqn.primitive.name} {name}".strip())
            return 0
        return int(stated.flops)

    def _unknown(self, eqn: JaxprEqn, within: Within) -> int:
        """Count what is inside once; most have nothing inside, or a scalar reduction."""
        inner = [opened(jaxpr) for jaxpr in jaxprs_in_params(eqn.params)]
        flops = sum(self.jaxpr(j, (True,) * len(j.outvars), within) for j in inner)
        if flops:
            self.uncounted.add(f"{eqn.primitive.name}: counted once")
        return flops


def _trace_within(within: Within, fun: Callable[..., Any], *groups: list[Any]) -> Jaxpr:
    """Return the jaxpr of `fun` on groups of values like the variables given, where these stand.

    Inside a `shard_map` the axes of its mesh have names, and values have types that state over which
    of them they vary. So trace inside a like one, whose operands carry a leading axis, split over
    the axes that each varies over.
    """
    flat, treedef = jax.tree.flatten(groups)
    if not within:
        shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in flat]
        return opened(jax.make_jaxpr(fun)(*jax.tree.unflatten(treedef, shapes)))
    params, traced = within[-1].params, []

    def inside(values: list[Any]) -> None:
        values = [value[0] for value in values]
        traced.append(jax.make_jaxpr(fun)(*jax.tree.unflatten(treedef, values)))

    sizes = params["mesh"].shape
    varying = [_varying(v.aval) for v in flat]
    shapes = [
        jax.ShapeDtypeStruct((math.prod(sizes[a] for a in axes), *v.aval.shape), v.aval.dtype)
        for v, axes in zip(flat, varying, strict=True)
    ]
    mapped = jax.shard_map(
        inside,
        mesh=params["mesh"],
        in_specs=([PartitionSpec(axes) for axes in varying],),
        out_specs=None,
        axis_names=params["newly_manual_axes"],
        check_vma=params["check_vma"],
    )
    jax.eval_shape(mapped, shapes)
    return opened(traced[0])


def _varying(aval: Any) -> tuple[Any, ...]:
    """Return the mesh axes over which a value inside a `shard_map` varies, as far as its type states."""
    kind = getattr(aval, "manual_axis_type", None)
    return tuple(sorted(kind.varying)) if kind else ()


def _aval(atom: Any) -> Any:
    """Return the abstract value of a variable or literal; its declared type promises no shape."""
    return atom.aval


def _is_complex(eqn: JaxprEqn) -> bool:
    return jnp.issubdtype(_aval(eqn.outvars[0]).dtype, jnp.complexfloating)


def _named_axes(specs: Sequence[Any]) -> set[Any]:
    """Return the mesh axes that partition specs name."""
    names: set[Any] = set()
    for entry in (entry for spec in specs for entry in spec):
        names |= set(entry) if isinstance(entry, tuple) else {entry}
    return {name for name in names if isinstance(name, str)}


def _trip_count(eqn: JaxprEqn) -> int | None:
    """Return the number of iterations of a while loop whose condition is `counter < end` with everything constant."""
    cond = opened(eqn.params["cond_jaxpr"])
    of_cond, of_body = while_split(eqn)
    if len(cond.eqns) != 1 or cond.eqns[0].primitive.name not in ("lt", "le"):
        return None
    counter, end = cond.eqns[0].invars
    if counter not in cond.invars[of_cond:]:
        return None
    place = cond.invars.index(counter)
    first = _constant(eqn.invars[place + of_body])
    step = _step(opened(eqn.params["body_jaxpr"]), of_body, place - of_cond)
    last = _bound(eqn, cond, end)
    if first is None or last is None or step is None or step <= 0:
        return None
    last += cond.eqns[0].primitive.name == "le"
    return max(0, -((first - last) // step))


def _bound(eqn: JaxprEqn, cond: Jaxpr, end: Any) -> int | None:
    """Return the constant a loop counts to: a literal, or an operand that the body does not change."""
    if isinstance(end, Literal):
        return _constant(end)
    if end not in cond.invars:
        return None
    of_cond, of_body = while_split(eqn)
    place = cond.invars.index(end)
    if place < of_cond:
        return _constant(eqn.invars[place])
    body, carry = opened(eqn.params["body_jaxpr"]), place - of_cond
    if body.outvars[carry] is not body.invars[of_body + carry]:
        return None
    return _constant(eqn.invars[place + of_body])


def _step(body: Jaxpr, of_body: int, carry: int) -> int | None:
    """Return the constant that the body adds to a carry."""
    updates = [eqn for eqn in body.eqns if body.outvars[carry] in eqn.outvars]
    if not updates or updates[0].primitive.name != "add":
        return None
    operands = updates[0].invars
    amounts = [_constant(v) for v in operands if v is not body.invars[of_body + carry]]
    return amounts[0] if len(amounts) == 1 else None


def _constant(atom: Any) -> int | None:
    if not isinstance(atom, Literal) or not jnp.issubdtype(_aval(atom).dtype, jnp.integer):
        return None
    return int(atom.val)


def _shapes(eqn: JaxprEqn) -> tuple[Sequence[int], Sequence[int]]:
    return _aval(eqn.invars[0]).shape, _aval(eqn.invars[1]).shape


def _dot_general(eqn: JaxprEqn) -> int:
    (_, contracted), (_, batched) = eqn.params["dimension_numbers"]
    lhs, rhs = _shapes(eqn)
    shared = {*contracted, *batched}
    return 2 * math.prod(lhs) * math.prod(n for i, n in enumerate(rhs) if i not in shared)


def _ragged_dot(eqn: JaxprEqn) -> int:
    """Count one product for every row, with the matrix of one group: rows outside all groups count too."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batched) = numbers.dot_dimension_numbers
    lhs, rhs = _shapes(eqn)
    shared = {*contracted, *batched, *numbers.rhs_group_dimensions}
    return 2 * math.prod(lhs) * math.prod(n for i, n in enumerate(rhs) if i not in shared)


def _conv(eqn: JaxprEqn) -> int:
    """Return 2 * batch * features out * features in of one group * pairs that meet in each dimension."""
    p, out = eqn.params, _aval(eqn.outvars[0]).shape
    lhs, rhs = _shapes(eqn)
    numbers = p["dimension_numbers"]
    pairs = 1
    for d, (low, _) in enumerate(p["padding"]):
        pairs *= meeting(
            outputs=out[numbers.out_spec[2 + d]],
            taps=rhs[numbers.rhs_spec[2 + d]],
            size=lhs[numbers.lhs_spec[2 + d]],
            stride=p["window_strides"][d],
            low=low,
            holes=p["lhs_dilation"][d],
            spread=p["rhs_dilation"][d],
        )
    batch, features = (out[i] for i in numbers.out_spec[:2])
    return 2 * batch * features * rhs[numbers.rhs_spec[1]] * pairs


def meeting(
    *, outputs: int, taps: int, size: int, stride: int, low: int, holes: int, spread: int
) -> int:
    """Return the number of pairs (output o, tap k) of one dimension that meet an input element.

    They meet at position o * stride + k * spread - low, if it lies in 0 .. (size - 1) * holes and is a
    multiple of `holes`. For each tap the second condition leaves the outputs of one remainder modulo
    holes / gcd(stride, holes), or none, and the first bounds them.
    """
    offset = np.arange(taps, dtype=np.int64) * spread - low
    common = math.gcd(stride, holes)
    period = holes // common
    remainder = -(offset // common) * pow(stride // common, -1, period) % period
    first = np.maximum(0, -(offset // stride))
    last = np.minimum(outputs - 1, ((size - 1) * holes - offset) // stride)
    counts = (last - remainder) // period - (first - 1 - remainder) // period
    return int(np.sum(np.maximum(0, counts)[offset % common == 0]))


_PRODUCTS: dict[str, Callable[[JaxprEqn], int]] = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
    "ragged_dot": _ragged_dot,
    "conv_general_dilated": _conv,
}
