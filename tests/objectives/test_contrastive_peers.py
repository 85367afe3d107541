"""CLIP and SigLIP in two towers against open_clip: features, loss and gradients of the same weights.

The fixtures are written by `tests/peers/write.py`; `versions` in them names the peer's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mmjax.core import config as configs
from mmjax.core.batch import Batch
from mmjax.core.parameters import from_canonical, to_canonical
from mmjax.modalities.base import Input
from mmjax.modalities.image import Image, ImageInput
from mmjax.modalities.text import Text, TextInput
from mmjax.model import ModelConfig, connect_towers, declare_model
from mmjax.nn.towers import Widths
from mmjax.objectives.contrastive import Contrastive

PEERS = Path(__file__).resolve().parent.parent / "peers"
HEADS, END = 2, 23
Arrays = dict[str, np.ndarray]


def tower(width: int, eps: float, mlp: str, **keys: Any) -> dict[str, Any]:
    block = {
        "name": "transformer", "num_heads": HEADS, "mlp_dim": 4 * width, "mlp": mlp, "bias": True,
        "attention_bias": True, "eps": eps,
    }  # fmt: skip
    return {"width": width, "layers": [{"repeat": 2, "blocks": [block]}], "norm_eps": eps, **keys}


SYSTEMS: dict[str, Any] = {
    "clip": (
        {"image": tower(16, 1e-5, "quick_gelu", first_norm=True), "text": tower(12, 1e-5, "quick_gelu", causal=True)},
        {"embed_dim": 8, "poolers": {"image": "class", "text": "last"}},
    ),
    "siglip": (
        {"image": tower(16, 1e-6, "gelu"), "text": tower(12, 1e-6, "gelu")},
        {
            "embed_dim": 16, "loss": "sigmoid", "poolers": {"image": "map", "text": "last"}, "map_heads": HEADS,
            "projections": {"image": "none", "text": "affine"},
        },
    ),
}  # fmt: skip


def norm(peer: Mapping[str, np.ndarray], at: str, to: str) -> Arrays:
    return {f"{to}/scale": peer[f"{at}.weight"], f"{to}/bias": peer[f"{at}.bias"]}


def dense(peer: Mapping[str, np.ndarray], at: str, to: str) -> Arrays:
    return {f"{to}/kernel": peer[f"{at}.weight"].T, f"{to}/bias": peer[f"{at}.bias"]}


def heads_in(weight: np.ndarray) -> np.ndarray:
    """Return `[D, D]` of torch as `[D, heads, size]`."""
    return weight.T.reshape(weight.shape[1], HEADS, -1)


def attention(kernels: Any, biases: Any, peer: Any, out: str, to: str) -> Arrays:
    result = {}
    for part, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True):
        result |= {f"{to}/{part}": heads_in(kernel), f"{to}/{part}_bias": bias}
    kernel = peer[f"{out}.weight"].T
    result[f"{to}/out"] = kernel.reshape(HEADS, -1, kernel.shape[1])
    return {**result, f"{to}/out_bias": peer[f"{out}.bias"]}


def layers(peer: Any, at: str, to: str, names: Mapping[str, str]) -> Arrays:
    """Return two blocks; `names` are the peer's of their parts."""
    result: Arrays = {}
    for i in range(2):
        a, t = f"{at}.{i}.", f"{to}/layers/{i:03d}"
        kernels = np.split(peer[f"{a}{names['kernel']}"], 3)
        biases = np.split(peer[f"{a}{names['bias']}"], 3)
        result |= attention(kernels, biases, peer, f"{a}{names['out']}", f"{t}/attention")
        result |= norm(peer, f"{a}{names['norm1']}", f"{t}/attention_norm")
        result |= norm(peer, f"{a}{names['norm2']}", f"{t}/mlp_norm")
        result |= dense(peer, f"{a}{names['up']}", f"{t}/mlp/up")
        result |= dense(peer, f"{a}{names['down']}", f"{t}/mlp/down")
    return result


OPEN_CLIP = {
    "kernel": "attn.in_proj_weight", "bias": "attn.in_proj_bias", "out": "attn.out_proj", "norm1": "ln_1",
    "norm2": "ln_2", "up": "mlp.c_fc", "down": "mlp.c_proj",
}  # fmt: skip
TIMM = {
    "kernel": "attn.qkv.weight", "bias": "attn.qkv.bias", "out": "attn.proj", "norm1": "norm1", "norm2": "norm2",
    "up": "mlp.fc1", "down": "mlp.fc2",
}  # fmt: skip


def patches(weight: np.ndarray) -> np.ndarray:
    """Return `[D, 3, p, p]` of a convolution as `[p p 3, D]`."""
    return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])


def text(peer: Any, at: str) -> Arrays:
    return {
        "stems/text/embedding": peer[f"{at}token_embedding.weight"],
        "stems/text/positions/table": peer[f"{at}positional_embedding"],
        **layers(peer, f"{at}transformer.resblocks", "text", OPEN_CLIP),
        **norm(peer, f"{at}ln_final", "text/norm"),
        "heads/pair/scale/log": peer["logit_scale"],
    }


