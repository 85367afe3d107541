"""Check what the process that compiles is given, and what it makes of a compiler that refuses."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import jax
import pytest

from mmjax.plan import case
from mmjax.plan.case import Specification
from mmjax.plan.topology import Topology

SPECIFICATION = Specification(
    {"steps": 3}, ["/folder"], "v5e", (4, 4), 2, ["one", "two/loss"], True, "/cache"
)


def test_a_specification_survives_its_way_through_json() -> None:
    read = Specification(**json.loads(SPECIFICATION.to_json()))
    assert read.topology == SPECIFICATION.topology == Topology("v5e", (4, 4), 2)
    assert json.loads(read.to_json()) == json.loads(SPECIFICATION.to_json())
    fields = {f.name for f in dataclasses.fields(Specification)}
    assert json.loads(SPECIFICATION.to_json()).keys() == fields


@pytest.mark.parametrize(
    ("words", "required"),
    [
        # As libtpu and XLA's GPU compiler print it.
        ("RESOURCE_EXHAUSTED: Ran out of memory. Used 20.5G of 15.75G hbm.", int(20.5 * 2**30)),
        ("RESOURCE_EXHAUSTED: The allocation (512.0M) exceeds the limit", 512 * 2**20),
        ("RESOURCE_EXHAUSTED: It needs (100) exceeds", 100),
        ("RESOURCE_EXHAUSTED: it does not state how much", 0),
    ],
)
def test_a_program_that_does_not_fit_states_what_it_needs(words: str, required: int) -> None:
    refused = case._refused(words)
    assert (refused["status"], refused["required_bytes"]) == ("out_of_memory", required)
    assert refused["message"] == words


def test_another_refusal_is_a_failure_with_the_compilers_words_on_one_line() -> None:
    refused = case._refused("INTERNAL: a kernel\n   is wrong" + 600 * "!")
    assert refused["status"] == "failed" and "required_bytes" not in refused
    assert refused["message"].startswith("INTERNAL: a kernel is wrong!")
    assert len(refused["message"]) == 500


def test_the_versions_are_those_that_decide_how_a_program_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def installed(package: str) -> str:
        if package == "libtpu":
            return "9.9"
        raise case.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(case.metadata, "version", installed)
    versions = case.versions()
    assert versions["jax"] == jax.__version__ and versions["libtpu"] == "9.9"
    assert set(versions) == {"jax", "jaxlib", "libtpu"}


def test_an_error_of_the_users_is_a_line_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[Any] = []
    monkeypatch.setattr(case, "_writer", lambda: lines.append)
    monkeypatch.setattr(case.sys, "stdin", io.StringIO(SPECIFICATION.to_json()))
    case.main()
    [line] = lines
    assert "/folder" in line["error"]
