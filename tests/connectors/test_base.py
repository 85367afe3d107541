"""Every connector by its name, and the grids that streams carry to those that read them."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import connecting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.modalities.image import Image, ImageInput
from mmjax.nn.masks import FULL, Causal
from mmjax.nn.packing import pack
from mmjax.nn.stream import Stream, concatenate, segments
from mmjax.nn.trunk import GroupConfig, Trunk

SIZES: dict[str, Any] = {"count": 3, "depth": 1, "num_heads": 2, "mlp_dim": 4}
CONNECTORS: dict[str, dict[str, Any]] = {
    "grid_tokens": {"frame": True},
    "latents": SIZES,
    "linear": {},
    "mlp": {},
    "pooled_grid": {"size": 2},
    "queries": SIZES,
    "space_to_depth": {},
}
OF_GRIDS = ("grid_tokens", "pooled_grid", "space_to_depth")


def make(name: str, **keys: Any) -> Any:
    return configs.component("connectors", {"name": name, **CONNECTORS[name], **keys}, "here")


def test_every_connector_is_tried_here() -> None:
    assert {n for n in configs.names("connectors") if n != "toy"} == set(CONNECTORS)


@pytest.mark.parametrize("name", CONNECTORS)
def test_every_connector_is_a_frozen_dataclass_that_documents_each_key(name: str) -> None:
    cls = configs.resolve("connectors", name, "here")
    assert cls.__dataclass_params__.frozen
    documented = "".join(each.__doc__ for each in cls.__mro__ if each.__doc__)
    for field in dataclasses.fields(cls):
        assert re.search(rf"^ +{field.name}: ", documented, re.MULTILINE), field.name


@pytest.mark.parametrize("name", CONNECTORS)
def test_what_comes_out_has_its_width_layout_rows_and_tokens_that_exist(name: str) -> None:
    """And neither the mask nor the context of the tower that was read."""
    there = np.repeat([[True], [False]], 4 * 6, 1)
    given = connecting.stream(("image", (4, 6)), width=4, valid=there, mask=Causal())
    given = dataclasses.replace(given, rows_B=jnp.asarray([True, False]), context=given)
    call, p = connecting.built(make(name), 4, 8)
    out = call({n: x.astype(np.float32) for n, x in p.items()}, given)
    length = {"grid_tokens": 29, "latents": 3, "queries": 3, "pooled_grid": 4, "space_to_depth": 6}
    assert out.layout == (("image", length.get(name, 24)),)
    assert out.x_BSD.shape == (2, out.layout[0][1], 8) and np.isfinite(out.x_BSD).all()
    np.testing.assert_array_equal(out.valid_BS, np.repeat([[True], [False]], out.layout[0][1], 1))
    np.testing.assert_array_equal(out.rows_B, given.rows_B)
    assert out.mask == FULL and out.context is None
    grids = {
        "linear": ((4, 6),),
        "mlp": ((4, 6),),
        "pooled_grid": ((2, 2),),
        "space_to_depth": ((2, 3),),
    }
    assert out.grids == grids.get(name, ())


@pytest.mark.parametrize("name", OF_GRIDS)
def test_a_stream_without_a_whole_grid_is_refused_by_the_connectors_name(name: str) -> None:
    for given in (
        connecting.stream(("image", (24,)), width=4),
        dataclasses.replace(
            connecting.stream(("image", (4, 6)), width=4), layout=(("image", 23),)
        ),  # a token less than its grid has
        connecting.stream(("image", (4, 6)), width=4).take(jnp.zeros((2, 24), int)),
    ):
        with pytest.raises(UserError, match=f"connector {name} reads a grid.*'image'.*token_drop"):
            make(name).build(4, 8)(given, None)


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        ("grid_tokens", {"row": False, "frame": False}, "here.row and frame are both false"),
        ("latents", {"reads_at": [1]}, "here.reads_at is [1]; it names layers from 0 to 0"),
        ("latents", {"depth": 3, "reads_at": [2, 0]}, "here.reads_at is [2, 0]; it names"),
        ("latents", {"reads_at": []}, "here.reads_at is []; it names"),
        ("mlp", {"activation": "gleu"}, "here.activation is 'gleu'. Did you mean 'gelu'?"),
        ("mlp", {"norm": "lyer"}, "here.norm is 'lyer'. Did you mean 'layer'?"),
        ("pooled_grid", {"size": 0}, "here.size is 0; it must be at least 1."),
        ("queries", {"cross_every": 2}, "here.cross_every is 2; it must divide depth, 1."),
        ("queries", {"coutn": 2}, "Unknown config key 'here.coutn'. Did you mean 'count'?"),
        ("space_to_depth", {"factor": 0}, "here.factor is 0; it must be at least 1."),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(name: str, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(words)}"):
        make(name, **keys)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pooled_grid", "size 2 does not divide the 3 x 4 tokens of 'image'"),
        ("space_to_depth", "factor 2 does not divide the 3 x 4 tokens of 'image'"),
    ],
)
def test_a_grid_that_does_not_divide_is_refused(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make(name).build(4, 8)(connecting.stream(("image", (3, 4)), width=4), None)


@pytest.mark.parametrize("name", ["queries", "latents"])
def test_new_tokens_of_several_modalities_need_a_name(name: str) -> None:
    given = connecting.stream(("image", (2,)), ("text", (3,)), width=4)
    call, p = connecting.built(make(name), 4, 8)
    with pytest.raises(UserError, match=rf"connector {name} reads .*\(image, text\).*`modality`"):
        call(p, given)
    call, p = connecting.built(make(name, modality="joint"), 4, 8)
    assert call(p, given).layout == (("joint", 3),)


def test_a_pictures_grid_passes_its_stem_and_a_trunk() -> None:
    layers = GroupConfig(2, ({"name": "transformer", "num_heads": 2, "mlp_dim": 4},))
    parts = {"stem": Image(patch=2).stem(4), "trunk": Trunk([layers], 4)}
    declaration = Declaration(nnx.Dict(parts))
    p = {name: jnp.ones(spec.shape) for name, spec in declaration.specs.items()}

    @jax.jit
    def through(p: Any, arrays: Any) -> Stream:
        model = declaration.merge(p)
        out: Stream = model.trunk(model.stem(arrays), None)[0]
        return out

    assert through(p, {"pixels": jnp.zeros((2, 4, 6, 3), jnp.uint8)}).grids == ((2, 3),)
    some = {"patches": jnp.zeros((2, 4, 12)), "coordinates": jnp.zeros((2, 4, 2))}
    assert through(p, some).grids == ()


def test_dropped_tokens_of_a_picture_are_no_grid() -> None:
    modality = Image(patch=2)
    settings = ImageInput(size=8, token_drop=0.5)
    pixels = np.zeros((8, 8, 3), np.uint8)
    arrays = modality.preprocess(settings, pixels, np.random.default_rng(0))
    declaration = Declaration(modality.stem(4))
    p = {name: jnp.ones(spec.shape) for name, spec in declaration.specs.items()}
    out = declaration.merge(p)({name: jnp.asarray(x)[None] for name, x in arrays.items()})
    assert out.layout == (("image", 8),) and out.grids == ()


def test_streams_that_are_joined_keep_the_grid_of_each_segment() -> None:
    image, text = (
        connecting.stream(("image", (2, 3)), width=4),
        connecting.stream(("text", (5,)), width=4),
    )
    both = concatenate([text, image])
    assert both.grids == ((), (2, 3)) and concatenate([text, text]).grids == ()
    assert [part.grids for part in segments(both)] == [(), ((2, 3),)]
    assert pack(both, 2).grids == ((), (2, 3), (), (2, 3))
