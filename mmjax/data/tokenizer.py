"""Text to integers and back: a subword vocabulary trained by SentencePiece.

A text becomes the ids of its pieces, always closed by the end token, in a row of fixed length:

    encode("red apple", 6)  ->  ids [p1, p2, 3, 0, 0, 0],  valid [1, 1, 1, 0, 0, 0]

A text too long for the row loses pieces at its end, never its end token: a model that pools at the
end token always finds one. Ids are 0 padding, 1 unknown (never met: bytes stand in for characters
that the training texts lack), 2 begin (there for generation; `encode` adds none), 3 end.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from etils import epath
from numpy.typing import ArrayLike, NDArray

from mmjax.errors import UserError

if TYPE_CHECKING:
    import sentencepiece

PAD_ID, UNK_ID, BOS_ID, EOS_ID = range(4)


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
    path.write_bytes(proto)
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
    """A trained vocabulary, read from `path` (local or remote)."""

    def __init__(self, path: epath.PathLike) -> None:
        """Read the model; `UserError` when it is missing, corrupt or has other special tokens."""
        self.path = epath.Path(path)
        proto = _read(self.path)
        self._processor = _processor(proto, self.path)
        self.digest = hashlib.sha256(proto).hexdigest()
        """SHA-256 of the model's bytes: two tokenizers with one digest give the same ids."""
        self.vocab_size: int = self._processor.vocab_size()
        """Ids lie in [0, vocab_size)."""

    def encode(self, text: str, length: int) -> Encoded:
        """The pieces of `text` and the end token, cut and padded to `length` (at least 1)."""
        if length < 1:
            raise UserError(f"A text cannot be encoded in {length} tokens: give a length from 1.")
        pieces = [*self._processor.encode(text)[: length - 1], EOS_ID]
        ids = np.full(length, PAD_ID, np.int32)
        ids[: len(pieces)] = pieces
        return Encoded(ids, np.arange(length) < len(pieces))

    def decode(self, ids: ArrayLike) -> str:
        """The text of a row of ids [n] up to its first end token; padding gives nothing."""
        row = np.asarray(ids, np.int64).ravel().tolist()
        if EOS_ID in row:
            row = row[: row.index(EOS_ID)]
        text: str = self._processor.decode(row)
        return text


def _read(path: epath.Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(
            f"No tokenizer model at {path}. Building a data set trains one:"
            " python -m mmjax.data.build emoji"
        ) from error


def _processor(proto: bytes, path: epath.Path) -> sentencepiece.SentencePieceProcessor:
    import sentencepiece

    try:
        # Empty bytes are no error to SentencePiece, only a processor that knows nothing.
        processor = sentencepiece.SentencePieceProcessor(model_proto=proto) if proto else None
    except RuntimeError:
        processor = None
    if processor is None:
        raise UserError(
            f"The tokenizer model {path} is corrupt: it is no SentencePiece model."
            " Build its data set again with --force, or copy the file again."
        )
    special = (processor.pad_id(), processor.unk_id(), processor.bos_id(), processor.eos_id())
    if special != (PAD_ID, UNK_ID, BOS_ID, EOS_ID):
        raise UserError(
            f"The tokenizer model {path} numbers (pad, unknown, begin, end) as {special}; mmjax"
            f" needs {(PAD_ID, UNK_ID, BOS_ID, EOS_ID)}. Train it by mmjax.data.tokenizer.train."
        )
    return processor
