"""The command that trains tokenizers and shows them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizer_files as files
from etils import epath
from mains import Ended, run

from mmjax import tokenizer
from mmjax.core.errors import UserError
from mmjax.data.tokenizer import Tokenizer, train
from mmjax.tokenizer import read_corpus

TEXTS = [*files.TEXTS, "größer als 波"]


def call(*words: Any) -> Ended:
    return run(tokenizer.main, *map(str, words))


def records(folder: Path, examples: Sequence[Mapping[str, list[bytes]]]) -> Path:
    """Return a folder of two ArrayRecord files that hold the examples in order."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2 as pb

    folder.mkdir()
    half = len(examples) // 2
    for number, part in enumerate((examples[:half], examples[half:])):
        writer = ArrayRecordWriter(str(folder / f"a-{number:05d}.array_record"), "group_size:1")
        for example in part:
            message = pb.Example()
            for name, values in example.items():
                message.features.feature[name].bytes_list.value.extend(values)
            writer.write(message.SerializeToString())
        writer.close()
    return folder


def source(kind: str, folder: Path) -> Path:
    """Return the texts in a source of this kind, in the field `caption`."""
    path = folder / f"texts.{kind}"
    if kind == "txt":
        path.write_text("\n".join([*TEXTS[:3], "", *TEXTS[3:]]))
    elif kind == "csv":
        rows = [f'{i},"{text}"' for i, text in enumerate(TEXTS)]
        path.write_text("\n".join(["id,caption", *rows, "99,"]))
    elif kind == "tsv":
        path.write_text("\n".join(["caption\tid", *(f"{text}\t1" for text in TEXTS)]))
    elif kind == "jsonl":
        lines = [json.dumps({"caption": text}) for text in TEXTS[2:]]
        path.write_text("\n".join([json.dumps({"caption": TEXTS[:2]}), *lines, '{"id": 1}']))
    else:
        several = [{"caption": [t.encode() for t in TEXTS[:2]]}]
        records(path, several + [{"caption": [t.encode()]} for t in TEXTS[2:]])
    return path


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "jsonl", "records"])
def test_every_source_gives_the_same_file(tmp_path: Path, kind: str) -> None:
    """That of training on the texts themselves, byte by byte."""
    expected = train(TEXTS, tmp_path / "expected.model", vocab_size=380)
    out = tmp_path / "new" / "my.model"
    ended = call("train", source(kind, tmp_path), "--field=caption", "--size=380", f"--out={out}")
    assert (ended.status, ended.err) == (0, "")
    assert out.read_bytes() == expected.path.read_bytes()
    assert f'tokenizer = "{out}", vocabulary = 380' in ended.out
    assert f"{len(TEXTS)} texts" in ended.out
    lacks = {"txt": "1", "csv": "1", "jsonl": "1"}.get(kind)
    assert ("Examples without a text in field 'caption': 1" in ended.out) == (lacks is not None)


def test_a_data_set_by_its_name(emoji_dir: epath.Path, tmp_path: Path) -> None:
    out = tmp_path / "e.model"
    words = ("--limit=64", "--size=400", f"--out={out}")
    assert call("train", "emoji:test_concept", *words).status == 0
    corpus = read_corpus("emoji:test_concept", "caption", 64)
    assert corpus.examples == 64 == len(corpus.texts)
    assert out.read_bytes() == train(corpus.texts, tmp_path / "f.model", vocab_size=400).path.read_bytes()  # fmt: skip


def test_a_limit_spreads_over_the_examples(tmp_path: Path) -> None:
    file = tmp_path / "n.txt"
    file.write_text("\n".join(f"text {n}" for n in range(10)))
    assert read_corpus(str(file), "caption", 4).texts == ["text 0", "text 2", "text 5", "text 7"]
    assert read_corpus(str(file), "caption", 99).examples == 10


def test_case_and_kind_are_options(tmp_path: Path) -> None:
    file, out = source("txt", tmp_path), tmp_path / "u.model"
    options = ("--model_type=unigram", "--normalization=nmt_nfkc", "--size=290")
    assert call("train", file, *options, f"--out={out}").status == 0
    model = sentencepiece.SentencePieceProcessor(model_file=str(out))
    assert model.decode(model.encode("A Red Apple")) == "A Red Apple"


