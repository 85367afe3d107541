"""The trunk: scanning, grouping and rematerialisation change nothing but cost."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mmjax.blocks
from mmjax.blocks.transformer import Transformer
from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration, from_canonical, to_canonical
from mmjax.core.sharding import MeshConfig, make_mesh, named
from mmjax.nn.masks import Causal, KeyIs, Same
from mmjax.nn.stream import Aux, Stream
from mmjax.nn.trunk import GroupConfig, Trunk, add_up

WIDTH = 4
BLOCK = {"name": "transformer", "num_heads": 2, "mlp_dim": 5}
OTHER = {"name": "transformer", "num_heads": 1, "mlp_dim": 3, "qk_norm": True}
VALID = np.array([[1, 1, 0], [1, 0, 0]], bool)
Groups = Sequence[GroupConfig]

# A block that draws numbers and reports what a block can report.
NOISY = """
from dataclasses import dataclass, replace
import jax, jax.numpy as jnp
from flax import nnx
from mmjax.nn.dense import lecun
from mmjax.nn.stream import Aux
from mmjax.core.parameters import declare

@dataclass(frozen=True)
class Noisy:
    size: float = 1.0

    def build(self, width):
        return NoisyLayer(width, self.size)

class NoisyLayer(nnx.Module):
    def __init__(self, width, size):
        self.shift = declare((1, width), (None, "embed"), lecun)
        self.size = size

    def __call__(self, stream, key):
        noise = jax.random.uniform(key, stream.x_BSD.shape)
        shift = self.shift[...]
        count = jnp.float32(stream.x_BSD.size)
        aux = Aux(loss=shift.sum(), statistics={"noise": (noise.sum(), count)})
        return replace(stream, x_BSD=stream.x_BSD + self.size * noise + shift), aux
"""


@pytest.fixture
def noisy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The config of a block that stands in a file of its own."""
    (tmp_path / "noisy.py").write_text(NOISY)
    monkeypatch.setattr(mmjax.blocks, "__path__", [*mmjax.blocks.__path__, str(tmp_path)])
    yield {"name": "noisy", "size": 0.5}
    sys.modules.pop("mmjax.blocks.noisy", None)


def declared(groups: Groups, remat: str = "none") -> Declaration:
    return Declaration(nnx.Dict({"trunk": Trunk(groups, WIDTH, remat)}))


def random_canonical(declaration: Declaration) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {n: np.empty(s.shape) for n, s in declaration.specs.items()}
    canonical = to_canonical(declaration.specs, shapes)
    return {n: rng.normal(size=canonical[n].shape) for n in sorted(canonical)}


def inputs() -> Stream:
    x = np.random.default_rng(1).normal(size=(2, 3, WIDTH))
    return Stream(jnp.asarray(x), jnp.asarray(VALID), layout=(("text", 3),))


def run(declaration: Declaration, canonical: Mapping[str, Any]) -> tuple[Stream, Aux]:
    parameters = from_canonical(declaration.specs, canonical)
    call = jax.jit(lambda p, s: declaration.merge(p)["trunk"](s, jax.random.key(7)))
    return call(parameters, inputs())


def final_norm(canonical: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    spread = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)
    y = (x - x.mean(axis=-1, keepdims=True)) / spread * canonical["trunk/norm/scale"]
    return y + canonical["trunk/norm/bias"]


@pytest.mark.parametrize(
    "groups",
    [[GroupConfig(3, (BLOCK,))], [GroupConfig(1, (OTHER,)), GroupConfig(2, (BLOCK, OTHER))]],
)
def test_groups_equal_a_loop_over_their_layers(x64: None, groups: Groups) -> None:
    declaration = declared(groups)
    canonical = random_canonical(declaration)
    blocks = [b for g in groups for _ in range(g.repeat) for b in g.blocks]

    @jax.jit
    def layers(canonical: Any, stream: Stream) -> Any:
        for index, block in enumerate(blocks):
            settings = {k: v for k, v in block.items() if k != "name"}
            layer = Declaration(Transformer(**settings).build(WIDTH))
            prefix = f"trunk/layers/{index:03d}/"
            own = {n.removeprefix(prefix): a for n, a in canonical.items() if n.startswith(prefix)}
            stream, _ = layer.merge(own)(stream, jax.random.key(0))
        return stream.x_BSD

    expected = final_norm(canonical, np.asarray(layers(canonical, inputs())))
    stream, aux = run(declaration, canonical)
    np.testing.assert_allclose(stream.x_BSD, expected, rtol=1e-10)
    np.testing.assert_array_equal(stream.valid_BS, VALID)
    assert stream.layout == (("text", 3),) and aux.loss == 0


