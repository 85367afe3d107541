"""Texts: ids, padding and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizer_files

from mmjax.core import config as configs
from mmjax.core import migrations
from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.data import tokenizer
from mmjax.data.tokenizer import EOS_ID, PAD_ID, TokenIds, Tokenizer
from mmjax.modalities.base import Input, asset_name
from mmjax.modalities.text import Text, TextInput
from mmjax.run_config import RunConfig

TEXTS = ["red apple", "green apple", "grinning face", "face with tears of joy"]
PIECES = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small tokenizer of a few texts."""
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.train(TEXTS, path / "small.model", vocab_size=PIECES)
    return path


@pytest.fixture
def text(folder: Path) -> Text:
    return Text(folder=str(folder), tokenizer="small.model", vocabulary=PIECES, max_positions=64)


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


@pytest.mark.parametrize("rows", [PIECES - 1, PIECES + 1, 2048])
def test_a_vocabulary_that_is_not_the_tokenizers(folder: Path, rows: int) -> None:
    """An error where the model is made, and where a text is read."""
    other = Text(folder=str(folder), tokenizer="small.model", vocabulary=rows)
    for use in (lambda: other.stem(4), lambda: row(other, "red apple")):
        with pytest.raises(UserError) as raised:
            use()
        for words in (f"vocabulary is {rows}; the tokenizer has {PIECES}", f"Set it to {PIECES}"):
            assert words in str(raised.value)


@pytest.mark.parametrize(
    ("multiple", "right", "wrong"),
    [(128, 384, PIECES), (100, PIECES, 400), (0, 2048, PIECES - 1), (512, 512, 1024)],
)
def test_a_table_padded_to_a_multiple(folder: Path, multiple: int, right: int, wrong: int) -> None:
    """A text gives the same ids; the pieces are still 300."""
    where = {"folder": str(folder), "tokenizer": "small.model", "pad_vocabulary_to": multiple}
    padded = Text(**where, vocabulary=right)
    plain = Text(folder=str(folder), tokenizer="small.model", vocabulary=PIECES)
    np.testing.assert_array_equal(row(padded, "red apple")[0], row(plain, "red apple")[0])
    assert padded.token_ids() == TokenIds(PIECES)
    assert Declaration(padded.stem(4)).specs["embedding"].shape == (right, 4)
    with pytest.raises(UserError, match="pad_vocabulary_to=0"):
        row(Text(**where, vocabulary=wrong), "red apple")


def test_padding_of_the_table_is_not_below_zero() -> None:
    with pytest.raises(UserError, match=r"pad_vocabulary_to is -1; expected 1 .* or 0"):
        Text(pad_vocabulary_to=-1)


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"No tokenizer model at .*none\.model.* mmjax tokenizer train"
    ):
        row(Text(folder=str(tmp_path), tokenizer="none.model"), "red apple")
    emoji = Text(folder=str(tmp_path), tokenizer="emoji/1.0.0/tokenizer.model")
    with pytest.raises(UserError, match=r"mmjax build emoji"):
        row(emoji, "red apple")


def test_without_a_tokenizer_there_is_a_model_but_no_text() -> None:
    """As plans and tables of parameters need it."""
    none = Text(vocabulary=32_100)
    assert Declaration(none.stem(4)).specs["embedding"].shape == (32_100, 4)
    assert none.arrays(TextInput(length=7))["ids"].shape == (7,)
    words = r"tokenizer is not set.* of 32100 pieces.*--size=32100"
    for use in (lambda: row(none, "red"), lambda: none.words(np.arange(3)), none.files):
        with pytest.raises(UserError, match=words):
            use()


def test_an_older_config_keeps_its_tokenizer_and_its_larger_table() -> None:
    old = {
        "modalities": {"words": {"name": "text", "vocabulary": 4096}, "image": {"name": "image"}}
    }
    assert migrations.upgrade(old, 1)["modalities"]["words"] == {
        "name": "text", "vocabulary": 4096, "pad_vocabulary_to": 0, "tokenizer": "emoji/1.0.0/tokenizer.model",
    }  # fmt: skip
    assert migrations.upgrade(old, 2) == old
    assert "tokenizer" not in migrations.upgrade(old, 1)["modalities"]["image"]
    now = {"modalities": {"words": {"name": "text", "vocabulary": 4096}}}
    changed = configs.compare(migrations.upgrade(now, 1), now, RunConfig)
    assert {d.key.rpartition(".")[2]: d.kind for d in changed} == {
        "tokenizer": "structural", "pad_vocabulary_to": "free",
    }  # fmt: skip


