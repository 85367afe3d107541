"""Small tokenizers of the kinds that published models come with, made by the libraries themselves."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

NOUNS = ("apple", "penguin", "umbrella", "bicycle", "train", "tiger", "heart")
TEXTS = [f"A {c} {n}, and {i} more!" for i, c in enumerate(("red", "green", "blue")) for n in NOUNS]

# The regular expressions by which Llama 3 and Qwen 2 cut a text before BPE.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = (
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
CLIP = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def sentence_pieces(file: Path, size: int, **settings: Any) -> Path:
    """Train a SentencePiece model on `TEXTS`; `settings` are the trainer's."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=out, vocab_size=size, minloglevel=2, **settings
    )
    file.write_bytes(out.getvalue())
    return file


def t5(file: Path) -> Path:
    """Write T5's tokenizer: unigram; padding 0, end 1, unknown 2, no begin."""
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    return sentence_pieces(file, 80, model_type="unigram", hard_vocab_limit=False, **ids)


def llama2(file: Path) -> Path:
    """Write Llama's tokenizer: BPE over bytes; unknown 0, begin 1, end 2, no padding; case and spaces stay."""
    rule = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    ids = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    more = {"byte_fallback": True, "split_digits": True, **rule, **ids}
    return sentence_pieces(file, 360, model_type="bpe", **more)


def _byte_level(file: Path, regex: str, special: list[str]) -> Path:
    made = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(regex), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens(special)
    made.save(str(file))
    return file


def llama3(file: Path) -> Path:
    """Write Llama 3's tokenizer: BPE of bytes; begin and end after the 320 pieces, no padding."""
    return _byte_level(file, LLAMA3, ["<|begin_of_text|>", "<|end_of_text|>"])


def qwen(file: Path) -> Path:
    """Write Qwen's tokenizer: BPE of bytes; an end, which also begins and pads."""
    return _byte_level(file, QWEN, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])


def clip(file: Path) -> Path:
    """Write CLIP's tokenizer: lower case, words closed by `</w>`; begin and end are the last two pieces."""
    made = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    space = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    made.normalizer = normalizers.Sequence([normalizers.NFC(), space, normalizers.Lowercase()])
    split = pre_tokenizers.Split(tokenizers.Regex(CLIP), "removed", invert=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    made.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=400,
            end_of_word_suffix="</w>",
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    made.save(str(file))
    special = ["<|startoftext|>", "<|endoftext|>"]

    def close(content: Any) -> None:
        """Let every byte close a word; then begin and end, which is unknown as well."""
        vocabulary = content["model"]["vocab"]
        ends = [f"{c}</w>" for c in sorted(alphabet)]
        for piece in (*(end for end in ends if end not in vocabulary), *special):
            vocabulary[piece] = len(vocabulary)
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        content["added_tokens"] = [
            {"id": vocabulary[name], "content": name, "special": True, **flags} for name in special
        ]

    return changed(file, file, close)


def unigram_json(file: Path) -> Path:
    """Write T5's tokenizer as a `tokenizer.json`: unigram with `▁` for spaces; padding 0, end 1, unknown 2."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator(
        TEXTS,
        trainers.UnigramTrainer(
            vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False
        ),
    )
    made.save(str(file))
    return file


KINDS: dict[str, Callable[[Path], Path]] = {
    "t5.model": t5,
    "llama2.model": llama2,
    "llama3.json": llama3,
    "qwen.json": qwen,
    "clip.json": clip,
    "unigram.json": unigram_json,
}


def by_the_library(file: Path, text: str) -> list[int]:
    """Return the ids of a text without special tokens, by the library that the file is of."""
    if file.suffix == ".model":
        return list(sentencepiece.SentencePieceProcessor(model_file=str(file)).encode(text))
    made = tokenizers.Tokenizer.from_file(str(file))
    return list(made.encode(text, add_special_tokens=False).ids)


def changed(file: Path, to: Path, change: Callable[[Any], Any]) -> Path:
    """Write a `tokenizer.json` whose content `change` has changed in place."""
    content = json.loads(file.read_text())
    change(content)
    to.write_text(json.dumps(content))
    return to
