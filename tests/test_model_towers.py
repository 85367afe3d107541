"""Models of several towers: each as a model of its own, joined, as encoder and decoder."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.experiment import make_experiment
from mmjax.modalities.image import Image
from mmjax.modalities.text import Text
from mmjax.model import ModelConfig, declare_model
from mmjax.nn.masks import FULL, Causal
from mmjax.nn.stream import Stream, concatenate
from mmjax.nn.trunk import Trunk

ROWS = 3


def tower(width: int, block: str = "transformer", **keys: Any) -> dict[str, Any]:
    return {
        "width": width,
        "layers": [{"repeat": 1, "blocks": [{"name": block, "num_heads": 2, "mlp_dim": 5}]}],
        **keys,
    }


def modalities(image: str = "", text: str = "") -> dict[str, Any]:
    return {
        "image": Image(patch=2, max_positions=4, tower=image),
        "text": Text(vocabulary=16, max_positions=8, tower=text),
    }


def declared(towers: dict[str, Any], given: dict[str, Any]) -> Declaration:
    config = configs.build(ModelConfig, {"towers": towers}, "model")
    return declare_model(config, given, [])


def parameters(declaration: Declaration) -> dict[str, Any]:
    """Return random parameters, each by its name."""
    return {
        n: np.random.default_rng(zlib.crc32(n.encode())).normal(size=s.shape)
        for n, s in declaration.specs.items()
    }


def arrays(seed: int = 1) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return {
        "image": {"pixels": rng.integers(0, 256, (ROWS, 4, 4, 3)).astype(np.uint8)},
        "text": {
            "ids": rng.integers(0, 16, (ROWS, 3)).astype(np.int32),
            "valid": np.array([[True, True, True], [True, True, False], [True, False, False]]),
        },
    }


def encoded(declaration: Declaration, p: Any, names: tuple[str, ...], **keywords: Any) -> Stream:
    def call(p: Any) -> Stream:
        model = declaration.merge(p)
        streams = [model.tokens(name, arrays()[name]) for name in names]
        stream: Stream = model.encode(streams, None, **keywords)[0]
        return stream

    result: Stream = jax.jit(call)(p)
    return result


def alone(block: dict[str, Any], p: Any, name: str, given: dict[str, Any]) -> Any:
    """Return a model whose only tower is that of one name, with the parameters of a larger model."""
    keys = {k: v for k, v in block.items() if k not in ("reads", "context", "causal")}
    config = configs.build(ModelConfig, keys, "model")
    own = declare_model(config, given, [])
    renamed = {n: p[n.replace("trunk/", f"{name}/", 1)] for n in own.specs}
    return own.merge(renamed)


def run(model: Any, streams: list[Stream], **keys: Any) -> Stream:
    """Return the trunk of a model of one tower."""
    stream: Stream = jax.jit(lambda s: model.trunk(s, None)[0])(
        replace(concatenate(streams), **keys)
    )
    return stream


def test_parameters_stand_under_the_names_of_towers() -> None:
    specs = declared({"eye": tower(4), "ear": tower(6)}, modalities("eye", "ear")).specs
    assert specs["eye/groups/0/blocks/0/mlp/up/kernel"].canonical == [
        "eye/layers/000/mlp/up/kernel"
    ]
    assert specs["eye/groups/0/blocks/0/mlp/up/kernel"].shape == (1, 4, 5)
    assert specs["ear/norm/scale"].shape == (6,)
    assert specs["stems/image/embed/kernel"].shape == (12, 4)
    assert specs["stems/text/embedding"].shape == (16, 6)
    assert {n.split("/")[0] for n in specs} == {"stems", "eye", "ear"}


def test_each_modality_passes_its_own_tower(x64: None) -> None:
    towers = {"eye": tower(4), "ear": tower(6, norm="rms")}
    declaration = declared(towers, modalities("eye", "ear"))
    p = parameters(declaration)
    for modality, name in (("image", "eye"), ("text", "ear")):
        given = {modality: modalities()[modality]}
        model = alone(towers[name], p, name, given)
        expected = run(model, [model.tokens(modality, arrays()[modality])])
        found = encoded(declaration, p, (modality,))
        np.testing.assert_allclose(found.x_BSD, expected.x_BSD, rtol=1e-12, atol=1e-14)
    with pytest.raises(
        UserError, match=r"the pass needs one tower for .*'image' by tower 'eye' \(width 4\)"
    ):
        encoded(declaration, p, ("image", "text"))


def test_a_tower_that_reads_towers_takes_their_tokens_in_the_order_of_the_streams(
    x64: None,
) -> None:
    towers = {"eye": tower(4), "ear": tower(4), "mind": tower(4, reads=["eye", "ear"])}
    declaration = declared(towers, modalities("eye", "ear"))
    p, apart = parameters(declaration), {}
    for modality, name in (("image", "eye"), ("text", "ear")):
        model = alone(towers[name], p, name, {modality: modalities()[modality]})
        apart[modality] = run(model, [model.tokens(modality, arrays()[modality])])
    mind = alone(towers["mind"], p, "mind", {})
    for order in (("image", "text"), ("text", "image")):
        streams = [replace(apart[m], coordinates={}, context=None) for m in order]
        expected, found = run(mind, streams), encoded(declaration, p, order)
        assert found.layout == tuple((m, {"image": 4, "text": 3}[m]) for m in order)
        np.testing.assert_array_equal(found.valid_BS, expected.valid_BS)
        np.testing.assert_allclose(found.x_BSD, expected.x_BSD, rtol=1e-12, atol=1e-14)


def test_a_decoder_reads_the_encoder_and_gives_its_own_tokens(x64: None) -> None:
    towers = {
        "encoder": tower(4),
        "decoder": tower(4, "cross_transformer", context="encoder", causal=True),
    }
    declaration = declared(towers, modalities("encoder", "decoder"))
    p = parameters(declaration)
    encoder = alone(towers["encoder"], p, "encoder", {"image": modalities()["image"]})
    context = run(encoder, [encoder.tokens("image", arrays()["image"])])
    decoder = alone(towers["decoder"], p, "decoder", {"text": modalities()["text"]})
    text = decoder.tokens("text", arrays()["text"])
    expected = run(decoder, [text], context=context, mask=Causal())
    found = encoded(declaration, p, ("image", "text"))
    assert found.layout == (("text", 3),) and found.context is None
    np.testing.assert_allclose(found.x_BSD, expected.x_BSD, rtol=1e-12, atol=1e-14)
    whole = run(decoder, [text], context=context, mask=FULL)
    assert np.abs(whole.x_BSD - found.x_BSD)[:, 0].max() > 1e-3, "causal"
    with pytest.raises(
        UserError, match="model.towers.decoder.context is 'encoder', and the pass has no tokens"
    ):
        encoded(declaration, p, ("text",))


def test_a_towers_name_is_folded_into_its_key_but_for_trunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys: dict[int, Any] = {}

    def noted(self: Trunk, stream: Stream, key: Any) -> Any:
        keys[stream.x_BSD.shape[-1]] = np.asarray(jax.random.key_data(key))
        return stream, None

    monkeypatch.setattr(Trunk, "__call__", noted)
    declaration = declared({"trunk": tower(4), "ear": tower(6)}, modalities("", "ear"))
    model = declaration.merge(parameters(declaration))
    key = jax.random.key(3)  # a layer's own draws are folded from it
    for name in ("image", "text"):
        model.encode([model.tokens(name, arrays()[name])], key)
    np.testing.assert_array_equal(keys[4], jax.random.key_data(key))
    folded = jax.random.fold_in(key, zlib.crc32(b"ear"))
    np.testing.assert_array_equal(keys[6], jax.random.key_data(folded))


def test_a_tower_computes_in_its_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: dict[int, Any] = {}
    inner = Trunk.__call__

    def noted(self: Trunk, stream: Stream, key: Any) -> Any:
        kernel = self.groups[0].blocks[0].mlp.up.kernel[...]
        inside[stream.x_BSD.shape[-1]] = (stream.x_BSD.dtype, kernel.dtype)
        return inner(self, stream, key)

    monkeypatch.setattr(Trunk, "__call__", noted)
    towers = {"eye": tower(4, dtype="float32"), "ear": tower(6)}
    declaration = declared(towers, modalities("eye", "ear"))

    def call(p: Any) -> list[Stream]:
        model = declaration.merge(p, jnp.bfloat16)
        return [model.encode([model.tokens(m, arrays()[m])], None)[0] for m in ("image", "text")]

    for stream in jax.eval_shape(call, declaration.shapes(jnp.float32)):
        assert stream.x_BSD.dtype == jnp.bfloat16
    assert inside == {4: (jnp.float32, jnp.float32), 6: (jnp.bfloat16, jnp.bfloat16)}


def test_a_first_norm_comes_before_the_layers(x64: None) -> None:
    """Tokens that are scaled leave it as they were."""
    declaration = declared({"trunk": tower(4, first_norm=True, norm_eps=1e-12)}, modalities())
    assert declaration.specs["trunk/first_norm/scale"].shape == (4,)
    model = declaration.merge(parameters(declaration))
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    one, two = (run(model, [Stream(jnp.asarray(x * by))]).x_BSD for by in (1, 7))
    np.testing.assert_allclose(one, two, rtol=1e-9)


@pytest.mark.parametrize(
    ("objective", "owner"),
    [
        ({"name": "contrastive", "joint_forward": True}, "contrastive with joint_forward"),
        ({"name": "fusion", "classes": 3}, "fusion"),
        ({"name": "classification", "classes": 3}, "classification"),
        ({"name": "transfusion", "discrete": ["text"]}, "transfusion"),
    ],
)
def test_objectives_of_one_pass_refuse_two_towers(objective: dict[str, Any], owner: str) -> None:
    block = configs.read_file("limoe:small-dense")
    layers = block["model"]["layers"]
    block["model"] = {
        "towers": {"eye": {"width": 8, "layers": layers}, "mouth": {"width": 16, "layers": layers}}
    }
    block["modalities"]["image"]["tower"] = "eye"
    block["modalities"]["text"]["tower"] = "mouth"
    task = block["tasks"]["image_text"]
    task["objective"] = {"modalities": ["image", "text"], **objective}
    task["evaluators"] = {}
    message = rf"{owner} needs one tower .*'image' by tower 'eye' \(width 8\), 'text' by tower 'mouth' \(width 16\)"
    with pytest.raises(UserError, match=message):
        make_experiment(block)
    block["modalities"]["text"]["tower"] = "moth"
    with pytest.raises(UserError, match="modalities.text.tower is 'moth'.*Did you mean 'mouth'"):
        make_experiment(block)


# --- connectors ---------------------------------------------------------------------------------

QUERIES = {"name": "queries", "count": 2, "depth": 1, "num_heads": 2, "mlp_dim": 5}
EYE = tower(4)


def words(**connectors: Any) -> dict[str, Any]:
    return tower(6, reads=["eye"], connectors=connectors)


def joined_by(towers: dict[str, Any], p: Any) -> Stream:
    """Return the output of the tower that joins pictures and texts."""
    return encoded(declared(towers, modalities("eye", "words")), p, ("image", "text"))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("connector", [{"name": "mlp"}, QUERIES], ids=["mlp", "queries"])
def test_a_tower_reads_another_through_a_connector(connector: Any) -> None:
    towers = {"eye": EYE, "words": words(eye=connector)}
    declaration = declared(towers, modalities("eye", "words"))
    p, inputs = parameters(declaration), arrays()
    model = declaration.merge(p)
    eye = alone(EYE, p, "eye", {"image": modalities()["image"]})
    seen = run(eye, [eye.tokens("image", inputs["image"])])
    connected = model.connectors["words"]["eye"](seen, None)[0]
    text = model.tokens("text", inputs["text"])
    both = [replace(connected, coordinates={}), replace(text, coordinates={})]
    expected = run(alone_words(towers, p), both)
    stream = joined_by(towers, p)
    np.testing.assert_allclose(stream.x_BSD, expected.x_BSD, rtol=1e-10)
    places = 2 if connector is QUERIES else 4
    assert stream.layout == (("image", places), ("text", 3)) and stream.x_BSD.shape[2] == 6


def alone_words(towers: dict[str, Any], p: Any) -> Any:
    """Return a model whose only tower is `words`."""
    block = {k: v for k, v in towers["words"].items() if k != "connectors"}
    return alone(block, p, "words", {"text": modalities()["text"]})


@pytest.mark.usefixtures("x64")
def test_a_connector_is_between_an_encoder_and_the_context_of_a_decoder() -> None:
    decoder = tower(6, "cross_transformer", context="eye", connectors={"eye": {"name": "linear"}})
    towers = {"eye": EYE, "words": decoder}
    p = parameters(declared(towers, modalities("eye", "words")))
    before = joined_by(towers, p)
    assert before.layout == (("text", 3),)
    moved = dict(p)
    [kernel] = [n for n in p if n.startswith("connectors/words/eye") and n.endswith("kernel")]
    assert p[kernel].shape == (4, 6)
    moved[kernel] = 2 * p[kernel]
    assert jnp.abs(joined_by(towers, moved).x_BSD - before.x_BSD).max() > 1e-3


@pytest.mark.parametrize(
    ("towers", "message"),
    [
        (
            {"eye": EYE, "words": words()},
            r"width 4, and its own width is 6. Give .* or set model.towers.words.connectors.eye",
        ),
        (
            {"eye": EYE, "words": words(eye={"name": "linear"}, ear={"name": "linear"})},
            r"model.towers.words.connectors has 'ear', which the tower does not read.* Known: eye",
        ),
        (
            {"eye": EYE, "words": words(eye={"name": "lineer"})},
            r"model.towers.words.connectors.eye.name: no 'lineer' .*Did you mean 'linear'",
        ),
        (
            {"eye": EYE, "words": words(eye={"name": "queries", "cuont": 3, "mlp_dim": 5})},
            r"Unknown config key 'model.towers.words.connectors.eye.cuont'.* 'count'",
        ),
    ],
)
def test_a_connector_between_unknown_towers_is_refused(towers: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        declared(towers, modalities("eye", "words"))
