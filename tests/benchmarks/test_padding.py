"""Check how many positions of the recipes of sequences hold no token."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.experiments.padding import measure
from mmjax.core import config as configs

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.usefixtures("emoji_dir")
@pytest.mark.parametrize(
    "setting", ["transfusion.py:small-alternating", "mot.py:small", "moma.py:small"]
)
def test_padding_of_the_small_recipes_on_the_emoji_captions(setting: str) -> None:
    """Below 5 % of the positions, and not because texts are cut."""
    for name, found in measure(configs.read_file(str(CONFIGS / setting)), rows=1024).items():
        assert found.share < 0.05 and found.cut < 0.005, (name, found)
        assert found.slots > 0.1


@pytest.mark.parametrize("setting", ["transfusion.py:7b-alternating", "mot.py:7b"])
def test_padding_of_the_published_sizes_at_captions_of_25_tokens(setting: str) -> None:
    """Slots for the longest caption waste 45 to 49 % of the positions, or nine tenths where it is text alone."""
    block = configs.read_file(str(CONFIGS / setting))
    for name, found in measure(block, tokens=25, rows=1024).items():
        assert found.share < 0.05 and found.cut < 0.001, (name, found)
        assert found.slots > 0.44
