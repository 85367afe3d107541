"""Layers of `zorro-pytorch` and `mambapy`; the peers of `ports.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

BLOCK, NORM = "trunk/groups/0/blocks/0", "trunk/norm"
Arrays = Mapping[str, np.ndarray]


class Layers(nn.Module):
    """Residual layers one after another, and a norm."""

    def __init__(self, case: Any, make: Callable[[], nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList([make() for _ in range(case.layers)])
        self.norm = nn.LayerNorm(case.width, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class ZorroLayer(nn.Module):
    """A layer, called as the port's `Zorro.forward` calls its own."""

    def __init__(self, case: Any, mask: torch.Tensor):
        from zorro_pytorch.zorro_pytorch import Attention, FeedForward

        super().__init__()
        heads = case.block["num_heads"]
        self.attention = Attention(case.width, case.width // heads, heads)
        self.mlp = FeedForward(case.width)
        self.mask = mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(x, attn_mask=self.mask) + x
        x = self.mlp(x) + x
        return x


class MambaLayer(nn.Module):
    """The port's block behind a norm by root mean squares."""

    def __init__(self, case: Any):
        from mambapy.mamba import MambaBlock, MambaConfig

        super().__init__()
        self.norm = nn.RMSNorm(case.width, eps=1e-6)
        self.mixer = MambaBlock(MambaConfig(d_model=case.width, n_layers=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.mixer(self.norm(x)) + x
        return out


def _zorro(case: Any) -> nn.Module:
    kinds = torch.tensor([i for i, (_, count) in enumerate(case.layout) for _ in range(count)])
    fusion = [name for name, _ in case.layout].index("fusion")
    # As the port makes it: a kind sees itself, and fusion tokens see all.
    mask = (kinds[:, None] == kinds) | (kinds[:, None] == fusion)
    return Layers(case, partial(ZorroLayer, case, mask))


def _mamba(case: Any) -> nn.Module:
    return Layers(case, partial(MambaLayer, case))


def _by_layer(
    p: Arrays, case: Any, of_layer: Callable[[Callable[[str], np.ndarray]], Arrays]
) -> dict[str, np.ndarray]:
    result = {"norm.weight": p[f"{NORM}/scale"], "norm.bias": p[f"{NORM}/bias"]}
    for index in range(case.layers):
        each = of_layer(lambda name, index=index: p[f"{BLOCK}/{name}"][index])  # type: ignore[misc]
        result |= {f"layers.{index}.{name}": value for name, value in each.items()}
    return result


def _zorro_names(p: Arrays, case: Any) -> dict[str, np.ndarray]:
    width = case.width

    def of_layer(own: Callable[[str], np.ndarray]) -> Arrays:
        key, value = (own(f"attention/{n}").reshape(width, -1).T for n in ("key", "value"))
        return {
            "attention.norm.gamma": own("attention_norm/scale"),
            "attention.to_q.weight": own("attention/query").reshape(width, -1).T,
            "attention.to_kv.weight": np.concatenate([key, value]),
            "attention.to_out.weight": own("attention/out").reshape(-1, width).T,
            "mlp.0.gamma": own("mlp_norm/scale"),
            "mlp.1.weight": np.concatenate([own("mlp/up/kernel").T, own("mlp/gate/kernel").T]),
            "mlp.3.weight": own("mlp/down/kernel").T,
        }

    return _by_layer(p, case, of_layer)


def _mamba_names(p: Arrays, case: Any) -> dict[str, np.ndarray]:
    def of_layer(own: Callable[[str], np.ndarray]) -> Arrays:
        return {
            "norm.weight": own("norm/scale"),
            "mixer.in_proj.weight": np.concatenate([own("inner/kernel").T, own("gate/kernel").T]),
            "mixer.conv1d.weight": own("conv/kernel").T[:, None],
            "mixer.conv1d.bias": own("conv/bias"),
            "mixer.x_proj.weight": own("x/kernel").T,
            "mixer.dt_proj.weight": own("dt/kernel").T,
            "mixer.dt_proj.bias": own("dt/bias"),
            "mixer.A_log": own("a_log"),
            "mixer.D": own("skip"),
            "mixer.out_proj.weight": own("out/kernel").T,
        }

    return _by_layer(p, case, of_layer)


def _port(
    make: Callable[[Any], nn.Module], case: Any, given: Arrays, x: np.ndarray, weights: np.ndarray
) -> Any:
    """Return a call that gives the loss and gradients of a port with the parameters `given`."""
    model = make(case)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == given.keys(), parameters.keys() ^ given.keys()
    with torch.no_grad():
        for name, value in given.items():
            parameters[name].copy_(torch.from_numpy(np.array(value)))
    tokens, factors = torch.from_numpy(x), torch.from_numpy(weights)

    def run() -> tuple[float, Arrays]:
        model.zero_grad(set_to_none=True)
        loss = (model(tokens) * factors).mean()
        loss.backward()
        return float(loss.detach()), {name: each.grad.numpy() for name, each in parameters.items()}

    return run


RENAMED = {"zorro": _zorro_names, "mamba": _mamba_names}
MADE = {"zorro": partial(_port, _zorro), "mamba": partial(_port, _mamba)}
