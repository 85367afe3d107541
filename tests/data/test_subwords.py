"""Tokenizers that published models come with: their numbers, their pieces, long texts, and what is refused."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizer_files as files
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.core.errors import UserError
from mmjax.data.tokenizer import TokenIds, Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tokenizer of every kind."""
    path = tmp_path_factory.mktemp("kinds")
    for name, make in files.KINDS.items():
        make(path / name)
    return path


@pytest.fixture(scope="module", params=list(files.KINDS))
def file(request: pytest.FixtureRequest, folder: Path) -> Path:
    return folder / request.param


@pytest.mark.parametrize(
    ("name", "size", "pad", "begin", "end"),
    [
        ("t5.model", 32, 0, 0, 1),  # its decoder starts with padding
        ("llama2.model", 360, 2, 1, 2),
        ("llama3.json", 310, 309, 308, 309),
        ("qwen.json", 311, 308, 308, 308),
        ("clip.json", 559, 558, 557, 558),
        ("unigram.json", 32, 0, 0, 1),
    ],
)
def test_special_tokens_have_the_numbers_of_the_file(
    folder: Path, name: str, size: int, pad: int, begin: int, end: int
) -> None:
    found = Tokenizer(folder / name)
    assert found.token_ids == TokenIds(size, pad, begin, end)
    assert found.vocab_size == size


@pytest.mark.parametrize("text", ["A red apple, and 3 more!", "a  Green\nbicycle 1234", "", " "])
def test_a_row_is_the_pieces_of_the_library_then_end_then_padding(file: Path, text: str) -> None:
    tokenizer, pieces = Tokenizer(file), files.by_the_library(file, text)
    ids, valid = tokenizer.encode(text, len(pieces) + 4)
    special = tokenizer.token_ids
    assert ids.tolist() == [*pieces, special.end, *[special.pad] * 3]
    assert valid.tolist() == [True] * (len(pieces) + 1) + [False] * 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("t5.model", "A red train"),
        ("llama2.model", "A  red train's 1234 🦒"),
        ("llama3.json", "A  red train's 1234 🦒"),
        ("qwen.json", "A  red train's 1234 🦒"),
        ("clip.json", "a red train 's 1 2 3 4 🦒"),
        ("unigram.json", "A red train"),
    ],
)
def test_decoding_gives_the_text_back_as_the_kind_normalises_it(
    folder: Path, name: str, expected: str
) -> None:
    tokenizer = Tokenizer(folder / name)
    text = "A red train" if expected == "A red train" else "A  red train's 1234 🦒"
    assert tokenizer.decode(tokenizer.encode(text, 64).ids) == expected


def test_pieces_of_clip_by_hand(tmp_path: Path) -> None:
    """Lower case; merges in the order of the file; `</w>` closes a word."""
    pieces = ["l", "o", "w", "w</w>", "e", "r</w>", "lo", "low</w>", "low", "er</w>", "lower</w>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [["l", "o"], ["lo", "w</w>"], ["lo", "w"], ["e", "r</w>"], ["low", "er</w>"]]
    special = {"<|startoftext|>": 11, "<|endoftext|>": 12}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": name, "special": True, **flags} for name, i in special.items()
        ],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {
            "type": "BPE", "end_of_word_suffix": "</w>", "unk_token": "<|endoftext|>",
            "vocab": {**vocabulary, **special}, "merges": merges,
        },
    }  # fmt: skip
    (tmp_path / "clip.json").write_text(json.dumps(content))
    tokenizer = Tokenizer(tmp_path / "clip.json")
    ids, valid = tokenizer.encode("LOW lower loer", 8)
    assert ids.tolist() == [7, 10, 6, 9, 12, 12, 12, 12]
    assert valid.tolist() == [True] * 5 + [False] * 3


def test_a_special_token_in_a_text_is_no_special_token(file: Path) -> None:
    """A caption that holds the mark of an end does not end there."""
    tokenizer = Tokenizer(file)
    mark = tokenizer.subwords.piece(tokenizer.token_ids.end or 0)
    ids, valid = tokenizer.encode(f"red {mark} apple", 64)
    assert ids.tolist().count(tokenizer.token_ids.end) == 1 + (~valid).sum() * (
        tokenizer.token_ids.pad == tokenizer.token_ids.end
    )
    assert tokenizer.decode(ids).endswith("apple")


# --- long texts --------------------------------------------------------------------------------


