"""Compiles attention and grouped products, forward and backward, for four TPUs; writes how often each calls a kernel.

Run as a process of its own, since it loads the TPU's compiler.
"""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from compiled import text_of
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmjax.core.sharding import MeshConfig, make_mesh
from mmjax.nn.attention_kernels import attend
from mmjax.nn.grouped_matmul import grouped
from mmjax.nn.masks import Causal, Pairs, Same
from mmjax.plan.topology import Topology, describe

LENGTH, ROWS = 2048, 4096


def main() -> None:
    mesh = make_mesh(MeshConfig(data=2, tensor=2), describe(Topology("v5e", (2, 2))))

    def shape(spec: P, dtype, *sizes):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    def text(function, *arguments, argnums=(0, 1)):
        with jax.set_mesh(mesh):
            gradient = jax.jit(jax.grad(function, argnums=argnums))
            return text_of(gradient.lower(*arguments), mesh)

    q = shape(P("data", None, "tensor"), jnp.bfloat16, 4, LENGTH, 4, 64)
    valid = shape(P("data"), jnp.bool_, 4, LENGTH)
    of = {"position": np.arange(LENGTH)[None], "span": (np.arange(LENGTH) // 100)[None]}

    def attention(kernel):
        mask = Causal() | Same("span", beside=0)

        def total(q, k, v, valid):
            return attend(q, k, v, Pairs(mask, of, of, valid), kernel).astype(jnp.float32).sum()

        return text(total, q, q, q, valid, argnums=(0, 1, 2))

    def experts(kernel):
        def total(x, w, sizes):
            def local(x, w, sizes):
                return grouped(x, w, sizes[0], kernel)

            specs = (P("data"), P(), P("data"))
            mapped = jax.shard_map(local, in_specs=specs, out_specs=P("data"), check_vma=False)
            return jnp.square(mapped(x, w, sizes).astype(jnp.float32)).sum()

        x, w = shape(P("data"), jnp.bfloat16, ROWS, 256), shape(P(), jnp.bfloat16, 8, 256, 512)
        return text(total, x, w, shape(P("data"), jnp.int32, 2, 8))

    texts = {
        "splash": attention("auto"),
        "chunked": attention("chunked"),
        "megablox": experts("auto"),
    }
    found = {
        name: {"kernels": text.count("tpu_custom_call"), "gathers": text.count("all-gather(")}
        for name, text in texts.items()
    }
    json.dump(found, open(sys.argv[1], "w"))  # noqa: SIM115


if __name__ == "__main__":
    main()
