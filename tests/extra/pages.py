"""Pages of the manual: their blocks of code, and those that cannot run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?:<!-- (?:not run: (?P<reason>[^\n]+)|(?P<run>run)) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block of code of a page.

    Attributes:
      reason: why Python is not run; None if it is.
      is_run: whether shell is run, and not parsed alone.
    """

    page: Path
    line: int
    language: str
    code: str
    reason: str | None
    is_run: bool

    @property
    def place(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def name_of(page: Path) -> str:
    """Return a page's path from the root of the checkout."""
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page in order; what a block includes stands in it."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text[: match.start("code")].count("\n"),
            match["language"],
            match["code"],
            match["reason"],
            match["run"] is not None,
        )
        for match in FENCE.finditer(text)
    ]


def command_lines(block: Block) -> list[str]:
    """Return the commands of a block of shell, without comments; a backslash joins lines."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"\s+#.*$", "", line).strip() for line in lines) if line]
