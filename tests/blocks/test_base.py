"""The keys of every block are checked by their place, and an error inside a layer stays what it is."""

from __future__ import annotations

import dataclasses
import re
import traceback
from typing import Any

import pytest
import toyrun
from flax import nnx

from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.experiment import make_experiment
from mmjax.nn.trunk import GroupConfig, Trunk

SIZES = {"num_heads": 2, "mlp_dim": 8}
BLOCKS: dict[str, dict[str, Any]] = {
    "bottleneck": {**SIZES, "modalities": ["text", "image"]},
    "cross_transformer": SIZES,
    "mamba": {},
    "transformer": SIZES,
}
EXPERTS: dict[str, Any] = {"count": 4, "router": {"name": "token_choice"}}


def built(name: str, **keys: Any) -> Any:
    """Return the second layer of a trunk, whose place is `at`."""
    blocks = {"name": "transformer", **SIZES}, {"name": name, **BLOCKS.get(name, {}), **keys}
    return Trunk([GroupConfig(1, blocks)], 4).groups[0].blocks[1]


def error(name: str, **keys: Any) -> str:
    with pytest.raises(UserError) as raised:
        built(name, **keys)
    place, _, words = str(raised.value).partition("model.layers[0].blocks[1].")
    assert place in ("", "Unknown config key '", "Config key '"), raised.value
    return words


def test_every_block_is_tried_here() -> None:
    assert {n for n in configs.names("blocks") if not n.startswith("toy")} == set(BLOCKS)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_is_a_frozen_dataclass_that_documents_each_key(name: str) -> None:
    cls = configs.resolve("blocks", name, "here")
    assert cls.__dataclass_params__.frozen and built(name) is not None
    documented = "".join(each.__doc__ for each in cls.__mro__ if each.__doc__)
    if name == "bottleneck":
        documented += configs.resolve("blocks", "transformer", "here").__doc__
    for field in dataclasses.fields(cls):
        assert re.search(rf"^ +{field.name}: ", documented, re.MULTILINE), field.name


@pytest.mark.parametrize(
    ("name", "key", "nearest"),
    [
        ("bottleneck", "fused", "fuse"),
        ("cross_transformer", "mlp_dm", "mlp_dim"),
        ("mamba", "stat", "state"),
        ("transformer", "rotery", "rotary"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(name: str, key: str, nearest: str) -> None:
    assert error(name, **{key: 1}) == f"{key}'. Did you mean '{nearest}'?"


def test_a_bottlenecks_blocks_have_no_copies() -> None:
    assert error("bottleneck", per_modality={"parts": ["mlp"]}).startswith("per_modality'.")


@pytest.mark.parametrize("name", ["transformer", "bottleneck"])
@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"group_sise": 8}, "experts.group_sise'. Did you mean 'group_size'?"),
        ({"causal": {"mlp_dm": 3}}, "experts.causal.mlp_dm'. Did you mean 'mlp_dim'?"),
        (
            {"router": {"name": "token_choice", "capacty": 2.0}},
            "experts.router.capacty'. Did you mean 'capacity'?",
        ),
        (
            {"router": {"name": "token_chois"}},
            "experts.router.name: no 'token_chois' in mmjax/nn/routers. Did you mean 'token_choice'? "
            "(Modules of your own: --extra=DIR.)",
        ),
        ({"losses": {"importence": 1.0}}, "experts.losses names 'importence'. Did you mean 'importance'?"),
        ({"losses_over": "bach"}, "experts.losses_over is 'bach'. Did you mean 'batch'?"),
        ({"router": {"name": "expert_choice", "score": "sigmod"}},
         "experts.router.score is 'sigmod'. Did you mean 'sigmoid'?"),
        ({"router": {"name": "token_choice", "top_k": 2.0}}, "experts.router.top_k' is 2.0; expected int."),
        ({"router": {"name": "token_choice", "top_k": 0}},
         "experts.router.top_k is 0; it must be at least 1."),
        ({"router": {"name": "token_choice", "top_k": 5}},
         "experts.router.top_k is 5, of 4 experts; it is at most their number."),
        ({"router": "token_choice"}, "experts.router' is 'token_choice'; expected a block of keys."),
        ({"router": {}}, "experts.router: 'name' is missing. Known: expert_choice, soft, token_choice."),
        ({"count": 0}, "experts.count is 0; it must be at least 1."),
    ],
)  # fmt: skip
def test_the_keys_of_experts_are_checked_at_every_depth(
    name: str, more: dict[str, Any], said: str
) -> None:
    assert error(name, experts={**EXPERTS, **more}) == said


