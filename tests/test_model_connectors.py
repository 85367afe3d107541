"""Towers of different widths that a connector joins: each part alone, and configs that name what is not there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model_towers import alone, arrays, declared, modalities, parameters, run, tower

from mmjax.core.errors import UserError
from mmjax.nn.stream import Stream

QUERIES = {"name": "queries", "count": 2, "depth": 1, "num_heads": 2}
EYE = tower(4)


def words(**connectors: Any) -> dict[str, Any]:
    return tower(6, reads=["eye"], connectors=connectors)


def encoded(p: Any, names: tuple[str, ...], towers: dict[str, Any], key: Any = None) -> Stream:
    """Return the output of the tower that joins some modalities."""
    declaration = declared(towers, modalities("eye", "words"))

    @jax.jit
    def of(p: Any) -> Stream:
        model = declaration.merge(p)
        streams = [model.tokens(name, arrays()[name]) for name in names]
        stream: Stream = model.encode(streams, key)[0]
        return stream

    result: Stream = of(p)
    return result


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
    stream = encoded(p, ("image", "text"), towers)
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
    before = encoded(p, ("image", "text"), towers)
    assert before.layout == (("text", 3),)
    moved = dict(p)
    [kernel] = [n for n in p if n.startswith("connectors/words/eye") and n.endswith("kernel")]
    assert p[kernel].shape == (4, 6)
    moved[kernel] = 2 * p[kernel]
    assert jnp.abs(encoded(moved, ("image", "text"), towers).x_BSD - before.x_BSD).max() > 1e-3


@pytest.mark.parametrize(
    ("towers", "message"),
    [
        (
            {"eye": EYE, "words": words()},
            r"width 4, and its own width is 6. Give .* or set model.towers.words.connectors.eye",
        ),
        (
            {"eye": EYE, "words": words(eye={"name": "linear"}, ear={"name": "linear"})},
            r"model.towers.words.connectors has 'ear', which the tower does not read.* Did you mean 'eye'",
        ),
        (
            {"eye": EYE, "words": words(eye={"name": "lineer"})},
            r"model.towers.words.connectors.eye.name: no 'lineer' .*Did you mean 'linear'",
        ),
        (
            {"eye": EYE, "words": words(eye={"name": "queries", "cuont": 3})},
            r"Unknown config key 'model.towers.words.connectors.eye.cuont'.* 'count'",
        ),
    ],
)
def test_a_connector_between_unknown_towers_is_refused(towers: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        declared(towers, modalities("eye", "words"))
