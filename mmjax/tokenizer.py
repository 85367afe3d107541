"""Train a tokenizer on your texts, or look at one.

    mmjax tokenizer train SOURCE --field=caption --size=4096 --out=FILE
    mmjax tokenizer show FILE [TEXT]

SOURCE is a folder of ArrayRecord files, a TFDS data set as NAME or NAME:SPLIT, or a file: .txt (a text on each
line), .csv, .tsv or .jsonl. The same texts give the same bytes. `show` prints the size, the special tokens and the
pieces of a text, of a SentencePiece model or a Hugging Face `tokenizer.json`.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.core import errors, flags
from mmjax.core.errors import UserError, nearest
from mmjax.data import data_dir
from mmjax.data.tokenizer import check_unicode, load_subwords, train
from mmjax.monitor.tables import table
from mmjax.sources.array_record import ArrayRecord
from mmjax.sources.base import Examples
from mmjax.sources.tfds import Tfds

FILES = (".txt", ".csv", ".tsv", ".jsonl")


@dataclass
class Corpus:
    """Texts of a source.

    Attributes:
      texts: in the order of the source.
      examples: how many examples they are of.
      without: examples without a text in the field.
    """

    texts: list[str] = field(default_factory=list)
    examples: int = 0
    without: int = 0

    def add(self, value: Any) -> None:
        """Add the texts of an example: a string, UTF-8 bytes, or a list of them."""
        values = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
        texts = [text for text in map(_text, values) if text.strip()]
        self.texts += texts
        self.examples += 1
        self.without += not texts


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if not isinstance(value, str):
        raise UserError(f"a text is a string, found {type(value).__name__}.")
    check_unicode(value)
    return value


def read_corpus(source: str, name: str, limit: int = 0) -> Corpus:
    """Return the texts in the field `name` of a source's examples, of `limit` spread evenly over them if not 0.

    Raises:
      UserError: no such source or field, an example that cannot be read, or no texts.
    """
    examples = _examples(source, name)
    count = min(limit, len(examples)) if limit else len(examples)
    corpus = Corpus()
    for index in (i * len(examples) // count for i in range(count)):
        try:
            corpus.add(examples[index].get(name))
        except (UserError, ValueError) as error:
            raise UserError(f"{source}, example {index}, field '{name}': {error}") from error
    if not corpus.texts:
        raise UserError(f"{source} has no texts in field '{name}'.")
    return corpus


def _examples(source: str, name: str) -> Any:
    """Return the examples of a source: a list, or `Examples`."""
    path = Path(source).expanduser()
    if path.is_file():
        examples: Any = _of_file(path, name)
        fields = sorted({key for row in examples for key in row if key}) or [name]
    else:
        examples = _opened(source, path.is_dir() or "://" in source)
        fields = list(examples.fields)
    if name not in fields:
        raise UserError(f"--field={name}: {source} has no such field.{nearest(name, fields)}")
    return examples


def _opened(source: str, is_folder: bool) -> Examples:
    if is_folder:
        return ArrayRecord(source).open()
    dataset, _, split = source.partition(":")
    try:
        return Tfds(dataset, split or "train").open()
    except UserError as error:
        raise UserError(
            f"There is no file or folder '{source}', and as a TFDS data set: {error}"
        ) from error


def _of_file(path: Path, name: str) -> list[dict[str, Any]]:
    """Return the lines or rows of a file as examples; a line of a `.txt` file is the field `name`."""
    if path.suffix not in FILES:
        raise UserError(
            f"{path} is no {', '.join(FILES)} file. Convert Parquet files and tars to a folder of ArrayRecord files: "
            "mmjax convert"
        )
    try:
        with path.open(
            encoding="utf-8", newline="" if path.suffix in (".csv", ".tsv") else None
        ) as file:
            return list(_READERS[path.suffix](file, name))
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _lines(file: Any, name: str) -> Iterator[dict[str, Any]]:
    return ({name: line.rstrip("\n")} for line in file)


def _json_lines(file: Any, name: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no object")
            yield row


_READERS = {
    ".txt": _lines,
    ".csv": lambda file, _: csv.DictReader(file),
    ".tsv": lambda file, _: csv.DictReader(file, delimiter="\t"),
    ".jsonl": _json_lines,
}


def _train(arguments: argparse.Namespace) -> None:
    out = flags.folder(arguments.out)
    if out.exists() and not arguments.force:
        raise UserError(f"--out={arguments.out} is there already. Give another file, or --force.")
    if arguments.limit < 0:
        raise UserError(f"--limit={arguments.limit}: a number of examples, or 0 for all.")
    corpus = read_corpus(arguments.source, arguments.field, arguments.limit)
    out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = train(
        corpus.texts,
        out,
        vocab_size=arguments.size,
        model_type=arguments.model_type,
        normalization=arguments.normalization,
    )
    print(
        f"{tokenizer.vocab_size:,} pieces from {len(corpus.texts):,} texts of {corpus.examples:,} examples: {out}"
    )
    if corpus.without:
        print(f"Examples without a text in field '{arguments.field}': {corpus.without:,}")
    print(f"tokenizer = {json.dumps(str(out))}, vocabulary = {tokenizer.vocab_size}")


def _show(arguments: argparse.Namespace) -> None:
    path = flags.folder(arguments.file)
    if not path.exists() and (data_dir() / arguments.file).exists():
        path = data_dir() / arguments.file  # as a config names it
    subwords, digest = load_subwords(path)
    print(
        f"{path}: {subwords.kind} of {subwords.size:,} ids, {len(subwords.missing):,} of them without a piece"
    )
    print(f"SHA-256 {digest}\n")
    special = {"padding": subwords.pad, "begin": subwords.begin, "end": subwords.end}
    rows = [
        (role, "none" if i is None else i, "" if i is None else subwords.piece(i))
        for role, i in special.items()
    ]
    table("Special tokens", ("token", "id", "piece"), rows)
    if arguments.text is not None:
        ids = subwords.encode(arguments.text)
        table(f"{len(ids)} pieces", ("id", "piece"), [(i, subwords.piece(i)) for i in ids])
        print(f"Decoded: {subwords.decode(ids)!r}")


def _parser() -> argparse.ArgumentParser:
    parser = flags.command("tokenizer", __doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{train,show}")
    one = verbs.add_parser(
        "train", help="train a SentencePiece model", description="Train a SentencePiece model on texts.",
        allow_abbrev=False,
    )  # fmt: skip
    one.add_argument(
        "source",
        help=f"a folder of ArrayRecord files, a TFDS data set as NAME or NAME:SPLIT, or a file ({', '.join(FILES)})",
    )
    one.add_argument(
        "--field", default="caption", help="the field with the texts (default caption)"
    )
    one.add_argument("--size", type=int, default=4096, help="number of pieces (default 4096)")
    one.add_argument("--out", required=True, help="the file to write")
    one.add_argument(
        "--limit",
        type=int,
        default=0,
        help="number of examples to read, spread evenly; 0 for all (default)",
    )
    one.add_argument("--model_type", default="bpe", help="bpe (default) or unigram")
    one.add_argument(
        "--normalization",
        default="nmt_nfkc_cf",
        help="a SentencePiece rule: nmt_nfkc_cf folds case (default), nmt_nfkc keeps it",
    )
    one.add_argument("--force", action="store_true", help="replace the file")
    other = verbs.add_parser(
        "show", help="print size, special tokens and pieces", description="Print what a tokenizer holds.",
        allow_abbrev=False,
    )  # fmt: skip
    other.add_argument("file", help="a SentencePiece model or a tokenizer.json")
    other.add_argument("text", nargs="?", help="a text to cut into pieces")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments, overrides = flags.parse(parser, argv)
    if overrides:
        raise UserError(f"--config.{overrides[0]}: a tokenizer has no config.")
    {"train": _train, "show": _show}[arguments.verb](arguments)
    return 0


if __name__ == "__main__":
    errors.run(main)
