"""Hooks of MkDocs: a page's line `<!-- generated: NAME ARGUMENT ... -->` becomes what `GENERATORS` makes of it.

Nothing that is generated is committed: it is made from the code, the configs and the files of results when the manual
is built, and `tests/test_docs.py` makes all of it too.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from mmjax import cli  # noqa: E402
from mmjax.core import config as configs  # noqa: E402
from mmjax.core import describe  # noqa: E402
from mmjax.run_config import RunConfig  # noqa: E402
from mmjax.schedule.phase_specs import BUDGET  # noqa: E402

MEASURES, FOLDER = ROOT / "benchmarks" / "results", "results/measures"
MARK = re.compile(r"^<!-- generated: ([\w ./-]+?) -->$", re.MULTILINE)
COLUMNS = ("key", "type", "default", "bounds", "change", "meaning")
# The class of change of a component's keys where these state none: that of the place where it stands.
CHANGES = {"objectives": "schedule", "evaluators": "free"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page with what is generated in the place of its marks."""
    return MARK.sub(lambda match: generated(*match[1].split()), markdown)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of `benchmarks/results/`, under `results/measures/`."""
    from mkdocs.structure.files import File, InclusionLevel  # the tests of this file need no MkDocs

    for path in sorted(MEASURES.glob("*.svg")):
        files.append(File.generated(config, f"{FOLDER}/{path.name}", abs_src_path=str(path)))
    for name, text in measures().items():
        files.append(
            File.generated(
                config, f"{FOLDER}/{name}.md", content=text, inclusion=InclusionLevel.NOT_IN_NAV
            )
        )
    return files


def generated(name: str, *arguments: str) -> str:
    """Return what a mark stands for."""
    return GENERATORS[name](*arguments)


def table(columns: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    """Return a table in Markdown; a pipe within a cell is escaped."""
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join(f"| {' | '.join(cell(c) for c in line)} |" for line in lines)


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def include(path: str) -> str:
    """Return a Python file as a block of code."""
    return f"```python\n{(ROOT / path).read_text(encoding='utf-8')}```"


# --- configuration -----------------------------------------------------------------------------


def configuration() -> str:
    """Return every block of a config that no name chooses, from the top down."""
    return "\n\n".join(
        _block(path, cls, change) for path, cls, change in blocks("", RunConfig, "structural")
    )


def blocks(path: str, cls: type, change: str) -> Iterator[tuple[str, type, str]]:
    """Yield a block and those below it, each with its path and class of change."""
    yield path, cls, change
    for place, inner, inner_change in describe.nested(cls):
        below = inner_change if inner_change != "structural" else change
        yield from blocks(f"{path}.{place}".lstrip("."), inner, below)


def _block(path: str, cls: type, change: str) -> str:
    return _section(f"## `{path}`" if path else "## The whole config", cls, change)


def components(kind: str) -> str:
    """Return every component of a kind with its keys, and the blocks below it."""
    return "\n\n".join(_components(kind, CHANGES.get(kind, "structural")))


def _components(kind: str, change: str) -> Iterator[str]:
    for name in configs.names(kind):
        cls = configs.resolve(kind, name, kind)
        yield _section(f"### `{name}`", cls, change)
        if kind == "modalities":
            keys = key_table(describe.input_keys(cls))
            yield f"In a task, `tasks.NAME.inputs.NAME`:\n\n{keys}"
        for place, inner, _ in describe.nested(cls):
            yield _section(f"#### `{name}`: `{place}`", inner, change)


def _section(title: str, cls: type, change: str) -> str:
    return f"{title}\n\n{prose(describe.summary(cls))}\n\n{key_table(describe.keys(cls, change))}"


def rules() -> str:
    """Return the rules of the schedule."""
    summaries = {**describe.summaries("rules"), BUDGET: "As `shares`, of the time."}
    rows = ((f"`{name}`", prose(text)) for name, text in sorted(summaries.items()))
    return table(("rule", "what it does"), rows)


def key_table(keys: list[describe.Key]) -> str:
    """Return a table of keys."""
    if not keys:
        return "It has no keys."
    rows = (
        (f"`{k.name}`", k.type, code(k.default), k.bounds, k.change, prose(k.meaning)) for k in keys
    )
    return table(COLUMNS, rows)


def code(default: str) -> str:
    return default if default == describe.REQUIRED else f"`{default}`"


def prose(text: str) -> str:
    """Return words of a docstring in which Markdown sees no link, tag or emphasis outside of code."""
    parts = re.split(r"(`[^`]*`)", text)
    escaped = [p if p.startswith("`") else re.sub(r"([\[\]<>*_])", r"\\\1", p) for p in parts]
    return "".join(escaped)


# --- command line ------------------------------------------------------------------------------


def commands() -> str:
    """Return the commands with their summaries."""
    rows = (
        (f"[`mmjax {name}`](#mmjax-{name})", cli.summary(module))
        for name, module in cli.COMMANDS.items()
    )
    return table(("command", "what it does"), rows)


def help_of(name: str) -> str:
    """Return the help of a command, in lines of 100 columns."""
    out, words = io.StringIO(), ["mmjax", name, "--help"]
    with (
        mock.patch.object(sys, "argv", words),
        mock.patch.dict("os.environ", COLUMNS="100"),
        contextlib.redirect_stdout(out),
        contextlib.suppress(SystemExit),
    ):
        cli.main()
    return out.getvalue()


def helps() -> str:
    """Return the help of every command."""
    return "\n\n".join(f"## mmjax {name}\n\n```text\n{help_of(name)}```" for name in cli.COMMANDS)


# --- results -----------------------------------------------------------------------------------


def measures() -> dict[str, str]:
    """Return the pages of results by name, each with a title."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(MEASURES.glob("*.md"))}
    return {n: t if t.startswith("# ") else f"# {n}\n\n{t}" for n, t in texts.items()}