def test_a_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    file, out = source("txt", tmp_path), tmp_path / "my.model"
    out.write_text("precious")
    ended = call("train", file, "--size=380", f"--out={out}")
    assert ended.status == 2 and "is there already" in ended.err and out.read_text() == "precious"
    assert call("train", file, "--size=380", f"--out={out}", "--force").status == 0
    assert Tokenizer(out).vocab_size == 380
    assert sorted(p.name for p in tmp_path.iterdir()) == ["my.model", "texts.txt"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a.jsonl": '{"title": "red"}'}, ["--field=caption", "no such field", "title"]),
        ({"a.jsonl": '{"caption": 3}'}, ["example 0, field 'caption': a text is a string, found int"]),
        ({"a.jsonl": '{"caption": "\\ud800"}'}, ["half of a surrogate pair"]),
        ({"a.jsonl": "[1]"}, ["line 1 is no object"]),
        ({"a.jsonl": "{"}, ["cannot be read"]),
        ({"a.csv": "caption,id\n,1\n"}, ["has no texts in field 'caption'"]),
        ({"a.txt": ""}, ["has no texts"]),
        ({"a.parquet": ""}, ["mmjax convert"]),
        ({"a.txt": "red\n"}, ["cannot train 4096 bpe pieces"]),
        ({}, ["There is no file or folder", "tfds build"]),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on(
    tmp_path: Path, content: Mapping[str, str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMJAX_DATA_DIR", str(tmp_path / "data"))
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    where = tmp_path / next(iter(content)) if content else "nothing"
    ended = call("train", where, f"--out={tmp_path / 'o.model'}")
    assert ended.status == 2 and ended.err.count("\n") == 1, ended.err
    assert all(word in ended.err for word in words), ended.err
    assert not (tmp_path / "o.model").exists()


def test_texts_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    folder = records(tmp_path / "r", [{"caption": [b"red"]}, {"caption": [b"caf\xe9"]}])
    with pytest.raises(UserError, match="example 1, field 'caption': .*utf-8"):
        read_corpus(str(folder), "caption")


@pytest.mark.parametrize("name", ["llama2.model", "clip.json"])
def test_show_prints_size_special_tokens_and_pieces(tmp_path: Path, name: str) -> None:
    file = files.KINDS[name](tmp_path / name)
    ended = call("show", file, "a red zebra")
    assert (ended.status, ended.err) == (0, "")
    expected = Tokenizer(file)
    lines = [line.split() for line in ended.out.splitlines()]
    special = {
        "llama2.model": [["padding", "none"], ["begin", "1", "<s>"], ["end", "2", "</s>"]],
        "clip.json": [["padding", "none"], ["begin", "557", "<|startoftext|>"], ["end", "558", "<|endoftext|>"]],
    }  # fmt: skip
    assert all(line in lines for line in special[name])
    assert f"of {expected.vocab_size} ids" in ended.out and expected.digest in ended.out
    ids = files.by_the_library(file, "a red zebra")
    assert f"{len(ids)} pieces" in ended.out
    rows = [line for line in lines if len(line) == 2 and line[0].isdigit() and line[1] != "pieces"]
    assert rows == [[str(i), expected.subwords.piece(i)] for i in ids]
    assert "Decoded: 'a red zebra'" in ended.out


def test_show_finds_what_a_config_names(emoji_dir: epath.Path) -> None:
    ended = call("show", "emoji/1.0.0/tokenizer.model")
    assert ended.status == 0 and "SentencePiece model of 2,048 ids" in ended.out


def test_show_of_a_file_that_is_not_there(tmp_path: Path) -> None:
    ended = call("show", tmp_path / "a.model")
    assert ended.status == 2 and "mmjax tokenizer train SOURCE" in ended.err


def test_a_tokenizer_has_no_config(tmp_path: Path) -> None:
    ended = call("show", tmp_path / "a.model", "--config.steps=3")
    assert ended.status == 2 and "--config.steps=3: a tokenizer has no config" in ended.err
