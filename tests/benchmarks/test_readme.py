"""The table of docs/results/speed.md is that of the results."""

from __future__ import annotations

import pytest

from benchmarks import readme
from mmjax.core.errors import UserError


def case(name: str, kind: str = "cpu", wanted: str = "below 1") -> dict[str, object]:
    return {
        "case": name, "command": f"run {name}",
        "environment": {"device_kind": kind, "processor": "X", "cores": 2},
        "quantities": [
            {"name": "a to b", "wanted": wanted, "median": 0.51234, "low": 0.4, "high": 0.6},
            {"name": "ms", "wanted": "", "median": 5.0, "low": 4.0, "high": 6.0},
        ],
    }  # fmt: skip


def test_the_page_is_up_to_date() -> None:
    assert readme.main(["--check"]) == 0, "run python -m benchmarks.readme"


def test_what_is_claimed_is_shown_by_device() -> None:
    made = readme.section([case("one", "H100"), case("two")])
    first, second = made.split("On ")[1:]
    assert first.startswith("X, 2 cores") and second.startswith("H100")
    assert "| two | a to b | 0.5123 | 0.4 to 0.6 | below 1 |" in first and "run two" in first
    assert "ms" not in made


def test_only_what_is_between_the_marks_changes() -> None:
    text = f"before\n{readme.MARKS[0]}\nold\n{readme.MARKS[1]}\nbehind\n"
    assert readme.replaced(text, "new") == text.replace("old", "new")
    with pytest.raises(UserError, match="no section"):
        readme.replaced("nothing", "new")
