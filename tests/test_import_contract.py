"""Packages import only from the layers below them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From the bottom up; packages and modules of one line may not import each other, unless they are the same package.
LAYERS = (
    ("core",),
    ("data", "monitor", "nn"),
    ("analysis", "blocks", "datasets", "modalities"),
    ("connectors",),
    ("convert", "model", "optim", "sources"),
    ("generation",),
    ("objectives",),
    ("task",),
    ("evaluators", "schedule"),
    ("engine",),
    ("run_config",),
    ("experiment",),
    ("loading", "plan", "training"),
    ("report",),
    ("dry_run",),
    ("average", "cli", "describe", "evaluate", "replay", "show", "tokenizer", "train"),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> Iterator[str]:
    """Yield the top packages or modules of mmjax that a file imports, `if TYPE_CHECKING` included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] == "mmjax"
        ):
            rest = node.module.split(".")[1:]
            yield from [rest[0]] if rest else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from [a.name.split(".")[1] for a in node.names if a.name.startswith("mmjax.")]


def violations(path: Path) -> list[str]:
    relative = path.relative_to(ROOT / "mmjax")
    own = relative.parts[0].removesuffix(".py")
    return [
        f"{relative}: {own} (level {LEVEL[own]}) imports {other} (level {LEVEL[other]})"
        for other in sorted({*imports(path)} - {own, "__version__"})
        if LEVEL[other] >= LEVEL[own]
    ]


FILES = sorted(
    p for p in (ROOT / "mmjax").rglob("*.py") if p.name != "__init__.py" or p.parent.name != "mmjax"
)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT / "mmjax")))
def test_no_module_imports_from_its_own_layer_or_above(path: Path) -> None:
    assert not violations(path)
