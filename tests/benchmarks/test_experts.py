"""The benchmark of experts: it times what it names."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from benchmarks import experts
from benchmarks._pairs import Effort


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"ROWS": 4, "LENGTH": 16, "WIDTH": 16, "HIDDEN": 64, "COUNT": 4}.items():
        monkeypatch.setattr(experts, name, size)
    monkeypatch.setitem(experts.ROUTERS, "soft", {"name": "soft", "slots_per_expert": 4})  # type: ignore[index]


def test_all_routers_are_timed_and_agree_with_products() -> None:
    found = {each.name: each for each in experts.measure(Effort({}, 3, 1))}
    for name in experts.ROUTERS:
        assert len(found[f"{name} to dense"].values) == 3
        assert (f"{name} to {name}, one-hot" in found) == (name != "soft")
    share = found["expert choice: FLOPs to dense"].median
    assert 1 < share < 1.05, "the router's products"


def test_other_outputs_are_not_timed() -> None:
    with pytest.raises(AssertionError):
        experts.assert_equal(np.ones(2), np.array([1.0, 1.1]))


def test_products_cost_what_gathers_do_not() -> None:
    x = np.zeros((4, 16, 16), np.float32)
    router = experts.ROUTERS["expert choice"]
    _, ours = experts._experts(x, router, 0)
    _, products = experts._experts(x, router, 0, by_products=True)
    # Masks of 64 tokens by 4 experts by 16 slots, times 16: to slots and back, and their gradients.
    assert products - ours >= 4 * 2 * 64 * 64 * 16
    assert jax.tree.leaves(experts._experts(x, router, 0)[0]())
