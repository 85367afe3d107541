"""The tokenizer: rows of fixed length, training that repeats itself, errors a user can act on."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from mmjax.core.errors import UserError
from mmjax.data.tokenizer import Tokenizer, train

PAD, BOS, EOS = 0, 2, 3
COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white"]
THINGS = [
    "apple",
    "pear",
    "circle",
    "square",
    "heart",
    "train",
    "bicycle",
    "tiger",
    "penguin",
    "umbrella",
]
TEXTS = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train(TEXTS, tmp_path_factory.mktemp("model") / "t.model", vocab_size=370)


@given(text=st.text(max_size=60), length=st.integers(1, 40))
def test_a_row_is_pieces_then_end_then_padding(tokenizer, text, length):
    ids, valid = tokenizer.encode(text, length)
    assert ids.shape == valid.shape == (length,)
    assert (ids.dtype, valid.dtype) == (np.int32, np.bool_)
    used = int(valid.sum())
    assert valid.tolist() == [True] * used + [False] * (length - used)
    assert ids[used - 1] == EOS and EOS not in ids[: used - 1]
    assert (ids[used:] == PAD).all() and PAD not in ids[:used] and BOS not in ids
    assert (ids < tokenizer.vocab_size).all()


@given(text=st.text(max_size=60), length=st.integers(1, 40))
def test_cutting_takes_the_end_of_the_pieces(tokenizer, text, length):
    whole = tokenizer.encode(text, 400)
    cut = tokenizer.encode(text, length)
    assert whole.valid.sum() < 400
    kept = min(length, int(whole.valid.sum())) - 1
    assert cut.ids[:kept].tolist() == whole.ids[:kept].tolist()
    assert cut.ids[kept] == EOS


@given(st.lists(st.text("abcdefghijklmnopqrstuvwxyz?!", min_size=1), max_size=8))
def test_decoding_gives_the_text_back(tokenizer, words):
    text = " ".join(words)
    assert tokenizer.decode(tokenizer.encode(text, 400).ids) == text


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Red APPLE", "red apple"),
        ("  two   spaces ", "two spaces"),
        ("café 波 🦒", "café 波 🦒"),
        ("ﬁne ½", "fine 1⁄2"),
        ("", ""),
    ],
)
def test_decoding_gives_the_normal_form(tokenizer, text, normal):
    """Characters that no training text has come through as bytes; case and ligatures fold."""
    assert tokenizer.decode(tokenizer.encode(text, 64).ids) == normal


def test_the_library_gives_the_same_pieces(tokenizer):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    for text in TEXTS:
        pieces = reference.encode(text)
        assert tokenizer.encode(text, 32).ids[: len(pieces) + 1].tolist() == [*pieces, EOS]
    assert tokenizer.vocab_size == reference.vocab_size() == 370
    assert [reference.id_to_piece(i) for i in range(4)] == ["<pad>", "<unk>", "<s>", "</s>"]


def test_frequent_words_are_one_piece(tokenizer):
    assert tokenizer.encode("red penguin", 9).valid.sum() == 3


def test_two_trainings_give_the_same_bytes(tokenizer, tmp_path):
    """In another process with another hash seed, and here."""
    code = (
        "import sys; from mmjax.data.tokenizer import train;"
        "train(sys.stdin.read().splitlines(), sys.argv[1], vocab_size=370)"
    )
    other = tmp_path / "other.model"
    subprocess.run(
        [sys.executable, "-c", code, str(other)],
        input="\n".join(TEXTS),
        text=True,
        check=True,
        timeout=120,
        env=_environment(PYTHONHASHSEED="7"),
    )
    again = train(iter(TEXTS), tmp_path / "again.model", vocab_size=370)
    assert other.read_bytes() == again.path.read_bytes() == tokenizer.path.read_bytes()
    assert again.digest == tokenizer.digest
    assert tokenizer.digest == hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()


def test_other_texts_give_another_digest(tokenizer, tmp_path):
    other = train([*TEXTS, "a violet giraffe"] * 2, tmp_path / "o.model", vocab_size=370)
    assert other.digest != tokenizer.digest


def test_unigram_and_case(tmp_path):
    cased = train(
        [text.title() for text in TEXTS],
        tmp_path / "u.model",
        vocab_size=300,
        model_type="unigram",
        normalization="nmt_nfkc",
    )
    assert cased.decode(cased.encode("Red Apple", 16).ids) == "Red Apple"


def test_a_long_text_is_not_dropped(tmp_path):
    """SentencePiece skips texts over 4,192 bytes by default."""
    trained = train([*TEXTS, "giraffe " * 1000], tmp_path / "l.model", vocab_size=340)
    assert trained.encode("giraffe", 8).valid.sum() == 2


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"vocab_size": 100}, "smaller than required"),
        ({"vocab_size": 50_000}, "too high"),
        ({"vocab_size": 370, "model_type": "words"}, "words"),
        ({"vocab_size": 370, "normalization": "none_such"}, "none_such"),
    ],
)
def test_what_cannot_be_trained(tmp_path, kwargs, reason):
    with pytest.raises(UserError, match=reason):
        train(TEXTS, tmp_path / "t.model", **kwargs)
    assert not (tmp_path / "t.model").exists()


def test_no_texts(tmp_path):
    with pytest.raises(UserError, match="no texts"):
        train([], tmp_path / "t.model", vocab_size=370)


def test_missing_model(tmp_path):
    for path in (tmp_path / "none.model", tmp_path):
        with pytest.raises(UserError, match=f"No tokenizer model at {path}"):
            Tokenizer(path)


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"no model"]
)
def test_corrupt_model(tokenizer, tmp_path, damage):
    path = tmp_path / "bad.model"
    path.write_bytes(damage(tokenizer.path.read_bytes()))
    with pytest.raises(UserError, match=f"{path} is corrupt"):
        Tokenizer(path)


def test_a_row_needs_room_for_the_end_token(tokenizer):
    with pytest.raises(UserError, match="length from 1"):
        tokenizer.encode("red", 0)


def test_the_libraries_are_imported_only_when_used():
    code = (
        "import sys, mmjax.data.tokenizer;"
        "sys.exit('sentencepiece' in sys.modules or 'tokenizers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=_environment())


def _environment(**extra):
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **extra}
