"""The manual and the README are true: their code runs, their commands parse, and what they name exists.

Python blocks of a page, and shell behind `<!-- run -->`, run in order in a folder of their own, whose `runs/quickstart`
is a finished run. In the guides `config` is the quickstart's; what a page makes of it must be a valid config. A block
behind `<!-- not run: REASON -->` is not run.
"""

from __future__ import annotations

import argparse
import ast
import configparser
import doctest
import importlib
import importlib.util
import re
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from mains import run
from ml_collections import ConfigDict
from pages import PAGES, ROOT, Block, blocks, command_lines, name_of

import mmjax
from mmjax import cli
from mmjax.core import config as configs
from mmjax.core import describe
from mmjax.core.errors import UserError
from mmjax.experiment import make_experiment
from mmjax.run_config import RunConfig

NOT_RUN = {
    "docs/extending.md": 1,
    "docs/guides/generation.md": 2,
}
INCLUDE = re.compile(r"^<!-- generated: include (.*) -->$", re.MULTILINE)


def run_of(page: Path) -> list[Block]:
    """Return the blocks of a page that are run."""
    return [b for b in blocks(page) if b.is_run or (b.language == "python" and b.reason is None)]


@pytest.fixture(scope="module")
def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("manual_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- Python ------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [p for p in PAGES if run_of(p)], ids=name_of)
def test_the_code_of_a_page_runs(
    page: Path, request: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    if any("mmjax.load(" in b.code for b in run_of(page)):
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "quickstart").symlink_to(str(request.getfixturevalue("tiny_run")))
    monkeypatch.chdir(tmp_path)
    before = configs.read_file("quickstart")
    names: dict[str, Any] = {"config": ConfigDict(before)}
    for block in run_of(page):
        if block.is_run:
            execute(block)
        else:
            exec(compile(block.code, block.place, "exec"), names)
    changed = names["config"].to_dict()
    if changed != before:
        make_experiment(configs.plain(changed, "config"))
    if "get_config" in names and name_of(page) != "docs/guides/index.md":
        make_experiment(configs.plain(names["get_config"](), "config"))


def execute(block: Block) -> None:
    """Run the commands of a block, of `mmjax` alone, in this process."""
    for line in command_lines(block):
        words = shlex.split(line)
        assert words[0] == "mmjax" and not any(w.startswith("--extra") for w in words), block.place
        with mock.patch.object(sys, "argv", words):
            ended = run(lambda _: cli._run())
        assert (ended.status, ended.err) == (0, ""), block.place


def test_blocks_that_are_not_run_are_counted() -> None:
    not_run = Counter(name_of(b.page) for page in PAGES for b in blocks(page) if b.reason)
    assert not_run == NOT_RUN
    assert {
        b.place for page in PAGES for b in blocks(page) if b.is_run and b.language != "bash"
    } == set()


def test_the_examples_are_shown_whole(hooks: Any) -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    files = INCLUDE.findall(page)
    examples = (ROOT / "docs" / "examples").rglob("*.py")
    assert sorted(files) == sorted(str(path.relative_to(ROOT)) for path in examples)
    shown = hooks.on_page_markdown(page)
    assert all((ROOT / file).read_text() in shown for file in files)


# --- commands ----------------------------------------------------------------------------------


class Parsed(Exception):
    """The command line is one that the command takes."""


def parse(words: list[str]) -> None:
    """Parse a command line of `mmjax` by the command's own parser, and run nothing.

    Raises:
      Parsed: it parses.
      SystemExit: it does not.
    """
    take = argparse.ArgumentParser.parse_known_args

    def stop(self: argparse.ArgumentParser, *arguments: Any, **options: Any) -> Any:
        _, unknown = take(self, *arguments, **options)
        if unknown:
            raise SystemExit(f"unknown: {unknown}")
        raise Parsed

    patches = (
        mock.patch.object(sys, "argv", words),
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop),
        mock.patch.object(configs, "add_folder"),
    )
    with patches[0], patches[1], patches[2]:
        cli._run()