def measure_list() -> str:
    """Return links to the pages of results, as a list in a sentence."""
    return ", ".join(f"[{name}](measures/{name}.md)" for name in measures())


# --- systems -----------------------------------------------------------------------------------


def first(name: str) -> str:
    """Return the first line of a config's docstring."""
    return prose(docstring(name).partition("\n")[0])


def header(name: str) -> str:
    """Return a config's docstring without its first line, which is the page's own."""
    text = docstring(name).partition("\n")[2].strip("\n")
    return text


def docstring(name: str) -> str:
    path = ROOT / "configs" / f"{name}.py"
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def systems() -> str:
    """Return the table of systems, from the first lines of the configs, the plans and the commands."""
    names = [name for name in configs.shipped() if name != "quickstart"]
    return table(("system", "what it is", "small setting", "pod plans"), map(_system, names))


def _system(name: str) -> tuple[str, ...]:
    small = re.search(rf"mmjax train --config={name}:(\S*small\S*)", docstring(name))
    setting = f"`--config={name}:{small[1]}`" if small else ""
    return f"[`{name}`]({name}.md)", first(name), setting, str(len(list(_plans(name))))


def _plans(name: str) -> Iterator[Path]:
    return iter(sorted((ROOT / "configs" / "plans").glob(f"{name}-*.json")))


def plans(name: str) -> str:
    """Return the table of a system's committed plans."""
    if not list(_plans(name)):
        return "No plan is committed."
    rows = (_plan(path) for path in _plans(name))
    return table(
        ("setting", "topology", "programs", "fits", "fullest chip", "estimated hours"), rows
    )


def _plan(path: Path) -> tuple[str, ...]:
    plan = json.loads(path.read_text())
    setting, where = path.stem.partition("-")[2].partition("@")[::2]
    needed = max(p["bytes"]["needed"] / p["bytes"]["limit"] for p in plan["programs"])
    count, fits = len(plan["programs"]), "yes" if plan["fits"] else "no"
    return (
        f"`{setting}`",
        where.replace("-", ":", 1),
        str(count),
        fits,
        f"{needed:.0%}",
        f"{plan['hours']:.3g}",
    )


GENERATORS: dict[str, Callable[..., str]] = {
    "include": include,
    "configuration": configuration,
    "components": components,
    "rules": rules,
    "commands": commands,
    "helps": helps,
    "measures": measure_list,
    "first": first,
    "header": header,
    "systems": systems,
    "plans": plans,
}