def long_text(seed: int, length: int, between: str = " ") -> str:
    """Return words, marks, numbers, runs of spaces and other scripts."""
    draw = random.Random(seed)
    words = [
        *files.NOUNS,
        "red,",
        "don't",
        "1234",
        "é",
        "波波",
        "🦒",
        "x" * 30,
        "  ",
        "\n",
        "\u200b",
        "!\u3000",
    ]
    text = between.join(draw.choices(words, k=length // 4))
    return text[:length]


@given(seed=st.integers(0, 10**6), length=st.sampled_from([1, 2, 16, 40]))
@settings(max_examples=10, deadline=None)
def test_a_long_text_has_the_ids_of_the_whole(file: Path, seed: int, length: int) -> None:
    text = long_text(seed, 12_000)
    whole = files.by_the_library(file, text)[: length - 1]
    tokenizer = Tokenizer(file)
    assert tokenizer.encode(text, length).ids.tolist() == [*whole, tokenizer.token_ids.end]


@pytest.mark.parametrize("start", ["", " " * 20_000, "\u200b" * 20_000])
def test_of_a_long_text_little_is_encoded(
    file: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    """Also where many characters come to few pieces."""
    tokenizer, encoded = Tokenizer(file), []
    encode = type(tokenizer.subwords).encode

    def spy(subwords: Any, text: str) -> list[int]:
        encoded.append(len(text))
        return encode(subwords, text)

    text = start + long_text(3, 2_000_000)
    expected = files.by_the_library(file, text[: 200_000 + len(start)])[:15]
    monkeypatch.setattr(type(tokenizer.subwords), "encode", spy)
    ids = tokenizer.encode(text, 16).ids
    assert ids.tolist() == [*expected, tokenizer.token_ids.end]
    assert sum(encoded) < 200_000


def cuts(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return places of a text at which it may be cut."""
    found = (tokenizer.subwords.cut(text, start) for start in range(0, len(text), 97))
    return sorted({cut for cut in found if cut is not None})


def test_before_a_cut_are_the_first_ids_of_the_whole(file: Path) -> None:
    """Exactly: also the last of them."""
    text, tokenizer = long_text(11, 3000), Tokenizer(file)
    whole = files.by_the_library(file, text)
    assert len(cuts(tokenizer, text)) > 20
    for cut in cuts(tokenizer, text):
        ids = files.by_the_library(file, text[:cut])
        assert ids == whole[: len(ids)] and len(ids) > 0


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "more",
    [{"treat_whitespace_as_suffix": True}, {"split_by_whitespace": False}],
    ids=["pieces end with a space", "pieces hold spaces"],
)
def test_a_text_is_not_cut_where_a_piece_crosses(tmp_path: Path, kind: str, more: Any) -> None:
    more = {**more, "hard_vocab_limit": False} if kind == "unigram" else more
    file = files.sentence_pieces(tmp_path / "a.model", 100, model_type=kind, **more)
    tokenizer, text = Tokenizer(file), " ".join(files.TEXTS * 60)
    whole = files.by_the_library(file, text)
    for cut in cuts(tokenizer, text):
        ids = files.by_the_library(file, text[:cut])
        assert ids == whole[: len(ids)]
    for length in (2, 17, 64):
        assert tokenizer.encode(text, length).ids[:-1].tolist() == whole[: length - 1]


def test_a_long_text_without_spaces(folder: Path) -> None:
    file = folder / "llama3.json"
    text = long_text(5, 20_000, between="").replace(" ", "")
    whole = files.by_the_library(file, text)[:15]
    assert Tokenizer(file).encode(text, 16).ids[:-1].tolist() == whole


def test_half_of_a_surrogate_pair_is_an_error(file: Path) -> None:
    for text in ("red \ud83e apple", "\udd92", "red " * 5000 + "\ud83e"):
        with pytest.raises(
            UserError, match="half of a surrogate pair, U\\+[D8-F]{2}[0-9A-F]{2} at"
        ):
            Tokenizer(file).encode(text, 8)


# --- ids without a piece -----------------------------------------------------------------------


def test_ids_without_a_piece_give_nothing(file: Path) -> None:
    tokenizer = Tokenizer(file)
    ids = tokenizer.encode("red apple", 32).ids[:-1].tolist()
    size = tokenizer.vocab_size
    row = [size, *ids[:2], size + 1, 10**6, -1, *ids[2:]]
    assert tokenizer.decode(row) == tokenizer.decode(ids)


def test_holes_in_the_numbers_of_a_file(folder: Path, tmp_path: Path) -> None:
    def move(content: Any) -> None:
        for token, index in zip(content["added_tokens"], (312, 315), strict=True):
            token["id"] = content["model"]["vocab"][token["content"]] = index

    tokenizer = Tokenizer(files.changed(folder / "llama3.json", tmp_path / "a.json", move))
    assert tokenizer.token_ids == TokenIds(316, 315, 312, 315, (308, 309, 310, 311, 313, 314))
    ids, valid = tokenizer.encode("red", 8)
    assert tokenizer.decode([310, *ids[valid][:-1], 313]) == "red"
    without = tokenizer.token_ids.without_piece(320)
    assert np.flatnonzero(without).tolist() == [308, 309, 310, 311, 313, 314, 316, 317, 318, 319]
    assert not TokenIds(8).without_piece(8).any()


@pytest.mark.parametrize(
    ("special", "used"),
    [
        (TokenIds(9), [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]),
        (TokenIds(9, pad=3, begin=3), [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]),
        (TokenIds(9, end=None), [[1, 1, 1, 1]] * 4),
    ],
)
def test_which_ids_of_a_row_are_its_text(special: TokenIds, used: list[list[int]]) -> None:
    """Up to its end, also where a padding id was written before it."""
    end_or_pad = special.pad if special.pad == 3 else 0
    rows = np.array([[4, 5, 3, end_or_pad], [3, 3, 3, 3], [4, 0, 5, 6], [4, 5, 6, 3]])
    np.testing.assert_array_equal(special.used(rows), np.array(used, bool))


# --- files -------------------------------------------------------------------------------------


def test_the_same_file_is_opened_once(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / file.name
    shutil.copy(file, copy)
    one, other = Tokenizer(file), Tokenizer(copy)
    assert one.subwords is other.subwords and one.digest == other.digest
    assert one.path != other.path


def test_a_file_that_has_changed_is_read_again(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "a.json"
    shutil.copy(folder / "llama3.json", copy)
    before = Tokenizer(copy)
    shutil.copy(folder / "clip.json", copy)
    assert Tokenizer(copy).vocab_size == 559 != before.vocab_size


def test_a_tokenizer_goes_to_another_process_as_its_path(file: Path) -> None:
    data = pickle.dumps(Tokenizer(file))
    assert len(data) < 1000
    again = pickle.loads(data)
    assert again.encode("red", 8).ids.tolist() == Tokenizer(file).encode("red", 8).ids.tolist()


def test_what_a_file_says_of_lengths_and_chance_is_not_taken(folder: Path, tmp_path: Path) -> None:
    """Truncation, padding and BPE dropout would give other ids than the text's."""

    def change(content: Any) -> None:
        side = {"direction": "Right", "strategy": "LongestFirst"}
        content["truncation"] = {"max_length": 2, "stride": 0, **side}
        content["padding"] = {
            "strategy": {"Fixed": 32}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 5,
            "pad_type_id": 0, "pad_token": "!",
        }  # fmt: skip
        content["model"]["dropout"] = 0.9

    plain = folder / "llama3.json"
    odd = Tokenizer(files.changed(plain, tmp_path / "a.json", change))
    text = "A red umbrella, and a green bicycle"
    assert odd.encode(text, 32).ids.tolist() == Tokenizer(plain).encode(text, 32).ids.tolist()


def test_an_end_token_of_another_name(folder: Path, tmp_path: Path) -> None:
    def rename(content: Any) -> None:
        content["added_tokens"][1]["content"] = "<|over|>"

    file = files.changed(folder / "llama3.json", tmp_path / "a.json", rename)
    with pytest.raises(
        UserError, match=r"no end token under a usual name. Set modalities.text.end"
    ):
        Tokenizer(file)
    assert Tokenizer(file, "<|over|>").token_ids == TokenIds(310, 309, 308, 309)
    with pytest.raises(UserError, match=r"has no piece '<\|out\|>'"):
        Tokenizer(file, "<|out|>")
    assert Tokenizer(folder / "qwen.json", "<|im_end|>").token_ids.end == 310


def test_a_sentence_piece_model_without_an_end(tmp_path: Path) -> None:
    file = files.sentence_pieces(tmp_path / "a.model", 100, model_type="bpe", eos_id=-1)
    with pytest.raises(UserError, match="no end token under a usual name"):
        Tokenizer(file)
    assert Tokenizer(file, "▁red").token_ids.end == Tokenizer(file, "▁red").encode("red", 2).ids[0]
    with pytest.raises(UserError, match="no piece 'zzz'"):
        Tokenizer(file, "zzz")


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
        '{"model": {"type": "Python", "code": "1/0"}}',
        '{"model"',
        '{"model": {"type": "WordLevel", "vocab": {"a": 4000000000}, "unk_token": "a"}}',
    ],
)
def test_what_is_no_tokenizer_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"a\.json is corrupt: it is no tokenizer.json"):
        Tokenizer(tmp_path / "a.json")


def test_a_file_whose_numbers_the_library_would_change(folder: Path, tmp_path: Path) -> None:
    """It numbers an added token that the model lacks after all others, whatever the file states."""

    def move(content: Any) -> None:
        content["added_tokens"][1]["id"] = 400

    file = files.changed(folder / "llama3.json", tmp_path / "a.json", move)
    with pytest.raises(UserError, match=r"end_of_text\|> has id 400, but is numbered 309"):
        Tokenizer(file)


def test_a_tokenizer_json_needs_its_package(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = files.changed(folder / "clip.json", tmp_path / "a.json", lambda c: c.pop("normalizer"))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'mmjax\[tokenizers\]'"):
        Tokenizer(file)