def check_config(words: list[str]) -> None:
    """Check that a config that ships has its setting, and that overridden keys are keys."""
    chosen = [w.removeprefix("--config=") for w in words if w.startswith("--config=")]
    for name in chosen:
        path, _, setting = name.partition(":")
        if (ROOT / path).is_file() and "/" in path:
            configs.read_file(f"{ROOT / path}{':' if setting else ''}{setting}")
        elif "/" not in path and not path.endswith(".py"):
            configs.read_file(name)
    for word in words:
        if word.startswith("--config."):
            key = word.removeprefix("--config.").partition("=")[0]
            assert describe.find(key, RunConfig).keys, key


def shell_blocks() -> list[Block]:
    return [b for page in PAGES for b in blocks(page) if b.language == "bash" and b.reason is None]


def commands(first: str) -> list[tuple[str, list[str]]]:
    """Return (place, words) of the command lines that begin with a word; assignments before it are dropped."""
    lines = []
    for block in shell_blocks():
        for line in command_lines(block):
            words = shlex.split(line)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                del words[0]
            if words[0] == first:
                lines.append((block.place, words))
    return lines


@pytest.mark.parametrize(("place", "words"), commands("mmjax"), ids=lambda x: str(x)[:60])
def test_a_command_line_of_mmjax_parses(place: str, words: list[str]) -> None:
    assert words[1] in cli.COMMANDS, place
    with pytest.raises(Parsed):
        parse(words)
    if words[1] in ("train", "plan", "show"):
        check_config(words)


@pytest.mark.parametrize(
    "line",
    ["mmjax train --config=quickstart --workdr=x", "mmjax train --config=quickstart"],
)
def test_a_wrong_command_line_does_not_parse(line: str) -> None:
    with pytest.raises(SystemExit):
        parse(line.split())
    with pytest.raises(UserError, match="no key 'stps'"):
        check_config(["mmjax", "train", "--config.stps=3"])


def test_other_commands_name_what_exists() -> None:
    for place, words in commands("bash"):
        assert (ROOT / words[1]).is_file(), place
        check_config(words)
    for place, words in commands("python"):
        if words[1] == "-m":
            assert importlib.util.find_spec(words[2]) is not None, place
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = set(setup["options.extras_require"])
    for place, words in commands("pip"):
        for word in words:
            named = re.match(r"(?:mmjax|\.)\[([\w,-]+)\]", word)
            assert named is None or set(named[1].split(",")) <= extras, place
    known = {"mmjax", "bash", "python", "pip", "source", "jupyter", "pre-commit"}
    firsts = {shlex.split(line)[0] for b in shell_blocks() for line in command_lines(b)}
    assert {word for word in firsts if "=" not in word} <= known


# --- what is written ---------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 8192


def test_files_that_pages_name_exist() -> None:
    named = re.compile(
        r"(?<![\w/~])((?:mmjax|tests|configs|docs|launch|benchmarks|notebooks)/[\w/.-]*\w)"
    )
    missing = []
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for code in re.findall(r"`([^`\n]+)`", text):
            for path in named.findall(code):
                if "NAME" not in path and not list(ROOT.glob(f"{path}*")):
                    missing.append((name_of(page), path))
    assert not missing


def test_links_of_the_readme_lead_to_files() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert link.startswith("https://") or (ROOT / link).is_file(), (page.name, link)


def test_every_page_is_in_the_navigation_and_every_system_has_one() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = set(re.findall(r"[\w/]+\.md", navigation))
    assert listed == {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}
    systems = {name for name in configs.shipped() if name != "quickstart"}
    assert systems == {p.stem for p in (ROOT / "docs" / "systems").glob("*.md")} - {"index"}