@pytest.mark.parametrize("name", ["bottleneck", "cross_transformer", "transformer"])
@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_heads": 4.0}, "num_heads' is 4.0; expected int."),
        ({"num_heads": "4"}, "num_heads' is '4'; expected int."),
        ({"num_heads": True}, "num_heads' is True; expected int."),
        ({"bias": 1}, "bias' is 1; expected bool."),
        ({"qk_norm": 1}, "qk_norm' is 1; expected bool or str."),
        ({"qk_norm": "layr"}, "qk_norm is 'layr'. Did you mean 'layer'?"),
        ({"attention_impl": "splsh"}, "attention_impl is 'splsh'. Did you mean 'splash'?"),
        ({"num_heads": 0}, "num_heads is 0; it must be at least 1."),
        ({"mlp_dim": -1}, "mlp_dim is -1; it must be at least 1."),
        ({"eps": 0}, "eps is 0.0; it must be above 0."),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(name: str, keys: dict[str, Any], said: str) -> None:
    assert error(name, **keys) == said


@pytest.mark.parametrize("name", ["bottleneck", "cross_transformer", "transformer"])
def test_what_the_keys_alone_do_not_show_is_refused_by_the_blocks_place(name: str) -> None:
    with pytest.raises(UserError) as raised:
        built(name, num_heads=3)
    words = "attention: width 4 does not divide over 3 heads."
    assert str(raised.value) == f"model.layers[0].blocks[1]: {words}"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"state": 16.0}, "state' is 16.0; expected int."),
        ({"rank": True}, "rank' is True; expected int."),
        ({"taps": 0}, "taps is 0; it must be at least 1."),
        ({"norm": "rsm"}, "norm is 'rsm'. Did you mean 'rms'?"),
        (
            {"per_modality": {"parts": "in"}},
            "per_modality.parts' is 'in'; expected a list, each str.",
        ),
        (
            {"per_modality": {"parts": ["inn"], "modalities": ["text"]}},
            "per_modality.parts names 'inn'. Did you mean 'in'?",
        ),
        (
            {"per_modality": {"parts": ["in"], "modalities": {"text": 1}}},
            "per_modality.modalities.text' is 1; expected str.",
        ),
    ],
)
def test_a_wrong_value_of_mamba_is_refused_by_its_key(keys: dict[str, Any], said: str) -> None:
    assert error("mamba", **keys) == said


@pytest.mark.parametrize("key", ["num_heads", "mlp_dim"])
def test_a_size_that_is_missing_is_named(key: str) -> None:
    keys = {k: v for k, v in SIZES.items() if k != key}
    with pytest.raises(UserError) as raised:
        Trunk([GroupConfig(1, ({"name": "transformer", **keys},))], 4)
    assert str(raised.value) == f"Config key 'model.layers[0].blocks[0].{key}' is missing (int)."


@pytest.mark.parametrize("wrong", [TypeError, ValueError, UserError])
def test_an_error_inside_a_layer_keeps_its_type_and_trace(
    monkeypatch: pytest.MonkeyPatch, wrong: type[Exception]
) -> None:
    def failing(*_: Any) -> None:
        raise wrong("inside")

    toyrun.block()
    cls = configs.resolve("blocks", "toy", "here")
    monkeypatch.setattr(cls, "build", lambda self, width: failing(width))
    with pytest.raises(wrong, match="inside") as raised:
        built("toy")
    cause = raised.value.__cause__ or raised.value
    assert type(cause) is wrong and str(cause) == "inside"
    assert traceback.extract_tb(cause.__traceback__)[-1].name == "failing"


def test_a_block_that_is_no_dataclass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old(nnx.Module):
        pass

    toyrun.block()
    module = __import__("mmjax.blocks.toy", fromlist=["Toy"])
    monkeypatch.setattr(module, "Toy", Old)
    with pytest.raises(
        UserError, match=r"blocks\[1\]\.name: 'toy' in mmjax/blocks is no dataclass"
    ):
        built("toy")


def test_a_mistake_is_found_when_the_config_is_checked() -> None:
    pattern = [{"name": "transformer", **SIZES, "attention_impl": "splsh"}]
    with pytest.raises(
        UserError, match=r"^model\.layers\[0\]\.blocks\[0\]\.attention_impl is 'splsh'"
    ):
        make_experiment(toyrun.block(f"model.layers={[{'repeat': 1, 'blocks': pattern}]}"))
