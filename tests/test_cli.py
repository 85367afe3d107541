"""The console command calls the mains of the modules."""

from __future__ import annotations

import importlib
import sys

import pytest
from mains import run

from mmjax import cli


def call(monkeypatch, *words: str):
    monkeypatch.setattr(sys, "argv", ["mmjax", *words])
    return run(lambda _: cli.main())


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_usage_names_every_command(monkeypatch, words):
    ended = call(monkeypatch, *words)
    assert (ended.status, ended.err) == (0, "")
    assert all(command in ended.out for command in cli.COMMANDS)


def test_an_unknown_command_names_the_nearest(monkeypatch):
    ended = call(monkeypatch, "trian", "--workdir=x")
    assert ended.status == 2
    assert "no command 'trian'. Did you mean 'train'?" in ended.err
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_each_command_is_a_module_with_a_main_and_help(monkeypatch, command):
    assert callable(importlib.import_module(cli.COMMANDS[command]).main)
    ended = call(monkeypatch, command, "--help")
    assert ended.status == 0 and "usage:" in ended.out and "--help" in ended.out


def test_arguments_and_status_pass_through(monkeypatch):
    seen = []

    def main() -> int:
        seen.append(list(sys.argv))
        return 3

    monkeypatch.setattr(importlib.import_module("mmjax.show"), "main", main)
    assert call(monkeypatch, "show", "runs/x", "--digest").status == 3
    assert seen == [["mmjax show", "runs/x", "--digest"]]


def test_a_command_refuses_as_its_module_does(monkeypatch, tmp_path):
    ended = call(monkeypatch, "show", str(tmp_path / "nothing"))
    assert ended.status == 2
    assert ended.err.startswith("mmjax: error: No checkpoint in")
