"""Fixtures of these tests."""

from __future__ import annotations

from typing import Any

import pytest
from conversions import (
    COUNT,
)
from etils import epath

from mmjax.sources.array_record import ArrayRecord


@pytest.fixture(scope="module")
def drawings(emoji_dir: epath.Path) -> list[dict[str, Any]]:
    """Return real drawings (PNG) with their captions and groups."""
    source = ArrayRecord(str(emoji_dir / "emoji" / "1.0.0"), "emoji-train*").open()
    return [dict(source[i * 40]) for i in range(COUNT)]