def test_a_tokenizer_of_another_kind(tmp_path: Path) -> None:
    """T5's: 0 pads and begins, 1 ends; the stem has these ids."""
    size = Tokenizer(tokenizer_files.t5(tmp_path / "t5.model")).vocab_size
    text = Text(folder=str(tmp_path), tokenizer="t5.model", vocabulary=size, max_positions=64)
    stem: Any = text.stem(4)
    assert stem.token_ids == text.token_ids() == TokenIds(size, pad=0, begin=0, end=1)
    pieces = tokenizer_files.by_the_library(tmp_path / "t5.model", "red apple")
    assert row(text, "red apple", 32)[0].tolist() == [*pieces, 1, *[0] * (31 - len(pieces))]
    assert text.words(np.array([*pieces, 1, 5, 5])) == "red apple"
    ended = Text(folder=str(tmp_path), tokenizer="t5.model", vocabulary=size, end="▁a")
    assert ended.token_ids().end == Tokenizer(tmp_path / "t5.model").subwords.id_of("▁a")


def test_a_tokenizer_that_was_trained_again_is_read_again(tmp_path: Path) -> None:
    tokenizer.train(TEXTS, tmp_path / "a.model", vocab_size=PIECES)
    text = Text(folder=str(tmp_path), tokenizer="a.model", vocabulary=PIECES)
    before, _ = row(text, "face with tears")
    tokenizer.train([*TEXTS, "tears " * 50], tmp_path / "a.model", vocab_size=PIECES)
    text.stem(4)  # a model is made of it again
    after, _ = row(text, "face with tears")
    pieces = tokenizer_files.by_the_library(tmp_path / "a.model", "face with tears")
    assert after[: len(pieces)].tolist() == pieces != before[: len(pieces)].tolist()


@pytest.mark.parametrize("value", [b"caf\xe9", "\ud83e apple"])
def test_a_text_that_is_no_unicode(text: Text, value: Any) -> None:
    with pytest.raises(UserError, match="a text (is not UTF-8|holds half of a surrogate pair)"):
        row(text, value)


def test_the_file_that_a_run_must_keep(text: Text, folder: Path) -> None:
    assert {n: str(p) for n, p in text.files().items()} == {
        "small.model": str(folder / "small.model")
    }


def test_a_relative_path_lies_in_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMJAX_DATA_DIR", str(tmp_path))
    [(name, path)] = Text(tokenizer="emoji/1.0.0/tokenizer.model").files().items()
    assert name == "emoji/1.0.0/tokenizer.model" and str(path) == str(tmp_path / name)


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("my.model", "/data/my.model"),
        ("/there/my.model", "/there/my.model"),
        ("~/my.model", "/home/me/my.model"),
        ("gs://bucket/my.model", "gs://bucket/my.model"),
        ("../my.model", "/data/../my.model"),
    ],
)
def test_a_run_keeps_a_file_inside_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, where: str
) -> None:
    """And finds it there, or else where the config points."""
    monkeypatch.setenv("MMJAX_DATA_DIR", "/data")
    monkeypatch.setenv("HOME", "/home/me")
    [(name, found)] = Text(tokenizer=path).files().items()
    assert (name, str(found)) == (path, where)
    kept = tmp_path / asset_name(path)
    assert kept.resolve().is_relative_to(tmp_path.resolve()) and kept.name == "my.model"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.touch()
    [found] = Text(tokenizer=path, folder=str(tmp_path)).files().values()
    assert str(found) == str(kept)


def test_tokens_are_embeddings_plus_the_position_of_their_index() -> None:
    declaration = Declaration(Text(vocabulary=16, max_positions=8).stem(5))
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
    spec = Declaration(Text(vocabulary=16, max_positions=8).stem(5)).specs["embedding"]
    assert spec.shape == (16, 5) and spec.axes == ("vocabulary", "embed") and not spec.decay
