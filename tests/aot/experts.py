"""Compiles a layer of experts, forward and backward, for eight TPUs; writes what each costs and moves.

Run as a process of its own, since it loads the TPU's compiler.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
from compiled import text_of
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmjax.core import config as configs
from mmjax.core.parameters import Declaration
from mmjax.core.sharding import MeshConfig, make_mesh, named
from mmjax.nn.experts import Experts, ExpertsConfig
from mmjax.nn.stream import Stream
from mmjax.plan.cost import cost
from mmjax.plan.groups import Layout
from mmjax.plan.hlo import parse
from mmjax.plan.topology import Topology, describe

ROWS, LENGTH, WIDTH, HIDDEN, GROUP = 64, 256, 256, 1024, 1024
ROUTERS: dict[str, dict[str, Any]] = {
    "expert_choice": {"capacity": 1.0},
    "token_choice": {"top_k": 1, "capacity": 1.0},
    "two_choices": {"name": "token_choice", "top_k": 2, "capacity": 0.5, "batch_priority": True},
    "soft": {"slots_per_expert": 0},  # as many slots in all as the others have
}


def wanted(router: str, count: int) -> tuple[int, int]:
    """Return FLOPs of the slots' experts, and of the router's own products, forward, of all devices."""
    tokens = ROWS * LENGTH
    products = 2 * tokens * WIDTH * count
    if (
        router == "soft"
    ):  # logits, dispatch and combination, each tokens by slots of a group by width
        products = 3 * 2 * tokens * GROUP * WIDTH
    return 2 * 2 * tokens * WIDTH * HIDDEN, products


def main() -> None:
    devices = describe(Topology("v5e", (2, 4)))
    spread = make_mesh(MeshConfig(data=2, expert=4), devices)
    whole = make_mesh(MeshConfig(data=8), devices)

    def compiled(router: str, count: int, backward: bool, mesh: Mesh = spread) -> dict[str, Any]:
        layout = Layout({axis: int(n) for axis, n in mesh.shape.items()}, [0] * 8)
        rule = {"name": router, **ROUTERS[router]}
        if router == "soft":
            rule["slots_per_expert"] = GROUP // count
        config = {"count": count, "router": rule, "group_size": GROUP}
        declaration = Declaration(
            Experts(WIDTH, HIDDEN, configs.build(ExpertsConfig, config, "experts"))
        )
        parameters = {
            n: jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=named(s.axes, s.shape, mesh))
            for n, s in declaration.specs.items()
        }
        rows = NamedSharding(mesh, P(("data", "fsdp", "expert")))
        x = jax.ShapeDtypeStruct((ROWS, LENGTH, WIDTH), jnp.bfloat16, sharding=rows)

        def of(p: Any, x: Any) -> Any:
            model = declaration.merge(p, jnp.bfloat16)
            return model(Stream(x, layout=(("text", LENGTH),)), None)[0]

        def total(p: Any, x: Any) -> Any:
            return jnp.square(of(p, x).astype(jnp.float32)).mean()

        function = jax.jit(jax.grad(total, argnums=(0, 1)) if backward else of)
        with jax.set_mesh(mesh):
            lowered = function.lower(parameters, x)
            text = text_of(lowered, mesh)
        found = cost(parse(text), layout, 1.0, 1.0)
        wires: dict[str, float] = {}
        for (_, kind, axes), size in found.wires.items():
            wires[f"{kind} {axes}"] = wires.get(f"{kind} {axes}", 0) + size
        experts, products = wanted(router, count)
        return {
            "flops": found.flops, "experts": experts / 8, "products": products / 8, "wires": wires,
        }  # fmt: skip

    made = {
        f"{router} {count} {'backward' if backward else 'forward'}": compiled(
            router, count, backward
        )
        for router in ROUTERS
        for count in (4, 16)
        for backward in (False, True)
        if not backward or count == 4
    }
    made["expert_choice 4 whole"] = compiled("expert_choice", 4, False, whole)
    json.dump(made, open(sys.argv[1], "w"))  # noqa: SIM115


if __name__ == "__main__":
    main()
