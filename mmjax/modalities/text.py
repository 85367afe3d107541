"""Text: subword tokens of a SentencePiece model or a `tokenizer.json`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.nn import initializers

from mmjax.core.bounds import COUNT, check
from mmjax.core.config import FREE
from mmjax.core.errors import UserError
from mmjax.core.parameters import declare
from mmjax.core.sharding import constrain
from mmjax.data import DATA_DIR_VARIABLE, data_dir
from mmjax.data.tokenizer import TokenIds, Tokenizer
from mmjax.modalities.base import ArraySpec, Modality, asset_name
from mmjax.nn.positions import Placed, Positions, Table, place
from mmjax.nn.stream import Stream


@dataclass(frozen=True)
class TextInput:
    """A task's view of a text.

    Attributes:
      field: field of the example.
      length: tokens, padded or cut to it (the end token stays).
    """

    field: str = "caption"
    length: int = 16

    def __post_init__(self) -> None:
        check(self, length=COUNT)


@dataclass(frozen=True)
class Text(Placed, Modality[TextInput]):
    """Texts in UTF-8.

    Attributes:
      tokenizer: path of a SentencePiece model or a Hugging Face `tokenizer.json`: absolute, or under `folder`. Needed
        where texts are read or written; a plan does without.
      vocabulary: rows of the embedding table: the tokenizer's size, rounded up by `pad_vocabulary_to`.
      max_positions: position buckets; the longest text of any task at least.
      pad_vocabulary_to: the table's rows are the first multiple of it that holds the tokenizer; 0 for any number that
        does. Ids without a piece are never written.
      end: the piece that closes a text; by default as the tokenizer's file names it, or under a usual name.
      positions, positions_scale: see `mmjax.nn.positions.Placed`; without positions, a text has any length.
    """

    Input = TextInput
    tokenizer: str = ""
    vocabulary: int = 2048
    max_positions: int = 128
    pad_vocabulary_to: int = field(default=1, metadata=FREE)
    end: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, vocabulary=COUNT, max_positions=COUNT)
        if self.pad_vocabulary_to < 0:
            raise UserError(
                f"modalities.text.pad_vocabulary_to is {self.pad_vocabulary_to}; expected 1 for just the tokenizer's "
                "size, a multiple such as 128, or 0 for any size that holds it."
            )

    def stem(self, width: int) -> nnx.Module:
        positions = self.make_positions(width, {"token": self.max_positions})
        return TextStem(self.vocabulary, self.max_positions, width, positions, self.token_ids())

    def arrays(self, settings: TextInput) -> ArraySpec:
        if settings.length > self.limit(self.max_positions):
            raise UserError(
                f"text length {settings.length} is over the {self.max_positions} position buckets."
            )
        shape = (settings.length,)
        return {
            "ids": jax.ShapeDtypeStruct(shape, np.int32),
            "valid": jax.ShapeDtypeStruct(shape, np.bool_),
        }

    def preprocess(
        self, settings: TextInput, value: Any, rng: np.random.Generator | None
    ) -> dict[str, np.ndarray]:
        """Return `{"ids": int32[length], "valid": bool[length]}` of one text; of several, of one of them."""
        [text] = self.instances(value, 1, rng)
        ids, valid = self._tokenizer().encode(self.raw(text), settings.length)
        return {"ids": ids, "valid": valid}

    def instances(self, value: Any, count: int, rng: np.random.Generator | None) -> list[Any]:
        """Return up to `count` distinct texts of a list or array, at random; the first ones without `rng`."""
        if isinstance(value, str | bytes):
            return [value]
        texts = list(value) if isinstance(value, list | tuple | np.ndarray) else [value]
        if not texts:
            raise UserError("a text is a string, or a list of one at least; found none.")
        order = range(len(texts)) if rng is None else rng.permutation(len(texts))
        return [texts[i] for i in list(order)[:count]]

    def raw(self, value: Any) -> str:
        if isinstance(value, bytes):
            try:
                return value.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"a text is not UTF-8: {error}.") from error
        if not isinstance(value, str):
            raise UserError(f"a text is a string, found {type(value).__name__}.")
        return value

    def words(self, ids: np.ndarray) -> str:
        """Return the text of token ids `[S]`, up to its end token."""
        return self._tokenizer().decode(ids)

    def token_ids(self) -> TokenIds:
        """Return the ids of special tokens; where the tokenizer's file is not there, some that give the same shapes."""
        if not self.tokenizer or not self._path().exists():
            return TokenIds(self.vocabulary)
        _opened.cache_clear()  # a model is made of the file as it is now
        return self._tokenizer().token_ids

    def files(self) -> dict[str, epath.Path]:
        return {self.tokenizer: self._path()}

    def _path(self) -> epath.Path:
        if not self.tokenizer:
            raise UserError(
                "modalities.text.tokenizer is not set, and texts cannot be read or written without it. Give the path "
                f"of a SentencePiece model or tokenizer.json of {self.vocabulary} pieces, absolute or under the data "
                "folder: --config.modalities.text.tokenizer=FILE. To train one on your texts: mmjax tokenizer train "
                f"SOURCE --field=caption --size={self.vocabulary} --out=FILE"
            )
        original = data_dir() / epath.Path(self.tokenizer).expanduser()
        if not self.folder:
            return original
        asset = epath.Path(self.folder) / asset_name(self.tokenizer)
        is_elsewhere = asset_name(self.tokenizer) != self.tokenizer
        # Version 0.1 kept no copy of a file that lies elsewhere.
        return original if is_elsewhere and not asset.exists() else asset

    def _tokenizer(self) -> Tokenizer:
        # By what its path is made of: making the path for every text takes longer than finding the pieces.
        return _opened(self, os.environ.get(DATA_DIR_VARIABLE, ""))