def groupings(block: dict[str, Any]) -> list[Groups]:
    return [
        [GroupConfig(4, (block,))],
        [GroupConfig(2, (block,)), GroupConfig(2, (block,))],
        [GroupConfig(2, (block, block))],
    ]


def test_another_grouping_has_the_same_names() -> None:
    names = [
        {c for spec in declared(groups).specs.values() for c in spec.canonical}
        for groups in groupings(BLOCK)
    ]
    assert {n.split("/")[2] for n in names[0] if "layers" in n} == {"000", "001", "002", "003"}
    assert names[0] == names[1] == names[2]


def test_another_grouping_begins_with_the_same_bits(noisy: dict[str, Any]) -> None:
    found = []
    for groups in groupings(noisy):
        declaration = declared(groups)
        found.append(to_canonical(declaration.specs, jax.jit(declaration.initialise)(3)))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, value in other.items():
            np.testing.assert_array_equal(value, found[0][name], err_msg=name)
    first, second = (found[0][f"trunk/layers/{i}/shift"] for i in ("000", "001"))
    assert np.abs(first - second).min() > 0, "layers begin apart"


def test_another_grouping_computes_the_same(x64: None, noisy: dict[str, Any]) -> None:
    # Two blocks in a layer's place would draw other numbers, were keys folded by place in a group.
    results = []
    for groups in groupings(noisy):
        declaration = declared(groups)
        results.append(run(declaration, random_canonical(declaration)))
    (stream, aux), *others = results
    for other, other_aux in others:
        np.testing.assert_allclose(other.x_BSD, stream.x_BSD, rtol=1e-12)
        np.testing.assert_allclose(other_aux.loss, aux.loss, rtol=1e-6)


def test_layers_draw_numbers_of_their_own(x64: None, noisy: dict[str, Any]) -> None:
    declaration = declared([GroupConfig(2, (noisy, noisy))])
    canonical = random_canonical(declaration)
    x = np.asarray(inputs().x_BSD)
    for index in range(4):
        key = jax.random.fold_in(jax.random.key(7), index)
        noise = np.asarray(jax.random.uniform(key, x.shape))
        x = x + 0.5 * noise + canonical[f"trunk/layers/{index:03d}/shift"]
    stream, _ = run(declaration, canonical)
    np.testing.assert_allclose(stream.x_BSD, final_norm(canonical, x), rtol=1e-10)


def test_aux_adds_up_over_layers_and_groups(x64: None, noisy: dict[str, Any]) -> None:
    declaration = declared([GroupConfig(2, (noisy, noisy)), GroupConfig(1, (noisy,))])
    canonical = random_canonical(declaration)
    _, aux = run(declaration, canonical)
    shifts = [a.sum() for n, a in canonical.items() if n.endswith("shift")]
    assert len(shifts) == 5
    np.testing.assert_allclose(aux.loss, sum(shifts), rtol=1e-6)
    total, count = aux.statistics["noise"]
    keys = [jax.random.fold_in(jax.random.key(7), i) for i in range(5)]
    drawn = [float(jax.random.uniform(k, (2, 3, WIDTH)).sum()) for k in keys]
    np.testing.assert_allclose(total, sum(drawn), rtol=1e-10)
    assert count == 5 * 2 * 3 * WIDTH


def test_add_up_joins_statistics_that_not_every_block_has() -> None:
    pair = (jnp.float32(2), jnp.float32(4))
    one = Aux(jnp.float32(1), {"a": pair}, {"x": jnp.float32(8)})
    two = Aux(jnp.float32(5), {"a": pair, "b": pair}, {"x": jnp.float32(1), "y": jnp.float32(9)})
    total = add_up([one, two])
    assert total.loss == 6 and total.proposals == {"x": 9, "y": 9}
    assert total.statistics == {"a": (4, 8), "b": (2, 4)}
    assert one.statistics == {"a": pair}, "the parts stay as they are"


def test_remat_changes_what_is_computed_again_and_no_value(x64: None) -> None:
    groups = [GroupConfig(2, (BLOCK,))]
    canonical = random_canonical(declared(groups))
    results, products = {}, {}
    for remat in ("none", "dots", "full"):
        declaration = declared(groups, remat)

        def loss(p: Any, declaration: Declaration = declaration) -> Any:
            stream, _ = declaration.merge(p)["trunk"](inputs(), jax.random.key(7))
            return jnp.square(stream.x_BSD[VALID] - 0.5).sum()

        parameters = from_canonical(declaration.specs, canonical)
        step = jax.value_and_grad(loss)
        results[remat] = jax.jit(step)(parameters)
        products[remat] = str(jax.make_jaxpr(step)(parameters)).count("dot_general[")
    assert products["none"] < products["dots"] < products["full"]
    for remat in ("dots", "full"):
        np.testing.assert_allclose(results[remat][0], results["none"][0], rtol=1e-12)
        for name, gradient in results["none"][1].items():
            np.testing.assert_allclose(
                results[remat][1][name], gradient, rtol=1e-9, atol=1e-12, err_msg=name
            )
    assert all(np.abs(g).max() > 0 for g in results["none"][1].values())


