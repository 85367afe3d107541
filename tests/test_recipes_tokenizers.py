"""Check which tokenizer a recipe reads its texts by: small ones name theirs, large ones are given one."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipes import NAMES, block

from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.data.tokenizer import TokenIds
from mmjax.experiment import make_experiment
from mmjax.modalities.text import Text

EMOJI = "emoji/1.0.0/tokenizer.model"


def text_of(name: str) -> Text | None:
    found = block(name)["modalities"].get("text")
    result: Text | None = found and configs.component("modalities", found, "modalities.text")
    return result


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_has_the_tokenizer_of_its_data_or_asks_for_one(name: str) -> None:
    text = text_of(name)
    if text is None:
        assert name.startswith(("mbt:", "zorro:"))
    elif "small" not in name and not name.startswith("quickstart"):
        assert text.tokenizer == "" and text.vocabulary >= 32_000
        assert text.token_ids() == TokenIds(text.vocabulary)
        with pytest.raises(UserError, match=f"tokenizer is not set.* of {text.vocabulary} pieces"):
            text.files()
    else:
        assert (text.tokenizer, text.vocabulary) == (EMOJI, 2048)
    if text is not None:
        assert text.pad_vocabulary_to == 1


def test_a_large_recipe_with_the_small_ones_tokenizer_is_an_error(emoji_dir: Path) -> None:
    """It would train on 2,048 pieces, and leave the rest of its table as it began."""
    config = block("coca:2b")
    config["modalities"]["text"]["tokenizer"] = EMOJI
    with pytest.raises(UserError, match="vocabulary is 64000; the tokenizer has 2048 pieces"):
        make_experiment(config)
