"""Texts: ids, padding and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.data import tokenizer
from mmjax.data.tokenizer import EOS_ID, PAD_ID
from mmjax.errors import UserError
from mmjax.modalities.text import Text, TextInput
from mmjax.modality import Input
from mmjax.parameters import Declaration

TEXTS = ["red apple", "green apple", "grinning face", "face with tears of joy"]
PIECES = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small tokenizer of a few texts."""
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.train(TEXTS, path / "small.model", vocab_size=PIECES)
    return path


@pytest.fixture
def text(folder: Path) -> Text:
    return Text(folder=str(folder), tokenizer="small.model", vocabulary=PIECES, buckets=64)


def row(text: Text, value: Any, length: int = 12) -> tuple[np.ndarray, np.ndarray]:
    given = Input("text", text, TextInput(length=length))
    arrays = given.preprocess({"caption": value}, None)
    assert list(arrays) == ["ids", "valid"]
    return arrays["ids"], arrays["valid"]


def test_pieces_then_the_end_then_padding(text: Text, folder: Path) -> None:
    ids, valid = row(text, "red apple")
    assert ids.dtype == np.int32 and valid.dtype == np.bool_
    count = int(valid.sum())
    assert 1 < count < 12 and np.all(valid[:count])
    assert ids[count - 1] == EOS_ID and np.all(ids[count:] == PAD_ID)
    own = tokenizer.Tokenizer(folder / "small.model")
    assert own.decode(ids) == text.words(ids) == "red apple"


def test_a_text_too_long_keeps_its_beginning_and_the_end_token(text: Text) -> None:
    whole, _ = row(text, "face with tears of joy", 64)
    ids, valid = row(text, "face with tears of joy", 4)
    np.testing.assert_array_equal(ids[:3], whole[:3])
    assert ids[3] == EOS_ID and valid.all()
    assert EOS_ID not in whole[:3]


def test_no_text_is_only_the_end(text: Text) -> None:
    ids, valid = row(text, "", 3)
    assert ids.tolist() == [EOS_ID, PAD_ID, PAD_ID] and valid.tolist() == [True, False, False]


def test_bytes_are_utf8_and_chance_changes_nothing(text: Text) -> None:
    np.testing.assert_array_equal(row(text, "Äpfel".encode())[0], row(text, "Äpfel")[0])
    chance = text.preprocess(TextInput(length=12), "red apple", np.random.default_rng(0))
    np.testing.assert_array_equal(chance["ids"], row(text, "red apple")[0])


@pytest.mark.parametrize("value", [3, None, [3], np.zeros(3)])
def test_what_is_no_text(text: Text, value: Any) -> None:
    with pytest.raises(UserError, match="a text is a string, found (int|NoneType|float64)"):
        row(text, value)


def test_a_length_over_the_position_buckets(text: Text) -> None:
    with pytest.raises(UserError, match="text length 65 is over the 64 position buckets"):
        text.arrays(TextInput(length=65))
    assert text.arrays(TextInput(length=64))["ids"].shape == (64,)


def test_a_tokenizer_with_more_pieces_than_the_vocabulary(folder: Path) -> None:
    small = Text(folder=str(folder), tokenizer="small.model", vocabulary=PIECES - 1)
    with pytest.raises(UserError, match=f"vocabulary is {PIECES - 1}; the tokenizer has {PIECES}"):
        row(small, "red apple")


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No tokenizer model at .*data.build"):
        row(Text(folder=str(tmp_path), tokenizer="none.model"), "red apple")


def test_the_file_that_a_run_must_keep(text: Text, folder: Path) -> None:
    assert {n: str(p) for n, p in text.files().items()} == {
        "small.model": str(folder / "small.model")
    }


def test_the_default_tokenizer_lies_in_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMJAX_DATA_DIR", str(tmp_path))
    [(name, path)] = Text().files().items()
    assert str(path) == str(tmp_path / name)


def test_tokens_are_embeddings_plus_the_position_of_their_index() -> None:
    declaration = Declaration(Text(vocabulary=16, buckets=8).stem(5))
    rng = np.random.default_rng(0)
    p = {n: rng.normal(size=s.shape).astype("f") for n, s in declaration.specs.items()}
    call = jax.jit(lambda p, arrays, dtype: declaration.merge(p, dtype)(arrays), static_argnums=2)
    for length in (3, 8):
        ids = rng.integers(0, 16, (2, length)).astype(np.int32)
        valid = rng.random((2, length)) < 0.5
        stream = call(p, {"ids": ids, "valid": valid}, None)
        # The same position at every length.
        place = p["positions/tables/token"][:length]
        spread = np.sqrt(place.var(axis=1, keepdims=True) + 1e-6)
        place = (place - place.mean(axis=1, keepdims=True)) / spread
        place = place * p["positions/norm/scale"] + p["positions/norm/bias"]
        np.testing.assert_allclose(stream.x_BSD, p["embedding"][ids] + place, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(stream.valid_BS, valid)
        assert stream.layout == (("text", length),)
    arrays = {"ids": ids, "valid": valid}
    narrow = jax.eval_shape(lambda: call(p, arrays, jnp.bfloat16))
    assert narrow.x_BSD.dtype == jnp.bfloat16


def test_the_table_is_a_vocabulary_and_does_not_decay() -> None:
    spec = Declaration(Text(vocabulary=16, buckets=8).stem(5)).specs["embedding"]
    assert spec.shape == (16, 5) and spec.axes == ("vocabulary", "embed") and not spec.decay
