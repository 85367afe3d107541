"""The console command calls the mains of the modules."""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mains import run

import mmjax
from mmjax import cli

ROOT = Path(__file__).resolve().parent.parent
NAMES = "train evaluate average describe show plan replay build convert report tokenizer".split()


def call(monkeypatch, *words: str):
    monkeypatch.setattr(sys, "argv", ["mmjax", *words])
    return run(lambda _: cli.main())


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_the_overview_has_a_line_for_every_command(monkeypatch, words):
    ended = call(monkeypatch, *words)
    assert (ended.status, ended.err) == (0, "")
    lines = [line.split(maxsplit=1) for line in ended.out.splitlines() if line.startswith("  ")]
    assert [name for name, _ in lines] == NAMES
    for name, line in lines:
        doc = importlib.import_module(cli.COMMANDS[name]).__doc__
        assert doc is not None and doc.startswith(f"{line}\n\n") and line.endswith((".", "?"))


def test_the_overview_loads_no_jax():
    code = "import sys; from mmjax import cli; cli.overview(); print({'jax', 'numpy', 'flax'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_the_version_is_printed_with_that_of_python(monkeypatch):
    ended = call(monkeypatch, "--version")
    version = ".".join(map(str, sys.version_info[:3]))
    assert ended.status == 0 and ended.out.startswith(
        f"mmjax {mmjax.__version__}, Python {version}, "
    )


def test_an_unknown_command_names_the_nearest(monkeypatch):
    ended = call(monkeypatch, "trian", "--workdir=x")
    assert ended.status == 2
    assert "No command 'trian'. Did you mean 'train'?" in ended.err
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize("command", NAMES)
def test_each_command_helps_in_one_style(monkeypatch, command):
    """Its name, its docstring, and every option with what it is for."""
    ended = call(monkeypatch, command, "--help")
    assert ended.status == 0 and ended.out.startswith(f"usage: mmjax {command} [-h]")
    doc = importlib.import_module(cli.COMMANDS[command]).__doc__
    assert doc is not None and doc.strip() in ended.out
    assert f"    mmjax {command} " in doc
    assert not re.search(r"python -m mmjax(?!\.plan\.case)", ended.out)


@pytest.mark.parametrize("command", NAMES)
def test_each_argument_says_what_it_is_for(monkeypatch, command):
    parsers = []
    take = argparse.ArgumentParser.parse_known_args

    def remember(self, *arguments, **more):
        parsers.append(self)
        return take(self, *arguments, **more)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", remember)
    call(monkeypatch, command, "--help")
    parser, *_ = parsers
    arguments = [a for a in parser._actions if not isinstance(a, argparse._SubParsersAction)]
    assert len(arguments) > 1 or command == "tokenizer"
    for argument in arguments:
        assert argument.help, argument
        assert argument.nargs == 0 or argument.metavar, (
            argument
        )  # not the option's name in capitals


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