def clip(peer: Any, is_gradient: bool) -> Arrays:
    """Return the gradient of a class token, which is a sum of two vectors there: that of either."""
    token, place = peer["visual.class_embedding"], peer["visual.positional_embedding"]
    return {
        **text(peer, ""),
        "stems/image/class_token": token if is_gradient else token + place[0],
        "stems/image/positions/table": place[1:],
        "stems/image/embed/kernel": patches(peer["visual.conv1.weight"]),
        **norm(peer, "visual.ln_pre", "image/first_norm"),
        **layers(peer, "visual.transformer.resblocks", "image", OPEN_CLIP),
        **norm(peer, "visual.ln_post", "image/norm"),
        "heads/pair/image/kernel": peer["visual.proj"],
        "heads/pair/text/kernel": peer["text_projection"],
    }


def siglip(peer: Any, is_gradient: bool) -> Arrays:
    del is_gradient
    at, pool = "visual.trunk.", "visual.trunk.attn_pool."
    kernels = [peer[f"{pool}q.weight"], *np.split(peer[f"{pool}kv.weight"], 2)]
    biases = [peer[f"{pool}q.bias"], *np.split(peer[f"{pool}kv.bias"], 2)]
    to = "heads/pair/image_pooler"
    return {
        **text(peer, "text."),
        "stems/image/positions/table": peer[f"{at}pos_embed"][0],
        "stems/image/embed/kernel": patches(peer[f"{at}patch_embed.proj.weight"]),
        "stems/image/embed/bias": peer[f"{at}patch_embed.proj.bias"],
        **layers(peer, f"{at}blocks", "image", TIMM),
        **norm(peer, f"{at}norm", "image/norm"),
        f"{to}/query": peer[f"{pool}latent"][0],
        **attention(kernels, biases, peer, f"{pool}proj", f"{to}/attention"),
        **norm(peer, f"{pool}norm", f"{to}/norm"),
        **dense(peer, f"{pool}mlp.fc1", f"{to}/mlp/up"),
        **dense(peer, f"{pool}mlp.fc2", f"{to}/mlp/down"),
        **dense(peer, "text.text_projection", "heads/pair/text"),
        "heads/pair/bias/value": peer["logit_bias"],
    }


MAPS = {"clip": clip, "siglip": siglip}


@cache
def compared(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return features, loss and gradients here, and as the peer has them, by canonical name."""
    fixture = np.load(PEERS / f"{name}.npz", allow_pickle=False)
    towers, keys = SYSTEMS[name]
    modalities: dict[str, Any] = {
        "image": Image(
            patch=4, max_positions=2, positions="table", class_token=name == "clip", tower="image"
        ),
        "text": Text(vocabulary=24, max_positions=5, positions="table", tower="text"),
    }
    inputs = {
        "image": Input("image", modalities["image"], ImageInput(size=8)),
        "text": Input("text", modalities["text"], TextInput(length=5)),
    }
    config = configs.build(ModelConfig, {"towers": towers}, "model")
    objective = Contrastive(modalities=("image", "text"), head="pair", **keys)
    widths = Widths(connect_towers(config, modalities))
    declaration = declare_model(config, modalities, [("pair", objective.heads(widths, inputs))])

    def peer(kind: str) -> Arrays:
        return {n.removeprefix(kind): fixture[n] for n in fixture.files if n.startswith(kind)}

    weights = MAPS[name](peer("weight/"), False)
    weights.setdefault("stems/image/embed/bias", np.zeros(16, np.float32))
    ids = fixture["ids"]
    after_end = np.cumsum(ids == END, axis=1) - (ids == END)
    batch = Batch(
        inputs={
            "image": {"pixels": fixture["pixels"]},
            "text": {"ids": ids, "valid": after_end == 0},
        },
        fields={},
        valid=np.ones(len(ids), bool),
    )

    @jax.jit
    def both(p: Any) -> Any:
        def value(p: Any) -> Any:
            model = declaration.merge(p)
            rows = objective.represent(model, batch, jax.random.key(0)).rows
            loss = objective.compare(model, rows, batch).value
            return loss, dict(zip(objective.modalities, rows, strict=True))

        return jax.value_and_grad(value, has_aux=True)(p)

    (loss, features), gradient = both(from_canonical(declaration.specs, weights))
    found = {"loss": loss, **features, **to_canonical(declaration.specs, gradient)}
    expected = {n: fixture[n] for n in ("loss", "image", "text")}
    return found, {**expected, **MAPS[name](peer("gradient/"), True)}


@pytest.mark.parametrize("name", SYSTEMS)
def test_features_loss_and_gradients_are_those_of_open_clip(name: str) -> None:
    found, expected = compared(name)
    left = set(found) - set(expected)
    assert left == ({"stems/image/embed/bias"} if name == "clip" else set())
    for key, value in expected.items():
        size = max(float(np.abs(value).max()), 0.01)  # of a key's bias it is 0, up to rounding
        np.testing.assert_allclose(found[key] / size, value / size, atol=1e-4, err_msg=key)
        assert np.shape(found[key]) == value.shape and np.abs(value).max() > 0, key


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_fixture_states_its_versions_and_is_small(name: str) -> None:
    fixture = np.load(PEERS / f"{name}.npz", allow_pickle=False)
    assert "open_clip 3.3" in str(fixture["versions"]) and "torch " in str(fixture["versions"])
    assert (PEERS / f"{name}.npz").stat().st_size < 200_000
