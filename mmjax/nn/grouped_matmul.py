"""Grouped products: rows sorted by group, each multiplied by its group's matrix (experts without dropped tokens).

`ragged` is XLA's ragged product, on every platform; `megablox` a Pallas kernel for TPUs; `auto` takes the kernel where
it runs. What it cannot do falls to `ragged`, which is logged once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox import gmm
from jax.sharding import AxisType

from mmjax.core.errors import UserError, nearest
from mmjax.nn.attention_kernels import platform, say_once
from mmjax.nn.kernels import LANES

KERNELS = ("ragged", "megablox")


def grouped(
    x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, kernel: str = "auto"
) -> jax.Array:
    """Return `y[n] = x[n] w[e]` for the e whose rows hold n: `[N, F]`; zero for rows beyond all groups.

    Args:
      x_ND: rows in the order of their groups.
      w_EDF: a matrix per group.
      sizes_E: rows of each group, int32; they may sum to less than N.
      kernel: `ragged`, `megablox` or `auto`.
    """
    if kernel not in ("auto", *KERNELS):
        raise UserError(
            f"Unknown kernel '{kernel}' of a grouped matrix product.{nearest(kernel, ['auto', *KERNELS])}"
        )
    on = platform()
    chosen = ("megablox" if on == "tpu" else "ragged") if kernel == "auto" else kernel
    if chosen == "ragged":
        return _ragged(x_ND, w_EDF, sizes_E)
    why = _refuse_megablox(on, x_ND, w_EDF)
    if why:
        say_once(f"grouped kernel 'megablox' gives way to 'ragged': {why}.")
        return _ragged(x_ND, w_EDF, sizes_E)
    return megablox(x_ND, w_EDF, sizes_E)


def _ragged(x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    wide = jnp.promote_types(x_ND.dtype, jnp.float32)
    y = jax.lax.ragged_dot(x_ND, w_EDF, sizes_E, preferred_element_type=wide)
    return y.astype(x_ND.dtype)


def _refuse_megablox(on: str, x_ND: jax.Array, w_EDF: jax.Array) -> str:
    if on != "tpu":
        return f"it runs on TPUs, and this is compiled for {on}"
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1 and set(mesh.axis_types) != {AxisType.Manual}:
        return "the mesh has several devices, and it is not called inside jax.shard_map"
    if x_ND.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it does not take {x_ND.dtype}"
    if any(size % LANES for size in w_EDF.shape[1:]):
        return f"it takes matrices whose sides divide by {LANES}, not {list(w_EDF.shape[1:])}"
    return ""


def megablox(
    x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, interpret: bool = False
) -> jax.Array:
    """Compute `grouped` by JAX's megablox kernel.

    Args:
      interpret: run it on any platform, slowly, to test its numerics.
    """
    rows = x_ND.shape[0]
    # Rows beyond all groups are left as they were in memory: they get a group of their own, made zero after.
    x_ND = jnp.pad(x_ND, [(0, -rows % LANES), (0, 0)])
    unassigned = x_ND.shape[0] - sizes_E.sum(dtype=jnp.int32)
    sizes = jnp.append(sizes_E.astype(jnp.int32), unassigned)
    w = jnp.concatenate([w_EDF, w_EDF[:1]])
    y: jax.Array = gmm(x_ND, w, sizes, jnp.float32, (LANES, LANES, LANES), interpret=interpret)
    is_in = jnp.arange(y.shape[0]) < sizes_E.sum()
    return jnp.where(is_in[:, None], y, 0)[:rows].astype(x_ND.dtype)
