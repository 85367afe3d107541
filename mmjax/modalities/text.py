"""Text: subword tokens of a trained SentencePiece model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.nn import initializers

from mmjax.data import DATA_DIR_VARIABLE, data_dir
from mmjax.data.tokenizer import EOS_ID, Tokenizer
from mmjax.errors import UserError
from mmjax.layers.positions import Placed, Positions, Table, place
from mmjax.layers.stream import Stream
from mmjax.modality import ArraySpec, Modality
from mmjax.parameters import declare
from mmjax.sharding import constrain


@dataclass(frozen=True)
class TextInput:
    """A task's view of a text.

    Attributes:
      field: field of the example.
      length: tokens, padded or cut to it (the end token stays).
    """

    field: str = "caption"
    length: int = 16


@dataclass(frozen=True)
class Text(Placed, Modality[TextInput]):
    """Texts in UTF-8.

    Attributes:
      tokenizer: path of the SentencePiece model, under `folder`.
      vocabulary: rows of the embedding table; the tokenizer's size at least.
      buckets: position buckets; the longest text of any task at least.
      positions, positions_scale: see `mmjax.layers.positions.Placed`; without positions, a text has any length.
    """

    Input = TextInput
    tokenizer: str = "emoji/1.0.0/tokenizer.model"
    vocabulary: int = 2048
    buckets: int = 128

    def stem(self, width: int) -> nnx.Module:
        positions = self.make_positions(width, {"token": self.buckets})
        return TextStem(self.vocabulary, self.buckets, width, positions)

    def arrays(self, settings: TextInput) -> ArraySpec:
        if settings.length > self.limit(self.buckets):
            raise UserError(
                f"text length {settings.length} is over the {self.buckets} position buckets."
            )
        shape = (settings.length,)
        return {
            "ids": jax.ShapeDtypeStruct(shape, np.int32),
            "valid": jax.ShapeDtypeStruct(shape, np.bool_),
        }

    def preprocess(
        self, settings: TextInput, value: Any, rng: np.random.Generator | None
    ) -> dict[str, np.ndarray]:
        """`{"ids": int32[length], "valid": bool[length]}`; of several texts, of one."""
        [text] = self.instances(value, 1, rng)
        ids, valid = self._tokenizer().encode(self.raw(text), settings.length)
        return {"ids": ids, "valid": valid}

    def instances(self, value: Any, count: int, rng: np.random.Generator | None) -> list[Any]:
        """Up to `count` of the texts of a list or array, at random and none twice; the first ones without `rng`."""
        if isinstance(value, str | bytes):
            return [value]
        texts = list(value) if isinstance(value, list | tuple | np.ndarray) else [value]
        if not texts:
            raise UserError("a text is a string, or a list of one at least; found none.")
        order = range(len(texts)) if rng is None else rng.permutation(len(texts))
        return [texts[i] for i in list(order)[:count]]

    def raw(self, value: Any) -> str:
        if isinstance(value, bytes):
            return value.decode("utf-8")
        if not isinstance(value, str):
            raise UserError(f"a text is a string, found {type(value).__name__}.")
        return value

    def words(self, ids: np.ndarray) -> str:
        """The text of token ids `[S]`, up to its end token."""
        return self._tokenizer().decode(ids)

    def files(self) -> dict[str, epath.Path]:
        return {self.tokenizer: self._path()}

    def _path(self) -> epath.Path:
        return (epath.Path(self.folder) if self.folder else data_dir()) / self.tokenizer

    def _tokenizer(self) -> Tokenizer:
        # By what its path is made of: making the path for every text takes longer than finding the pieces.
        return _opened(self, os.environ.get(DATA_DIR_VARIABLE, ""))


@lru_cache(maxsize=8)
def _opened(text: Text, data: str) -> Tokenizer:
    """The tokenizer of a text where the folder of data is `data`."""
    tokenizer = Tokenizer(text._path())
    if tokenizer.vocab_size > text.vocabulary:
        raise UserError(
            f"modalities.text.vocabulary is {text.vocabulary}; the tokenizer has {tokenizer.vocab_size} pieces."
        )
    return tokenizer


class TextStem(nnx.Module):
    """`{"ids": int32[B, S], "valid": bool[B, S]} ->` a stream of S tokens."""

    end = EOS_ID  # see `mmjax.modality.Stem`

    def __init__(
        self, vocabulary: int, buckets: int, width: int, positions: Positions | Table | None
    ):
        init = initializers.normal(0.1)
        self.embedding = declare((vocabulary, width), ("vocabulary", "embed"), init, decay=False)
        self.positions, self.buckets = positions, buckets

    def __call__(self, arrays: dict[str, jax.Array]) -> Stream:
        ids_BS = arrays["ids"]
        # Vectors whole before the lookup, as other parameters are before their products: the tokens that it
        # gives lie by rows, and XLA cannot go there from cut vectors but by making all of them whole.
        table_VD = constrain(self.embedding[...], ("vocabulary", None))
        # A text's coordinate is its token's index: bucket i holds position i at every length.
        coordinates = {
            "token": (jnp.arange(ids_BS.shape[1], dtype=jnp.float32)[None] + 0.5) / self.buckets
        }
        x_BSD = place(jnp.take(table_VD, ids_BS, axis=0), self.positions, coordinates)
        return Stream(x_BSD, arrays["valid"], coordinates, (("text", ids_BS.shape[1]),))
