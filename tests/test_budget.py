"""The summary of where the time of the tests went."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from budget import package_of, seconds_of_tests, summary

EXTRA = Path(__file__).resolve().parent / "extra"
SECONDS = {
    "tests/nn/test_a.py::test_one": 1.0,
    "tests/nn/test_a.py::test_two[x::y]": 7.0,
    "tests/nn/routers/test_b.py::test_one": 5.0,
    "tests/test_c.py::test_one": 6.0,
    "tests/test_c.py::test_two": 9.25,
}


def test_it_lists_tests_above_the_budget_then_files_then_packages() -> None:
    assert list(summary(SECONDS, 5.0)) == [
        "Tests above the budget of 5 s: 3 of 5",
        "  tests/test_c.py",
        "       9.2  test_two",
        "       6.0  test_one",
        "  tests/nn/test_a.py",
        "       7.0  test_two[x::y]",
        "Slowest files: 3 of 3",
        "      15.2  tests/test_c.py",
        "       8.0  tests/nn/test_a.py",
        "       5.0  tests/nn/routers/test_b.py",
        "Packages: 28.2 s in all",
        "      15.2  tests",
        "      13.0  nn",
    ]


def test_ten_files_are_listed_at_most() -> None:
    lines = list(summary({f"tests/test_{i}.py::test_it": 1.0 + i for i in range(12)}, 5.0))
    at = lines.index("Slowest files: 10 of 12")
    files = [line.split()[1] for line in lines[at + 1 : at + 11]]
    assert files == [f"tests/test_{i}.py" for i in range(11, 1, -1)]


def test_setup_call_and_teardown_add_up() -> None:
    phases = [("setup", 0.5), ("call", 1.0), ("teardown", 0.25), ("collect", 9.0)]
    reports = [SimpleNamespace(nodeid="a::t", when=w, duration=s) for w, s in phases]
    warning = SimpleNamespace(nodeid="a::t")  # has neither
    assert seconds_of_tests([*reports, warning]) == {"a::t": 1.75}


@pytest.mark.parametrize(
    ("test", "package"),
    [("tests/nn/test_a.py::t", "nn"), ("tests/test_a.py::t", "tests"), ("test_a.py::t", ".")],
)
def test_a_package_is_a_folder_below_tests(test: str, package: str) -> None:
    assert package_of(test) == package


def test_it_is_printed_by_several_processes_too_and_fails_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_slow.py").write_text(
        "import time, pytest\n"
        "@pytest.fixture\n"
        "def slow(): time.sleep(0.3)\n"
        "def test_by_its_fixture(slow): pass\n"
        "def test_itself(): time.sleep(0.3)\n"
        "def test_quick(): pass\n"
    )
    words = [
        "-q",
        "-p",
        "xdist",
        "-n",
        "2",
        "-p",
        "budget",
        "--budget=0.25",
        "-p",
        "no:cacheprovider",
    ]
    env = {**os.environ, "PYTHONPATH": str(EXTRA), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, str(tmp_path)], cwd=tmp_path, capture_output=True,
        text=True, timeout=300, env=env, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    printed = done.stdout
    assert "Tests above the budget of 0.25 s: 2 of 3" in printed
    listed = printed[printed.index("Tests above") : printed.index("Slowest files")]
    assert "test_by_its_fixture" in listed and "test_itself" in listed
    assert "test_quick" not in listed and "  test_slow.py" in printed


def test_this_suite_prints_it(request: pytest.FixtureRequest) -> None:
    """Its hooks are those of `tests/conftest.py`."""
    assert request.config.getoption("--budget") > 0