@lru_cache(maxsize=8)
def _opened(text: Text, data: str) -> Tokenizer:
    """Return the tokenizer of a text where the folder of data is `data`."""
    tokenizer = Tokenizer(text._path(), text.end)
    size, multiple = tokenizer.vocab_size, text.pad_vocabulary_to
    rows = -(-size // multiple) * multiple if multiple else max(size, text.vocabulary)
    if text.vocabulary != rows:
        raise UserError(
            f"modalities.text.vocabulary is {text.vocabulary}; the tokenizer has {size} pieces ({tokenizer.path}). "
            f"Set it to {rows}, or choose the tokenizer that the recipe is for. A larger table is allowed with "
            "modalities.text.pad_vocabulary_to=0."
        )
    return tokenizer


class TextStem(nnx.Module):
    """`{"ids": int32[B, S], "valid": bool[B, S]} ->` a stream of S tokens.

    With `index`, int `[B, S]`, that is the index of each token in its text, of rows that hold several.
    """

    def __init__(
        self,
        vocabulary: int,
        buckets: int,
        width: int,
        positions: Positions | Table | None,
        ids: TokenIds,
    ):
        init = initializers.normal(0.1)
        self.token_ids = ids
        self.embedding = declare((vocabulary, width), ("vocabulary", "embed"), init, decay=False)
        self.positions, self.buckets = positions, buckets

    def __call__(self, arrays: dict[str, jax.Array]) -> Stream:
        ids_BS = arrays["ids"]
        # Vectors whole before the lookup, as other parameters are before their products: the tokens that it
        # gives lie by rows, and XLA cannot go there from cut vectors but by making all of them whole.
        table_VD = constrain(self.embedding[...], ("vocabulary", None))
        # A text's coordinate is its token's index: bucket i holds position i at every length.
        index = arrays.get("index", jnp.arange(ids_BS.shape[1])[None])
        coordinates = {"token": (index.astype(jnp.float32) + 0.5) / self.buckets}
        x_BSD = place(jnp.take(table_VD, ids_BS, axis=0), self.positions, coordinates)
        return Stream(x_BSD, arrays["valid"], coordinates, (("text", ids_BS.shape[1]),))
