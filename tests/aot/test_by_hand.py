"""FLOPs and bytes read from what the TPU's compiler made, against counts by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmjax.plan import hlo
from mmjax.plan.cost import DCN, ICI, Cost, cost
from mmjax.plan.groups import Layout
from mmjax.plan.topology import environment

N, BYTES = 512, 4 * 512 * 512  # of each matrix; eight devices, two by four


@pytest.fixture(scope="module")
def costs(
    tmp_path_factory: pytest.TempPathFactory, environment_of: Callable[..., dict[str, str]]
) -> dict[str, Cost]:
    """Return the costs of the programs of `by_hand.py`."""
    file = tmp_path_factory.mktemp("hlo") / "texts.json"
    words = [sys.executable, str(Path(__file__).with_name("by_hand.py")), str(file)]
    env = {**environment_of(1), **environment(), "PYTHONPATH": environment_of(1)["PYTHONPATH"]}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result = {}
    for name, text in json.loads(file.read_text()).items():
        slices = [0] * 4 + [1] * 4 if name == "slices" else [0] * 8
        layout = Layout({"data": 2, "tensor": 4}, slices)
        result[name] = cost(hlo.parse(text), layout, 1.0, 1.0)
    return result


def test_a_matrix_product_in_a_scan(costs: dict[str, Cost]) -> None:
    """Five times, on every device alike; each reads or writes three matrices at the most."""
    assert costs["scan"].flops == 5 * 2 * N**3
    assert not costs["scan"].wires and not costs["scan"].unknown
    assert costs["scan"].memory <= 5.5 * 4 * BYTES


def test_a_product_over_a_sharded_dimension(costs: dict[str, Cost]) -> None:
    """A quarter of the product on each device, then a sum over the four."""
    assert costs["contracted"].flops == 2 * N**3 / 4
    assert costs["contracted"].wires == {(ICI, "all-reduce", "tensor"): 2 * BYTES * 3 / 4}


def test_an_array_made_whole(costs: dict[str, Cost]) -> None:
    assert costs["gathered"].wires == {(ICI, "all-gather", "data"): BYTES / 2}


def test_a_sum_over_two_slices_crosses_the_data_centre(costs: dict[str, Cost]) -> None:
    assert costs["slices"].flops == 2 * N**3 / 2
    assert costs["slices"].wires == {(DCN, "all-reduce", "data"): BYTES}
