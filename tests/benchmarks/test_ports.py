"""Layers against PyTorch's ports, of which nothing is installed here: our own half, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import ports
from benchmarks._pairs import Effort
from benchmarks.ports import OURS, Arrays, Call

SMALL = {
    name: replace(case, batch=2, width=64, layers=1, layout=tuple((n, 4) for n, _ in case.layout))
    for name, case in ports.CASES.items()
}


def _ours(name: str, case: ports.Case, seed: int) -> Call:
    shape = (case.batch, case.tokens, case.width)
    x, weights = (np.random.default_rng(i).normal(size=shape).astype("f") for i in range(2))
    declaration, parameters = ports.declared(case, seed)
    return ports.ours(case, declaration, parameters, x, weights, lambda p, case: p)


def test_nothing_where_no_port_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "find_spec", lambda name: None)
    assert ports.measure(Effort({}, 3, 1)) == []


def test_each_is_timed_beside_its_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours stand in for the ports; gradients reach every parameter."""

    def both(name: str, case: ports.Case, seed: int) -> dict[str, Call]:
        made = _ours(name, case, seed)
        assert all(np.any(gradient) for gradient in made()[1].values())
        return {OURS: made, case.package: made}

    monkeypatch.setattr(ports, "CASES", SMALL)
    monkeypatch.setattr(ports, "find_spec", lambda name: name)
    monkeypatch.setattr(ports, "both", both)
    found = {each.name: each for each in ports.measure(Effort({}, 3, 1))}
    for name, case in SMALL.items():
        assert len(found[f"{name}: ours to {case.package}"].values) == 3


@pytest.mark.parametrize(
    "loss, factor, said", [(1.1, 1, "Not equal"), (1.0, 1.1, "gradient of kernel")]
)
def test_what_differs_is_refused(loss: float, factor: float, said: str) -> None:
    one: Arrays = {"kernel": np.ones(4)}
    other: Arrays = {"kernel": factor * np.ones(4)}
    case = ports.CASES["zorro"]
    ports.assert_equal({OURS: (1.0, one), case.package: (1.0, one)}, case)
    with pytest.raises(AssertionError, match=said):
        ports.assert_equal({OURS: (1.0, one), case.package: (loss, other)}, case)
