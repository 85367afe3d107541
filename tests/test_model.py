"""The model: stems, one pass of the trunk over several streams, heads shared by name."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.core import config as configs
from mmjax.core.errors import CodeError, UserError
from mmjax.core.parameters import Declaration
from mmjax.core.sharding import MeshConfig, batch_sharding, make_mesh
from mmjax.modalities.image import Image
from mmjax.modalities.text import Text
from mmjax.model import ModelConfig, TowerConfig, declare_model, towers_in
from mmjax.nn.dense import Dense
from mmjax.nn.stream import Stream
from mmjax.nn.trunk import GroupConfig

WIDTH = 4
BLOCK = {"name": "transformer", "num_heads": 2, "mlp_dim": 5}
TOWER = {"width": 4, "layers": [{"repeat": 2, "blocks": [BLOCK]}]}
CONFIG = ModelConfig(WIDTH, (GroupConfig(2, (BLOCK,)),))
MODALITIES: dict[str, Any] = {
    "image": Image(patch=2, max_positions=4),
    "text": Text(vocabulary=16, max_positions=8),
}
MISTYPED = {"parts": ["mlp"], "modalities": ["text", "imgae"]}
_MISTYPED_BLOCK = {**BLOCK, "per_modality": MISTYPED}
_OTHER = {**BLOCK, "per_modality": {"parts": ["mlp"], "modalities": ["text", "latent"]}}
CONFIG_OF_OTHERS = ModelConfig(WIDTH, (GroupConfig(1, (_OTHER,)),))


def head(n_out: int = 3) -> dict[str, Dense]:
    return {"out": Dense(WIDTH, n_out, ("embed", "joint"))}


def declared(*heads: tuple[str, dict[str, Any]]) -> Declaration:
    return declare_model(CONFIG, MODALITIES, heads)


def parameters(declaration: Declaration) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {n: rng.normal(size=s.shape) for n, s in declaration.specs.items()}


def arrays(rows: int = 8) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return {
        "image": {"pixels": rng.integers(0, 256, (rows, 4, 4, 3)).astype(np.uint8)},
        "text": {
            "ids": rng.integers(0, 16, (rows, 3)).astype(np.int32),
            "valid": rng.random((rows, 3)) < 0.7,
        },
    }


def encode(declaration: Declaration, names: tuple[str, ...] = ("image", "text")) -> Any:
    def call(p: Any, given: Any) -> Stream:
        model = declaration.merge(p)
        streams = [model.tokens(name, given[name]) for name in names]
        stream, _ = model.encode(streams, jax.random.key(0))
        return stream

    return call


def test_parameters_stand_under_stems_trunk_and_heads() -> None:
    names = {c for s in declared(("a", head())).specs.values() for c in s.canonical}
    assert {n.split("/")[0] for n in names} == {"stems", "trunk", "heads"}
    assert {n for n in names if n.startswith("heads")} == {"heads/a/out/kernel", "heads/a/out/bias"}
    assert {"stems/image/embed/kernel", "stems/text/embedding", "trunk/norm/scale"} <= names
    assert {"trunk/layers/000/mlp/up/kernel", "trunk/layers/001/mlp/up/kernel"} <= names


def test_adding_a_head_leaves_every_other_bit() -> None:
    # All matrices of one shape, so that little is compiled.
    config = ModelConfig(WIDTH, (GroupConfig(1, ({**BLOCK, "mlp_dim": WIDTH},)),))
    images = {"image": MODALITIES["image"]}
    before, after = (
        declare_model(config, images, [(name, head(WIDTH)) for name in names]).initialise(5)
        for names in ("a", "0a")
    )
    assert set(after) - set(before) == {"heads/0/out/kernel", "heads/0/out/bias"}
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    assert np.all(after["heads/0/out/kernel"] != after["heads/a/out/kernel"])


def test_heads_of_one_name_are_one() -> None:
    both = declared(
        ("shared", head()), ("shared", {**head(), "more": Dense(WIDTH, 2, (None, None))})
    )
    kernels = [n for n in both.specs if n.startswith("heads") and n.endswith("kernel")]
    assert sorted(kernels) == ["heads/shared/more/kernel", "heads/shared/out/kernel"]


def test_heads_of_one_name_that_do_not_agree() -> None:
    with pytest.raises(UserError, match=r"head 'shared', part 'out', .*\(4, 3\).*\(4, 5\)"):
        declared(("shared", head(3)), ("shared", head(5)))


@pytest.mark.parametrize(
    ("keys", "where"),
    [
        ({"layers": (GroupConfig(1, (BLOCK, _MISTYPED_BLOCK)),)}, r"model\.layers\[0\]\.blocks\[1\]"),
        ({"per_modality": {**MISTYPED, "parts": ["norm"]}}, "model"),
    ],
)  # fmt: skip
def test_a_copy_of_a_mistyped_modality_is_refused_where_the_model_is_built(
    keys: dict[str, Any], where: str
) -> None:
    config = configs.build(ModelConfig, {"width": WIDTH, "layers": CONFIG.layers, **keys}, "model")
    words = r"per_modality\.modalities names 'imgae', which is no modality\. Did you mean 'image'\?"
    with pytest.raises(UserError, match=f"^{where}: {words}"):
        declare_model(config, MODALITIES, [])
    # A name like none may be that of tokens that an objective adds, and a modality may pass no trunk.
    declare_model(CONFIG_OF_OTHERS, MODALITIES, [])


@pytest.mark.parametrize("part", ["mlp", "norm"])
def test_a_modality_without_a_copy_is_named_with_the_layer(part: str) -> None:
    copies = {"parts": [part], "modalities": ["text", "other"]}
    block = {**BLOCK, "per_modality": copies} if part == "mlp" else BLOCK
    of_model = {"per_modality": copies} if part == "norm" else {}
    keys = {"width": WIDTH, "layers": (GroupConfig(2, (block,)),), **of_model}
    declaration = declare_model(configs.build(ModelConfig, keys, "model"), MODALITIES, [])
    where = "model" if part == "norm" else r"model\.layers\[0\]\.blocks\[0\]"
    words = "tokens of modality 'image', for which there is no copy. Known: other, text."
    with pytest.raises(UserError, match=f"^{where}: .*{words}"):
        jax.eval_shape(encode(declaration), parameters(declaration), arrays())


class _Stemless(Image):
    """A modality whose `folder` selects a wrong stem."""

    def stem(self, width: int) -> Any:
        return {"no module": None, "no stream": _NoStream()}[self.folder]


class _NoStream(nnx.Module):
    def __call__(self, arrays: Any) -> Any:
        return arrays["pixels"]


def test_a_stem_that_is_no_module_and_one_that_returns_no_stream_are_named() -> None:
    where = r"_Stemless in .*test_model\.py returns NoneType; it must return Module"
    with pytest.raises(CodeError, match=f"^stem of {where}"):
        declare_model(CONFIG, {"image": _Stemless(folder="no module")}, [])
    declaration = declare_model(CONFIG, {"image": _Stemless(folder="no stream")}, [])
    words = r"^__call__ of _NoStream in .*test_model\.py returns .*; it must return Stream"
    with pytest.raises(CodeError, match=words):
        jax.eval_shape(encode(declaration, ("image",)), parameters(declaration), arrays())


def test_one_modality_after_another_in_one_pass(x64: None) -> None:
    declaration = declared()
    p, given = parameters(declaration), arrays()
    call = jax.jit(encode(declaration))
    stream = call(p, given)
    assert stream.x_BSD.shape == (8, 4 + 3, WIDTH)
    assert stream.layout == (("image", 4), ("text", 3))
    np.testing.assert_array_equal(stream.valid_BS[:, :4], True)
    np.testing.assert_array_equal(stream.valid_BS[:, 4:], given["text"]["valid"])
    # Another text reaches the image's tokens, and words that are not there reach none.
    valid = given["text"]["valid"]
    other = np.where(valid, given["text"]["ids"], (given["text"]["ids"] + 1) % 16)
    same = call(p, {**given, "text": {"ids": other.astype(np.int32), "valid": valid}})
    np.testing.assert_array_equal(same.x_BSD[:, :4], stream.x_BSD[:, :4])
    other = (given["text"]["ids"] + 1) % 16
    moved = call(p, {**given, "text": {"ids": other, "valid": valid}})
    changed = np.abs(moved.x_BSD - stream.x_BSD)[:, :4].max(axis=(1, 2)) > 1e-6
    np.testing.assert_array_equal(changed, valid.any(axis=1))


def test_a_name_of_ones_own_is_the_segments_name() -> None:
    declaration = declare_model(CONFIG, {"photo": MODALITIES["image"]}, [])
    given = {"photo": arrays()["image"]}
    shape = jax.eval_shape(encode(declaration, ("photo",)), parameters(declaration), given)
    assert shape.layout == (("photo", 4),)


def test_rows_do_not_see_each_other_and_many_devices_change_nothing(x64: None) -> None:
    declaration = declared()
    p, given = parameters(declaration), arrays()
    call = jax.jit(encode(declaration))
    whole = call(p, given).x_BSD
    half = call(p, jax.tree.map(lambda x: x[:4], given)).x_BSD
    np.testing.assert_allclose(half, whole[:4], rtol=1e-12)
    mesh = make_mesh(MeshConfig())
    placed = jax.device_put(given, batch_sharding(mesh, 8, "test"))
    with jax.set_mesh(mesh):
        spread = call(p, placed).x_BSD
    assert spread.addressable_shards[0].data.shape[0] == 1, "one row on each of eight devices"
    np.testing.assert_allclose(spread, whole, rtol=1e-10, atol=1e-14)


def test_bfloat16_goes_through() -> None:
    declaration = declared()
    shapes = {n: jax.ShapeDtypeStruct(s.shape, jnp.float32) for n, s in declaration.specs.items()}

    def call(p: Any, given: Any) -> Any:
        model = declaration.merge(p, jnp.bfloat16)
        streams = [model.tokens(name, given[name]) for name in ("image", "text")]
        return model.encode(streams, jax.random.key(0))

    stream, aux = jax.eval_shape(call, shapes, arrays())
    assert stream.x_BSD.dtype == jnp.bfloat16 and aux.loss.dtype == jnp.float32


def test_the_config_block() -> None:
    block = {"width": 4, "layers": [{"repeat": 2, "blocks": [BLOCK]}], "remat": "full"}
    assert configs.build(ModelConfig, block, "model") == ModelConfig(
        4, (GroupConfig(2, (BLOCK,)),), "full"
    )


def test_one_tower_may_be_written_by_its_name() -> None:
    tower = {"width": 4, "layers": [{"repeat": 2, "blocks": [BLOCK]}], "norm": "rms"}
    short = configs.build(ModelConfig, tower, "model")
    long = configs.build(ModelConfig, {"towers": {"trunk": tower}}, "model")
    assert short.trunk == long.trunk == TowerConfig(4, (GroupConfig(2, (BLOCK,)),), norm="rms")
    one, two = (
        {n: (s.shape, s.axes) for n, s in declare_model(c, MODALITIES, []).specs.items()}
        for c in (short, long)
    )
    assert one == two
    assert towers_in({"model": tower}) == {"model": tower}
    assert towers_in({"model": {"towers": {"trunk": tower}}}) == {"model.towers.trunk": tower}


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({}, "model.width is missing"),
        ({"width": 4}, "model.layers is missing"),
        ({"towers": {"trunk": {"width": 4}}}, "'model.towers.trunk.layers' is missing"),
        ({"towers": {"trunk": {**TOWER, "width": 0}}}, "model.towers.trunk.width is 0"),
        ({"towers": {"trunk": TOWER}, "width": 4}, "model.width is set beside towers; set towers.trunk.width"),
        ({"towers": {"trunk": TOWER}, "norm": "rms"}, "model.norm is set beside towers"),
        ({**TOWER, "per_modality": {"parts": ["mlp"], "modalities": ["a"]}}, "model.per_modality.parts names 'mlp'"),
    ],
)  # fmt: skip
def test_mistakes_in_towers(block: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        configs.build(ModelConfig, block, "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widht": 4}, "Unknown config key 'model.widht'. Did you mean 'width'"),
        ({"width": "4"}, "'model.width' is '4'; expected int"),
        ({"layers": [{"repeat": 2, "blcks": []}]}, r"'model.layers\[0\].blcks'. Did you mean 'blocks'"),
        ({"layers": [{"repeat": 2}]}, r"'model.layers\[0\].blocks' is missing"),
    ],
)  # fmt: skip
def test_mistakes_in_the_config_block(change: dict[str, Any], message: str) -> None:
    block = {"width": 4, "layers": [{"repeat": 2, "blocks": [BLOCK]}]}
    with pytest.raises(UserError, match=message):
        configs.build(ModelConfig, {**block, **change}, "model")