def test_version_and_changelog_and_citation_agree() -> None:
    assert f"\n## [{mmjax.__version__}] - " in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {mmjax.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def imports(source: str) -> set[str]:
    """Return the dotted names that Python imports from mmjax; of a module, what is used of it."""
    tree, names = ast.parse(source), set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("mmjax"):
            continue
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            used = {
                f"{name}.{n.attr}"
                for n in ast.walk(tree)
                if isinstance(n, ast.Attribute)
                and isinstance(n.value, ast.Name)
                and n.value.id == (alias.asname or alias.name)
            }
            names |= used if is_module(name) else {name}
    return names


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # what lies above it is no package
        return False


def test_imports_of_modules_and_of_names_are_collected() -> None:
    source = "import numpy\nfrom mmjax.task import Task\nfrom mmjax.core import config as c\nc.flat({})\n"
    assert imports(source) == {"mmjax.task.Task", "mmjax.core.config.flat"}


def test_what_the_manual_imports_or_names_is_on_the_page_of_the_python_interface() -> None:
    page = (ROOT / "docs" / "reference" / "python.md").read_text()
    documented = set(re.findall(r"^::: (\S+)$", page, re.MULTILINE))
    examples = [p.read_text() for p in (ROOT / "docs" / "examples").rglob("*.py")]
    code = [b.code for p in PAGES for b in blocks(p) if b.language == "python"]
    needed = set().union(*map(imports, examples + code))
    for manual in PAGES:
        named = re.findall(r"`(mmjax(?:\.\w+)+)(?:\(\))?`", manual.read_text())
        needed |= {name for name in named if not is_module(name)} - {"mmjax.load"}
    assert {"mmjax.task.Task", "mmjax.objectives.base.row_keys"} < needed
    assert sorted(needed - documented) == []


# --- what is generated -------------------------------------------------------------------------


def test_the_reference_has_every_key_of_a_run(hooks: Any) -> None:
    page = hooks.on_page_markdown((ROOT / "docs/reference/configuration.md").read_text())
    assert "<!-- generated" not in page
    expected = {  # literals: class of change and default as README and code have them
        "| `steps` | int | required | at least 1 | free |",
        "| `learning_rate` | float | `0.001` | at least 0 | schedule |",
        "| `num_heads` | int | required | at least 1 | structural |",
        '| `positive_key` | str | `""` |  | schedule |',
    }
    assert all(row in page for row in expected)
    for heading in (
        "## `optimizer.rules[i]`",
        "### `transfusion`",
        "#### `transformer`: `experts`",
    ):
        assert f"\n{heading}\n" in page
    components = [name for kind in configs.KINDS for name in configs.names(kind)]
    assert all(f"`{name}`" in page for name in components)


EXAMPLES = sorted(p for p in (ROOT / "mmjax").rglob("*.py") if ">>> " in p.read_text())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_the_examples_of_docstrings_are_true(path: Path) -> None:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted and not results.failed


@pytest.fixture
def no_extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide what earlier tests of this process added by `--extra`."""
    for package in configs.KINDS.values():
        module = importlib.import_module(package)
        monkeypatch.setattr(module, "__path__", list(module.__path__)[:1])


@pytest.mark.usefixtures("no_extensions")
def test_every_key_of_the_reference_has_a_meaning(hooks: Any) -> None:
    page = hooks.on_page_markdown((ROOT / "docs/reference/configuration.md").read_text())
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 200
    assert [row[0].strip() for row in rows if not row[-1].strip()] == []


def test_the_command_line_reference_has_the_help_of_every_command(hooks: Any) -> None:
    page = hooks.on_page_markdown((ROOT / "docs/reference/command_line.md").read_text())
    for name in cli.COMMANDS:
        assert f"\nusage: mmjax {name} [-h]" in page


@pytest.mark.parametrize("name", ["imp", "zorro"])
def test_a_systems_page_shows_its_header_and_plans(hooks: Any, name: str) -> None:
    page = hooks.on_page_markdown((ROOT / f"docs/systems/{name}.md").read_text())
    assert f"mmjax train --config={name}:b" in page and "What differs" in page
    plans = list((ROOT / "configs" / "plans").glob(f"{name}-*.json"))
    assert page.count("| v5") == len(plans) > 0
    assert f"| [`{name}`]({name}.md) |" in hooks.systems()


def test_every_page_of_results_is_in_the_manual_under_a_title(hooks: Any) -> None:
    pages = hooks.measures()
    assert {"vit", "imp", "soak"} <= pages.keys() and len(pages) == len(
        list((ROOT / "benchmarks" / "results").glob("*.md"))
    )
    assert all(text.startswith("# ") for text in pages.values())
    assert "[vit](measures/vit.md)" in hooks.on_page_markdown("<!-- generated: measures -->")


def test_a_pipe_and_brackets_in_a_docstring_stay_text(hooks: Any) -> None:
    assert hooks.table(("a",), iter([("x|y",)])) == "| a |\n| --- |\n| x\\|y |"
    assert hooks.prose("ids [B] of `[S]` <x>") == "ids \\[B\\] of `[S]` \\<x\\>"
