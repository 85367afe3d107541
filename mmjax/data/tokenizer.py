"""Text to integers and back, by a subword vocabulary: a SentencePiece model or a `tokenizer.json`.

A text becomes the ids of its pieces, always closed by the end token, in a row of fixed length:

    encode("red apple", 6)  ->  ids [p1, p2, 3, 0, 0, 0],  valid [1, 1, 1, 0, 0, 0]

A text too long for the row loses pieces at its end, never its end token: a model that pools at the
end token always finds one. Ids of padding, begin and end are those of the vocabulary (`TokenIds`). The
begin token is there for generation; `encode` adds none.

`train` numbers special tokens 0 padding, 1 unknown (never met: bytes stand in for characters that the
training texts lack), 2 begin, 3 end.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from numpy.typing import ArrayLike, NDArray

from mmjax.core.errors import UserError
from mmjax.core.files import replace_file
from mmjax.data import subwords
from mmjax.data.subwords import Subwords

# As `train` numbers them; those of other vocabularies are in their `TokenIds`.
PAD_ID, UNK_ID, BOS_ID, EOS_ID = range(4)

_MARGIN = 64


@dataclass(frozen=True)
class TokenIds:
    """Ids with a meaning of their own, and which ids have a piece.

    Attributes:
      size: ids from here on have no piece.
      pad: fills up a row. The end token where a vocabulary has no padding; the row's mask distinguishes them.
      begin: the token before the first one in a decoder. Without a begin token it is the padding (T5), or else the end
        token (GPT-2).
      end: closes a text; None where every row has its whole length.
      missing: ids below `size` without a piece.
    """

    size: int
    pad: int = PAD_ID
    begin: int = BOS_ID
    end: int | None = EOS_ID
    missing: tuple[int, ...] = ()

    def used(self, ids: Any) -> Any:
        """Return which ids of written rows `[..., L]` are of a text: those up to its first end token."""
        if self.end is None:
            return ids == ids
        is_end = ids == self.end
        return is_end.cumsum(-1) - is_end == 0

    def without_piece(self, count: int) -> NDArray[np.bool_]:
        """Return which of the ids [0, count) have no piece, `[count]`."""
        without = np.arange(count) >= self.size
        without[[index for index in self.missing if index < count]] = True
        return without


class Encoded(NamedTuple):
    """One text as a row: `ids` int32 [length], `valid` bool [length], false on padding."""

    ids: NDArray[np.int32]
    valid: NDArray[np.bool_]


def train(
    texts: Iterable[str],
    path: epath.PathLike,
    *,
    vocab_size: int,
    model_type: str = "bpe",
    normalization: str = "nmt_nfkc_cf",
) -> Tokenizer:
    """Train a vocabulary on `texts`, write it to `path` and return it.

    The same texts in the same order give the same bytes: one thread, no sampling. `normalization`
    is a SentencePiece rule; the default folds case (NFKC), so `decode` gives lower case, and
    `nmt_nfkc` keeps it. `model_type` is `bpe` or `unigram`; on a few thousand short texts unigram
    finds too few candidates for a vocabulary of thousands, BPE does not.

    Raises `UserError`, with the limit, when `vocab_size` is too small for the characters of the
    texts and 256 bytes, or more than the texts can fill.
    """
    texts = list(texts)
    proto = _train_proto(texts, vocab_size, model_type, normalization)
    path = epath.Path(path)
    replace_file(path, proto)
    return Tokenizer(path)


def _train_proto(texts: list[str], vocab_size: int, model_type: str, normalization: str) -> bytes:
    import sentencepiece

    if not texts:
        raise UserError("A vocabulary cannot be trained on no texts.")
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=out,
            vocab_size=vocab_size,
            model_type=model_type,
            normalization_rule_name=normalization,
            character_coverage=1.0,
            byte_fallback=True,
            # The default drops longer texts without an error; less than 10 is refused.
            max_sentence_length=max(10, *(len(text.encode()) + 1 for text in texts)),
            num_threads=1,
            shuffle_input_sentence=False,
            pad_id=PAD_ID,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            minloglevel=2,
        )
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).rpartition("] ")[2].strip() or str(error)
        raise UserError(
            f"SentencePiece cannot train {vocab_size} {model_type} pieces with {normalization} on"
            f" {len(texts)} texts: {reason}"
        ) from error
    return out.getvalue()


class Tokenizer:
    """A vocabulary read from `path` (local or remote); pickled, it is read again from there."""

    def __init__(self, path: epath.PathLike, end: str = "") -> None:
        """Read the file.

        Args:
          path: a SentencePiece model or a `tokenizer.json`.
          end: the piece that closes a text; by default the one that the file names or has under a usual name.

        Raises:
          UserError: a file that is missing or corrupt, or has no end token.
        """
        self.path, self._end = epath.Path(path), end
        self.subwords, self.digest = load_subwords(self.path)
        """The vocabulary itself, and SHA-256 of the file's bytes: the same bytes give the same ids."""
        self.vocab_size = self.subwords.size
        """Ids lie in [0, vocab_size)."""
        self.token_ids = _token_ids(self.subwords, end, str(path))
        """Ids of special tokens."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (str(self.path), self._end)

    def encode(self, text: str, length: int) -> Encoded:
        """Return the pieces of `text` and the end token, cut and padded to `length` (at least 1).

        Raises:
          UserError: a text that holds half of a surrogate pair, which no encoding of Unicode can express.
        """
        if length < 1:
            raise UserError(f"A text cannot be encoded in {length} tokens: give a length from 1.")
        check_unicode(text)
        assert self.token_ids.end is not None
        pieces = [*self._first(text, length - 1), self.token_ids.end]
        ids = np.full(length, self.token_ids.pad, np.int32)
        ids[: len(pieces)] = pieces
        return Encoded(ids, np.arange(length) < len(pieces))

    def _first(self, text: str, count: int) -> list[int]:
        """Return the ids of the first `count` pieces, without encoding all of a long text.

        `Subwords.cut` is exact for the vocabulary. Some pieces more than are kept keep a normaliser that looks at
        neighbouring characters away from them, too.
        """
        size = 1024 + 16 * count
        while len(text) > 2 * size and (cut := self.subwords.cut(text, size)):
            ids = self.subwords.encode(text[:cut])
            if len(ids) >= count + _MARGIN:
                return ids[:count]
            size = 4 * cut
        return self.subwords.encode(text)[:count]

    def decode(self, ids: ArrayLike) -> str:
        """Return the text of a row of ids [n] up to its first end token; ids without a piece give nothing."""
        row = np.asarray(ids, np.int64).ravel().tolist()
        if self.token_ids.end in row:
            row = row[: row.index(self.token_ids.end)]
        size = self.vocab_size
        return self.subwords.decode([i for i in row if 0 <= i < size])


def load_subwords(path: epath.Path) -> tuple[Subwords, str]:
    """Return the vocabulary in a file and the SHA-256 of its bytes.

    Raises:
      UserError: a file that is missing or corrupt.
    """
    data = _read(path)
    digest = hashlib.sha256(data).hexdigest()
    return subwords.read(data, digest, str(path)), digest


def _read(path: epath.Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(f"No tokenizer model at {path}. {how_to_get(path)}") from error


def how_to_get(path: epath.PathLike) -> str:
    """Return what to do where the tokenizer `path` is missing."""
    if epath.Path(path).match("emoji/*/tokenizer.model"):
        return "Building a data set trains it: mmjax build emoji"
    return (
        "Copy it there, or train one on your texts: "
        "mmjax tokenizer train SOURCE --field=caption --size=4096 --out=FILE"
    )


def _token_ids(vocabulary: Subwords, name: str, path: str) -> TokenIds:
    end = vocabulary.id_of(name) if name else vocabulary.end
    if end is None:
        what = f"no piece '{name}'" if name else "no end token under a usual name"
        raise UserError(
            f"The tokenizer {path} has {what}. Set modalities.text.end to its piece that closes a text; "
            f"`mmjax tokenizer show {path}` lists its special tokens."
        )
    pad = end if vocabulary.pad is None else vocabulary.pad
    begin = pad if vocabulary.begin is None else vocabulary.begin
    return TokenIds(vocabulary.size, pad, begin, end, tuple(vocabulary.missing))


def check_unicode(text: str) -> None:
    """Raise `UserError` for a text with half of a surrogate pair."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"a text holds half of a surrogate pair, U+{ord(text[error.start]):04X} at character {error.start}, which "
            "is no character. Decode it from its source again, or drop it."
        ) from error
