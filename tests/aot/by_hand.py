"""Compiles small programs whose costs are known by hand; writes their HLO as JSON.

Run as a process of its own, since it loads the TPU's compiler.
"""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from compiled import text_of
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmjax.plan.topology import Topology, describe

N, LAYERS = 512, 5


def mesh_of(slices: int) -> Mesh:
    """Return two by four devices: as two slices, or one."""
    devices = describe(Topology("v5e", (2, 2) if slices == 2 else (2, 4), slices))
    return Mesh(
        np.asarray(devices).reshape(2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2
    )


def compiled(function, mesh, out, *specs) -> str:
    shapes = [
        jax.ShapeDtypeStruct((N, N), jnp.float32, sharding=NamedSharding(mesh, s)) for s in specs
    ]
    jitted = jax.jit(function, out_shardings=NamedSharding(mesh, out))
    return text_of(jitted.lower(*shapes), mesh)


def scanned(x, w):
    return jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, length=LAYERS)[0]


def main() -> None:
    mesh, slices = mesh_of(1), mesh_of(2)
    texts = {
        "scan": compiled(scanned, mesh, P(), P(), P()),
        "contracted": compiled(jnp.matmul, mesh, P(), P(None, "tensor"), P("tensor", None)),
        "gathered": compiled(lambda x: x * 2, mesh, P(), P("data", None)),
        "slices": compiled(jnp.matmul, slices, P(), P(None, "data"), P("data", None)),
    }
    json.dump(texts, open(sys.argv[1], "w"))  # noqa: SIM115


if __name__ == "__main__":
    main()
