"""`python -m mmjax` is the command `mmjax`."""

from __future__ import annotations

import runpy

import pytest

from mmjax import cli


def test_python_m_mmjax_runs_the_command_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(cli, "main", lambda: calls.append("main"))
    runpy.run_module("mmjax", run_name="__main__")
    assert calls == ["main"]
    runpy.run_module("mmjax.__main__", run_name="imported")
    assert calls == ["main"]
