"""Five small runs that differ in what a checkpoint of them holds: overrides of `tests/configs/toy.py`."""

from __future__ import annotations

_EXPERTS = {
    "name": "transformer",
    "num_heads": 2,
    "mlp_dim": 16,
    "experts": {
        "count": 4,
        "router": {"name": "token_choice", "top_k": 2, "noise": 1.0},
        "group_size": 8,
        "losses": {"importance": 0.01, "load": 0.01},
    },
}
# Wide enough that arrays are stored by themselves: what has less than 1 kB lies in the nodes of the index.
_WIDE = "model.width=32"
RUNS: dict[str, tuple[str, ...]] = {
    "toy": (_WIDE,),
    "experts": (
        _WIDE,
        f"model.layers=[{{'repeat': 2, 'blocks': [{{'name': 'toy'}}, {_EXPERTS!r}]}}]",
        "optimizer.decay=cosine",
    ),
    "buffers": (_WIDE, "optimizer.accumulate=2", "optimizer.ema=0.9"),
    "stats_and_teacher": (
        _WIDE,
        "model.layers=[{'repeat': 2, 'blocks': [{'name': 'toy_buffers'}]}]",
        "model.teachers={'old': {'of': ['stems/.*', 'trunk/.*', 'heads/one/.*'], 'decay': 0.9}}",
        "tasks.one.objective={'name': 'toy_teacher'}",
        "optimizer.ema=0.9",
    ),
    "own_moments": (_WIDE, "optimizer.update_scope=own_moments"),
}
