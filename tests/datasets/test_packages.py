"""Installed packages that data sets read, found without importing them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mmjax.core.errors import UserError
from mmjax.datasets import packages
from mmjax.datasets.packages import PackageSource

PYTEST = PackageSource("pytest", "pytest", "the tests", "MIT", "its authors", extra="tests")


@pytest.fixture
def drawings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackageSource:
    """Return a package whose import would fail, with one file."""
    folder = tmp_path / "some_drawings"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    (folder / "svg").mkdir()
    (folder / "svg" / "1f600.svg").write_text("<svg/>")
    monkeypatch.syspath_prepend(tmp_path)
    return PackageSource("some-drawings", "some_drawings", "the drawings", "CC0", "someone")


def test_a_file_is_found_without_importing_its_package(drawings: PackageSource) -> None:
    assert drawings.path("svg", "1f600.svg").read_text() == "<svg/>"
    assert drawings.folder().name == "some_drawings" and "some_drawings" not in sys.modules


def test_a_file_that_another_version_lacks_names_the_version_to_install(
    drawings: PackageSource,
) -> None:
    with pytest.raises(UserError, match=r"some-drawings has no svg/1f601\.svg.*'mmjax\[data\]'"):
        drawings.path("svg", "1f601.svg")


def test_a_missing_package_is_named_with_its_extra() -> None:
    with pytest.raises(UserError, match=r"package no-such, which is not.*'mmjax\[noto\]'"):
        packages.folder("no_such_module", "no-such", "noto")


def test_a_module_that_is_one_file_is_no_package() -> None:
    with pytest.raises(UserError, match="which is not installed"):
        packages.folder("this", "this")


def test_the_first_package_that_is_missing_ends_a_check(drawings: PackageSource) -> None:
    packages.check([drawings, PYTEST], {"numpy": "numpy"})
    absent = PackageSource("absent-one", "absent_one", "nothing", "CC0", "no one")
    with pytest.raises(UserError, match="absent-one"):
        packages.check([drawings, absent], {"absent_two": "absent-two"})
    with pytest.raises(UserError, match="absent-two"):
        packages.check([drawings], {"absent_two": "absent-two"})


def test_facts_hold_licences_and_installed_versions() -> None:
    facts = packages.facts([PYTEST], {"PIL": "pillow", "numpy": "numpy"})
    assert list(facts["built_with"]) == ["numpy", "pillow"]
    assert facts["sources"] == [
        {
            "package": "pytest",
            "version": pytest.__version__,
            "gives": "the tests",
            "licence": "MIT",
            "attribution": "its authors",
        }
    ]


def test_licences_are_one_line(drawings: PackageSource) -> None:
    assert packages.licences([PYTEST, drawings]) == "the tests: MIT; the drawings: CC0"