def test_bfloat16_compute_keeps_the_norms_and_gives_bfloat16() -> None:
    declaration = declared([GroupConfig(2, (BLOCK,))])
    parameters = jax.eval_shape(lambda: declaration.initialise(0))
    x = inputs().x_BSD.astype(jnp.bfloat16)

    def call(p: Any) -> Any:
        merged = declaration.merge(p, jnp.bfloat16)["trunk"]
        kernel = merged.groups[0].blocks[0].mlp.up.kernel[...]
        scale = merged.groups[0].blocks[0].mlp_norm.scale[...]
        return merged(Stream(x), jax.random.key(0))[0].x_BSD, kernel, scale

    out, kernel, scale = jax.eval_shape(call, parameters)
    assert out.dtype == kernel.dtype == jnp.bfloat16
    assert scale.dtype == jnp.float32


@pytest.mark.parametrize(
    ("groups", "remat", "message"),
    [
        ([GroupConfig(1, ({"name": "transfomer"},))], "none",
         r"model\.layers\[0\]\.blocks\[0\]\.name: no 'transfomer' .* 'transformer'\?"),
        ([GroupConfig(1, (BLOCK, {**BLOCK, "mlp_dm": 3}))], "none",
         r"key 'model\.layers\[0\]\.blocks\[1\]\.mlp_dm'\. Did you mean 'mlp_dim'\?"),
        ([GroupConfig(1, (BLOCK,)), GroupConfig(1, ({**BLOCK, "num_heads": 3},))], "none",
         r"model\.layers\[1\]\.blocks\[0\]: attention: width 4 does not divide over 3 heads"),
        ([GroupConfig(1, ({"num_heads": 2},))], "none", r"blocks\[0\]: 'name' is missing"),
        ([GroupConfig(2, ())], "none", r"model\.layers\[0\]\.blocks is empty"),
        ([], "none", r"model\.layers is empty"),
        ([GroupConfig(1, (BLOCK,))], "dot", r"model\.remat is 'dot'\. Did you mean 'dots'\?"),
    ],
)  # fmt: skip
def test_mistakes_in_the_config_say_where(groups: Groups, remat: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        trunk = declared(groups, remat)
        run(trunk, random_canonical(trunk))


@pytest.mark.parametrize("kernel", ["plain", "chunked"])
def test_a_mask_holds_through_all_layers(x64: None, kernel: str) -> None:
    """Causal text after a picture that all see: gradients of every output by every input token."""
    block = {**BLOCK, "attention_impl": kernel}
    declaration = declared([GroupConfig(2, (block,))])
    p = {
        n: jax.random.normal(jax.random.key(i), s.shape)
        for i, (n, s) in enumerate(declaration.specs.items())
    }
    mask = (Causal() & Same("modality")) | KeyIs("modality", "image")

    def outputs(x_SD: jax.Array) -> jax.Array:
        stream = Stream(x_SD[None], layout=(("image", 2), ("text", 3)), mask=mask)
        return declaration.merge(p)["trunk"](stream, jax.random.key(0))[0].x_BSD[0]

    x = jax.random.normal(jax.random.key(9), (5, WIDTH))
    reached = np.abs(jax.jit(jax.jacrev(outputs))(x)).sum((1, 3)) > 0
    expected = [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    np.testing.assert_array_equal(reached, expected)


def test_kernels_of_attention_are_made_whole_once_in_a_pass() -> None:
    """Query, key, value and out: in the forward pass and in the backward one, which does the layer again."""
    width = 64
    trunk = Trunk(
        [GroupConfig(2, ({"name": "transformer", "num_heads": 4, "mlp_dim": 192},))], width, "full"
    )
    declaration = Declaration(nnx.Dict({"trunk": trunk}))
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))

    def laid(axes: Sequence[str | None], shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=named(axes, shape, mesh))

    def loss(parameters: Any, x: jax.Array) -> jax.Array:
        out, _ = declaration.merge(parameters)["trunk"](Stream(x), None)
        return jnp.square(out.x_BSD).mean()

    parameters = {name: laid(spec.axes, spec.shape) for name, spec in declaration.specs.items()}
    x = laid(("batch", None, None), (16, 8, width))
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss)).lower(parameters, x).compile().as_text()
    assert len(re.findall(r"= f32\[64,64\]\S* all-gather\(", text)) == 2 * 4
