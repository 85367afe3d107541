"""Every algorithm has a block of its own in the config, whose keys are its own."""

from __future__ import annotations

from typing import Any

import pytest
from directions import SPECS, draws, make_optimizer

from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.optim.algorithms.adamw import Adamw
from mmjax.optim.algorithms.base import Algorithm
from mmjax.optim.algorithms.muon import Muon
from mmjax.optim.config import OptimizerConfig

NAMES = ("adafactor", "adamw", "lion", "muon")


def build(block: Any) -> OptimizerConfig:
    return configs.build(OptimizerConfig, block, "config.optimizer")


def test_without_a_name_it_is_adamw_with_its_defaults() -> None:
    default = Adamw(b1=0.9, b2=0.999, eps=1e-8, moments_dtype="")
    assert build({}).algorithm == build({"algorithm": {}}).algorithm == default
    assert build({"algorithm": {"name": "adamw"}}).algorithm == default
    assert build({"algorithm": {"b2": 0.95}}).algorithm == Adamw(b2=0.95)
    assert build({"algorithm": {"name": "muon", "momentum": 0.9}}).algorithm == Muon(momentum=0.9)


def test_the_algorithms_are_the_files_of_the_package() -> None:
    assert set(NAMES) <= set(configs.names("algorithms"))
    for name in NAMES:
        algorithm = configs.component("algorithms", {"name": name}, "")
        assert isinstance(algorithm, Algorithm)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", NAMES)
def test_the_axes_of_a_state_are_as_many_as_its_own(name: str) -> None:
    """Each field of the state has a name for each of its axes, `layers` first where it is stacked."""
    algorithm = configs.component("algorithms", {"name": name}, "")
    optimizer = make_optimizer(algorithm)
    for parameter, state in optimizer.init(draws(0)).items():
        axes = optimizer.axes(parameter)
        assert {f: len(axes[f]) for f in axes} == {f: x.ndim for f, x in state.items()}
        assert all((a[:1] == ("layers",)) == bool(SPECS[parameter].stack) for a in axes.values())


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"algorithm": {"b3": 0.9}}, "Unknown config key 'config.optimizer.algorithm.b3'. Did you mean 'b2'?"),
        (
            {"algorithm": {"name": "muon", "momentun": 0.9}},
            "Unknown config key 'config.optimizer.algorithm.momentun'. Did you mean 'momentum'?",
        ),
        (
            {"algorithm": {"name": "lion", "eps": 1e-6}},
            "Unknown config key 'config.optimizer.algorithm.eps'. Known: b1, b2, moments_dtype, name.",
        ),
        (
            {"algorithm": {"nmae": "muon"}},
            "Unknown config key 'config.optimizer.algorithm.nmae'. Did you mean 'name'?",
        ),
        (
            {"algorithm": {"name": "adamx"}},
            "config.optimizer.algorithm.name: no 'adamx' in mmjax/optim/algorithms. Did you mean 'adamw'? "
            "(Modules of your own: --extra=DIR.)",
        ),
        (
            {"algorithm": {"moments_dtype": "float16"}},
            "config.optimizer.algorithm.moments_dtype is 'float16'. Did you mean 'bfloat16'?",
        ),
        (
            {"algorithm": {"name": "adafactor", "moments_dtype": "bfloat16"}},
            "Unknown config key 'config.optimizer.algorithm.moments_dtype'. Known: min_dim_to_factor, name.",
        ),
        ({"algorithm": "muon"}, "Config key 'config.optimizer.algorithm' is 'muon'; expected a block of keys."),
        # Where the keys were before they had a block.
        (
            {"name": "muon"},
            "Unknown config key 'config.optimizer.name'. Did you mean 'config.optimizer.algorithm.name'?",
        ),
        ({"b2": 0.9}, "Unknown config key 'config.optimizer.b2'. Did you mean 'config.optimizer.algorithm.b2'?"),
        (
            {"momentum": 0.9, "algorithm": {"name": "muon"}},
            "Unknown config key 'config.optimizer.momentum'. Did you mean 'config.optimizer.algorithm.momentum'?",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_block_is_refused_by_the_path_of_its_key(block: Any, said: str) -> None:
    with pytest.raises(UserError) as raised:
        build(block)
    assert str(raised.value) == said


@pytest.mark.parametrize(
    ("name", "key", "good", "bad"),
    [
        ("adafactor", "min_dim_to_factor", 1, 0),
        ("adamw", "b1", 0.0, 1.0),
        ("adamw", "b2", 0.0, 1.0),
        ("adamw", "eps", 1e-30, 0.0),
        ("lion", "b1", 0.0, 1.0),
        ("lion", "b2", 0.0, 1.0),
        ("muon", "b1", 0.0, 1.0),
        ("muon", "eps", 1e-30, 0.0),
        ("muon", "momentum", 0.0, 1.0),
    ],
)
def test_the_keys_of_each_have_bounds(name: str, key: str, good: float, bad: float) -> None:
    assert getattr(build({"algorithm": {"name": name, key: good}}).algorithm, key) == good
    with pytest.raises(UserError, match=rf"config\.optimizer\.algorithm\.{key} is {bad}; it must"):
        build({"algorithm": {"name": name, key: bad}})
