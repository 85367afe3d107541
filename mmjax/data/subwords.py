"""Vocabularies of subword pieces: SentencePiece models, and `tokenizer.json` of Hugging Face's tokenizers.

Both are data; no code from such a file runs. Each process opens the content of a file once.
"""

from __future__ import annotations

import abc
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from mmjax.core.errors import UserError

# Names of special tokens in the order of preference. The added tokens of a `tokenizer.json` are marked as special,
# not what for.
PAD = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")
BEGIN = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]", "<｜begin▁of▁sentence｜>")
END = (
    "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]", "<｜end▁of▁sentence｜>",
)  # fmt: skip

_HIDDEN = "\uffff"  # before the name of a special token; no character of any text
_SPACE = re.compile(r"\S(?= )")
_OPEN = 8  # vocabularies that stay open


class Subwords(abc.ABC):
    """A vocabulary.

    Attributes:
      kind: the kind of file.
      size: ids lie in [0, size).
      missing: ids below `size` without a piece.
      pad, begin, end: ids of special tokens; None where the vocabulary has none.
    """

    kind: str
    size: int
    missing: Sequence[int] = ()
    pad: int | None
    begin: int | None
    end: int | None

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens."""

    @abc.abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Return the text of ids that have pieces; special tokens give nothing."""

    @abc.abstractmethod
    def piece(self, index: int) -> str:
        """Return the piece of an id."""

    @abc.abstractmethod
    def id_of(self, piece: str) -> int | None:
        """Return the id of a piece; None if there is no such piece."""

    @abc.abstractmethod
    def pieces(self) -> list[str]:
        """Return all pieces, in any order."""

    def cut(self, text: str, start: int) -> int | None:
        """Return the first place from `start` on, before a space, that no piece can cross; None if there is none.

        The ids of the text before it are the first ids of the whole text.
        """
        for match in _SPACE.finditer(text, start):
            last = match[0]
            if not self._before_space & {last, _AS_CHARACTER[last.encode()[-1]]}:
                return match.end()
        return None

    @cached_property
    def _before_space(self) -> frozenset[str]:
        """The characters that some piece holds before a space: in a byte-level vocabulary, the bytes' characters."""
        return frozenset(c for piece in self.pieces() for c in re.findall("(.)(?=[ ▁Ġ])", piece))


class SentencePieces(Subwords):
    """A SentencePiece model, which holds the ids of its special tokens."""

    kind = "SentencePiece model"

    def __init__(self, data: bytes) -> None:
        import sentencepiece

        if not data:  # no error to SentencePiece, only a processor without pieces
            raise ValueError("it is empty")
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        self.size = self._processor.vocab_size()
        self.pad, self.begin, self.end = (
            index if index >= 0 else None
            for index in (
                self._processor.pad_id(),
                self._processor.bos_id(),
                self._processor.eos_id(),
            )
        )

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._processor.decode(ids)
        return text

    def piece(self, index: int) -> str:
        piece: str = self._processor.id_to_piece(index)
        return piece

    def id_of(self, piece: str) -> int | None:
        index: int = self._processor.piece_to_id(piece)
        return index if self.piece(index) == piece else None

    def pieces(self) -> list[str]:
        pieces: list[str] = self._processor.id_to_piece(list(range(self.size)))
        return pieces


class HuggingFace(Subwords):
    """A `tokenizer.json`; a special token in a text is encoded as the characters that it is written with."""

    kind = "tokenizer.json"

    def __init__(self, data: bytes) -> None:
        import tokenizers

        content = json.loads(data)
        _hide_special(content)
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        for token in content.get("added_tokens", ()):
            index = self._tokenizer.token_to_id(token["content"])
            if (
                index != token["id"]
            ):  # the library numbers a token that its model lacks after all others
                raise ValueError(
                    f"token {token['content']} has id {token['id']}, but is numbered {index}"
                )
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        model = self._tokenizer.model
        if getattr(model, "dropout", None):
            model.dropout = None  # BPE dropout would draw other ids each time
        self._suffix = getattr(model, "end_of_word_suffix", None)
        ids = set(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.size = max(ids, default=-1) + 1
        if not ids or self.size > 2 * len(ids) + 1024:
            raise ValueError(f"it has {len(ids)} pieces, and ids up to {self.size - 1}")
        self.missing = sorted(set(range(self.size)) - ids)
        added = self._tokenizer.get_added_tokens_decoder()
        named = {token.content.removeprefix(_HIDDEN): index for index, token in added.items()}
        self.pad, self.begin, self.end = (_first(named, names) for names in (PAD, BEGIN, END))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        # CLIP's files leave the mark of a word's end in the text.
        return text.replace(self._suffix, " ").strip() if self._suffix else text

    def piece(self, index: int) -> str:
        return (self._tokenizer.id_to_token(index) or "").removeprefix(_HIDDEN)

    def id_of(self, piece: str) -> int | None:
        ids = (self._tokenizer.token_to_id(name) for name in (_HIDDEN + piece, piece))
        return next((index for index in ids if index is not None), None)

    def pieces(self) -> list[str]:
        return list(self._tokenizer.get_vocab(with_added_tokens=True))


def _hide_special(content: Any) -> None:
    """Rename the special tokens of a unigram vocabulary in place: it would find their names in a text."""
    pieces = content["model"]["vocab"]
    for token in content.get("added_tokens", ()) if isinstance(pieces, list) else ():
        if token["special"] and token["id"] < len(pieces):
            pieces[token["id"]][0] = token["content"] = _HIDDEN + token["content"]


def _first(ids: Mapping[str, int], names: Sequence[str]) -> int | None:
    return next((ids[name] for name in names if name in ids), None)


def _as_characters() -> list[str]:
    """Return the characters that stand for the 256 bytes in byte-level vocabularies (GPT-2's)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [
        chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)
    ]


_AS_CHARACTER = _as_characters()
_open: dict[str, Subwords] = {}
_lock = threading.Lock()


def read(data: bytes, digest: str, name: str) -> Subwords:
    """Return the vocabulary in the bytes of a file, the same object for the same `digest` of them.

    Raises:
      UserError: bytes that are neither a SentencePiece model nor a `tokenizer.json`; it calls the file `name`.
    """
    with _lock:  # several threads of a loader ask at once, and a large file takes a second
        if digest not in _open:
            subwords = _read(data, name)
            while len(_open) >= _OPEN:
                _open.pop(next(iter(_open)))
            _open[digest] = subwords
        return _open[digest]


def _read(data: bytes, name: str) -> Subwords:
    is_json = data.lstrip()[:1] == b"{"
    kind: Callable[[bytes], Subwords] = HuggingFace if is_json else SentencePieces
    try:
        return kind(data)
    except ImportError as error:
        raise UserError(
            f"The tokenizer {name} is a tokenizer.json, which the package tokenizers reads. Install it: "
            "pip install 'mmjax[tokenizers]'"
        ) from error
    except (
        BaseException
    ) as error:  # what tokenizers raises where its Rust code panics is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        what = "no tokenizer.json" if is_json else "no SentencePiece model"
        raise UserError(
            f"The tokenizer {name} is corrupt: it is {what} ({_line(error)}). Copy the file again, or build it again."
        ) from error


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
