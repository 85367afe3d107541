"""Turn data of other formats into ArrayRecord files that `array_record` sources read.

    mmjax convert SOURCE [SOURCE ...] --out=DIR [--split=NAME] [--shards=N]
        [--field=NAME[:TYPE][=A,B] ...] [--max_bad=N] [--max_pixels=N] [--force]

SOURCE is of one of three kinds (quote a pattern such as 'pets-*.tar', or let the shell expand it):

- WebDataset tars (.tar, .tar.gz, .tgz, .tar.bz2, .tar.xz): members of one stem, which lie together, are
  an example, and each extension is a field: `0001.jpg`, `0001.txt` give `jpg` and `txt`.
- Parquet files: each row is an example, each column a field. A null means that the example lacks the field.
- A folder of images, with a text file `NAME.txt` beside each or one table for all, `captions.csv`, `.tsv`
  or `.jsonl` with columns `file` and `caption` (others become fields): the fields are `image`, `caption`.

DIR (DIR/NAME with a split) then holds records as `tf.train.Example`, dealt over N files in turn, and
`manifest.json`. It appears whole or not at all, and the same data give the same bytes. In a config:

    source = {"name": "array_record", "path": "DIR"}

Encoded images stay as they are, but each is decoded once as a check. Texts are UTF-8 bytes, integers
int64, other numbers float32. A column of a .csv or .tsv table is one of integers where every cell is an
integer or empty; `--field=label:int` (or `float`, `text`) states a field's type. Tars and folders also
give `__key__`, the stem. `--field` takes only the fields named, and every example must have them;
`--field=image=jpg,png` takes whichever is there as `image`. Damaged examples, duplicates and
examples without a caption are counted and named; more than `--max_bad` (0) of them end the conversion.
One example at a time is in memory, whatever the size of the source.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from etils import epath

from mmjax.convert import readers
from mmjax.convert.readers import Found, Ignored
from mmjax.convert.values import KEY, TYPES, Value, plain_words, type_of, value_of
from mmjax.core import errors, flags
from mmjax.core.errors import UserError
from mmjax.core.files import new_folder, swap_in
from mmjax.data import pictures

FORMAT = 1
MANIFEST = "manifest.json"
MADE_BY = "mmjax.convert.convert"
_KINDS = {"tar": "tar", "parquet": "Parquet file", "folder": "folder"}
_LOG_SECONDS = 10.0

Json = dict[str, Any]
Fields = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Converted:
    """A finished conversion: its folder and its manifest."""

    path: epath.Path
    manifest: Json


def convert(
    sources: Sequence[epath.PathLike],
    out: epath.PathLike,
    *,
    split: str = "",
    shards: int = 1,
    fields: Fields | None = None,
    types: Mapping[str, str] | None = None,
    max_bad: int = 0,
    max_pixels: int = pictures.MAX_PIXELS,
    force: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> Converted:
    """Convert `sources` into the folder `out` (or its folder `split`).

    Args:
      sources: paths or patterns, of one kind.
      out: made if it is not there.
      split: a name for the part of the data; the label of its results.
      shards: number of files, at most the number of examples.
      fields: name -> fields of the source of which an example has exactly one; None takes all.
      types: name -> `int`, `float` or `text`, of fields whose type is not to be that of the source.
      max_bad: number of examples that may be skipped.
      max_pixels: pixels of a picture, beyond which it is not decoded.
      force: replace an earlier conversion.
      log: called with a line of progress every few seconds.

    Raises:
      UserError: what is wrong with the source, where; no part of the output remains.
    """
    if shards < 1 or max_bad < 0:
        raise UserError(
            f"--shards={shards} --max_bad={max_bad}: at least 1 file, and no less than 0."
        )
    if not re.fullmatch(r"(\w[\w.-]*)?", split):
        raise UserError(f"--split={split}: a name of letters, digits, '_', '-' and '.'.")
    pictures.check_bound(max_pixels, "--max_pixels")
    kind, files = readers.find(sources)
    path = epath.Path(out).expanduser() / split
    if path.name in ("", ".."):
        raise UserError(f"--out={out}: give the folder a name.")
    _check_free(path, force)
    ignored = Ignored()
    choice = _Choice(fields, types or {}, max_pixels)
    fields_read = {old for olds in (fields or {}).values() for old in olds}
    examples = readers.read(kind, files, ignored, frozenset(fields_read))
    with _part(path) as part, _local(part) as folder:
        names = [f"{path.name}-{i:05d}-of-{shards:05d}.array_record" for i in range(shards)]
        tally = _write(examples, [folder / n for n in names], choice, max_bad, log)
        manifest = {
            "made_by": MADE_BY,
            "format": FORMAT,
            "source": {"kind": kind, "files": [file.name for file in files]},
            "split": split,
            **dataclasses.asdict(tally),
            "ignored": dataclasses.asdict(ignored),
            "files": {n: _file_facts(folder / n) for n in names},
        }
        _copy(folder, part, names)
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        swap_in(part, path)
    return Converted(path, manifest)


# --- examples to records -----------------------------------------------------------------------


@dataclass
class Tally:
    """Counts of what was written.

    Attributes:
      examples: how many.
      digest: SHA-256 of the records' bytes in the order of the source.
      fields: name -> type and the number of examples that have it.
      bad: skipped examples, and why.
    """

    examples: int = 0
    digest: str = ""
    fields: dict[str, Json] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)

    def add(self, example: Mapping[str, Value]) -> None:
        self.examples += 1
        for name, value in example.items():
            known = self.fields.setdefault(name, {"type": type_of(value), "examples": 0})
            known["examples"] += 1

    def check_types(self, example: Mapping[str, Value]) -> None:
        """Raise `ValueError` if a field has another type than before."""
        for name, value in example.items():
            kind, known = type_of(value), self.fields.get(name, {}).get("type")
            if known and kind != known:
                raise ValueError(f"field {name!r} is {kind}, in examples before it is {known}")

    def skip(self, where: str, error: Exception, max_bad: int) -> None:
        self.bad.append(f"{where}: {error}".rstrip("."))
        if len(self.bad) > max_bad:
            raise UserError(
                f"{_count(len(self.bad), 'bad example')}, over --max_bad={max_bad}; {self.examples} good "
                f"so far. {'; '.join(self.bad[-3:])}. Fix the source, or allow more bad examples."
            )


def _write(
    examples: Iterator[Found], files: Sequence[epath.Path], choice: _Choice, max_bad: int,
    log: Callable[[str], None],
) -> Tally:  # fmt: skip
    """Write the examples that are whole, dealt over the files in turn."""
    tally, digest, last_logged = Tally(), hashlib.sha256(), time.monotonic()
    with _Files(files) as writers:
        for source_example in examples:
            try:
                example = choice.take(source_example)
                tally.check_types(example)
            except ValueError as error:
                tally.skip(source_example.where, error, max_bad)
                continue
            record = _record(example)
            writers.write(tally.examples % len(files), record)
            digest.update(len(record).to_bytes(8, "little") + record)
            tally.add(example)
            if time.monotonic() - last_logged > _LOG_SECONDS:
                last_logged = time.monotonic()
                log(f"{tally.examples:,} examples so far")
    if tally.examples < len(files):
        raise UserError(
            f"The source has {_count(tally.examples, 'example')}, which do not fill --shards={len(files)}."
            f"{' Skipped: ' + tally.bad[0] if tally.bad else ''}"
        )
    return dataclasses.replace(tally, digest=digest.hexdigest())


@dataclass(frozen=True)
class _Choice:
    """The choice of fields of an example, their types, and the bound of its pictures."""

    fields: Fields | None
    types: Mapping[str, str]
    max_pixels: int

    def take(self, record: Found) -> dict[str, Value]:
        """Return the chosen fields, decoded as far as it takes to check them; `ValueError` if anything is wrong."""
        if record.fault:
            raise ValueError(record.fault)
        sources = {name: name for name in record.raw}
        if self.fields is not None:
            sources = {name: _only(record, olds) for name, olds in self.fields.items()}
            sources |= {KEY: KEY} if KEY in record.raw else {}
        example = {}
        for name, old in sources.items():
            try:
                value = value_of(*record.raw[old], self.types.get(name, ""), self.max_pixels)
            except Exception as error:  # any error of a decoder on damaged bytes
                raise ValueError(f"field {old!r}: {plain_words(error)}") from error
            if value is not None:
                example[name] = value
        missing = [name for name in self.fields or {} if name not in example]
        if missing:
            raise ValueError(f"field {missing[0]!r} is empty")
        if not example.keys() - {KEY}:
            raise ValueError("has no fields")
        return example


def _only(record: Found, olds: Sequence[str]) -> str:
    there = [old for old in olds if old in record.raw]
    if len(there) != 1:
        words = " or ".join(map(repr, olds))
        raise ValueError(f"has no {words}" if not there else f"has more than one of {words}")
    return there[0]


def _record(example: Mapping[str, Value]) -> bytes:
    """Return a `tf.train.Example`; equal examples give equal bytes."""
    from tensorflow_datasets.proto import tf_example_pb2 as pb

    message = pb.Example()
    for name, value in example.items():
        feature = message.features.feature[name]
        values = value if isinstance(value, list) else [value]
        lists = {
            "bytes": feature.bytes_list, "int64": feature.int64_list, "float32": feature.float_list
        }  # fmt: skip
        lists[type_of(value)].value.extend(values)
    record: bytes = message.SerializeToString(deterministic=True)
    return record


class _Files:
    """ArrayRecord files under way; leaving closes them, and only then is all known to be written."""

    def __init__(self, files: Sequence[epath.Path]):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._files = files
        try:
            self._writers = [ArrayRecordWriter(str(f), "group_size:1") for f in files]
        except RuntimeError as error:
            raise UserError(f"Cannot make {len(files)} files: {_reason(error)}") from error

    def __enter__(self) -> _Files:
        return self

    def write(self, index: int, record: bytes) -> None:
        """Write a record some records later; a failure may show only then, or at the end."""
        try:
            self._writers[index].write(record)
        except RuntimeError as error:
            raise UserError(f"Cannot write {self._files[index]}: {_reason(error)}") from error

    def __exit__(self, kind: Any, *_: object) -> None:
        for index in range(len(self._files)):
            if kind is None:
                self._close(index)
            else:
                with contextlib.suppress(UserError):
                    self._close(index)

    def _close(self, index: int) -> None:
        try:
            self._writers[index].close()
        except RuntimeError as error:
            raise UserError(f"Cannot write {self._files[index]}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return the first part of ArrayRecord's message."""
    return str(error).split("; ")[0]


# --- files -------------------------------------------------------------------------------------


def _file_facts(file: epath.Path) -> Json:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(file))
    records = int(reader.num_records())
    try:
        reader.close()
    except RuntimeError as error:
        raise UserError(f"{file} was written but cannot be read: {_reason(error)}") from error
    with file.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"examples": records, "bytes": file.stat().length, "sha256": sha256}


def _check_free(path: epath.Path, force: bool) -> None:
    """Raise `UserError` unless the folder is missing, empty, or an earlier conversion that may be replaced."""
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"--out: {path} is a file. Give a folder.")
    present = {file.name for file in path.iterdir()}
    replaceable = {MANIFEST, *_own_files(path)}
    if present - replaceable:
        raise UserError(
            f"{path} holds other files ({min(present - replaceable)}), which a conversion would replace. "
            "Give --out a new folder."
        )
    if present and not force:
        raise UserError(f"{path} holds a conversion already. Add --force to replace it.")


def _own_files(path: epath.Path) -> set[str]:
    """Return the files that the manifest of an earlier conversion names."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        return set(manifest["files"]) if manifest["made_by"] == MADE_BY else set()
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return set()


@contextlib.contextmanager
def _part(path: epath.Path) -> Iterator[epath.Path]:
    """Make a new folder near `path` (see `new_folder`), or raise an error if `--out` cannot be written to."""
    with contextlib.ExitStack() as stack:
        try:
            part = stack.enter_context(new_folder(path))
        except OSError as error:
            raise UserError(
                f"--out: cannot write to {path.parent}: {error.strerror or error}."
            ) from error
        yield part


@contextlib.contextmanager
def _local(part: epath.Path) -> Iterator[epath.Path]:
    """Yield `part` itself, or a temporary folder if it is remote: ArrayRecord writes to local disks only."""
    if "://" not in os.fspath(part):
        yield part
        return
    with tempfile.TemporaryDirectory(prefix="mmjax-convert-") as scratch:
        yield epath.Path(scratch)


def _copy(folder: epath.Path, part: epath.Path, names: Sequence[str]) -> None:
    if folder != part:
        for name in names:
            (folder / name).copy(part / name)


# --- the command -------------------------------------------------------------------------------


def summary(converted: Converted, seconds: float) -> str:
    """Return a summary of a conversion in a few lines."""
    facts = converted.manifest
    size = sum(file["bytes"] for file in facts["files"].values()) / 2**20
    lines = [
        f"{facts['examples']:,} examples from {_count(len(facts['source']['files']), _KINDS[facts['source']['kind']])}"
        f", {size:.1f} MiB in {_count(len(facts['files']), 'file')}, {seconds:.1f} s"
    ]
    for name, known in sorted(facts["fields"].items()):
        lacking = facts["examples"] - known["examples"]
        lines.append(
            f"  {name:<16}{known['type']:<8}{f'missing in {lacking:,}' if lacking else ''}".rstrip()
        )
    if facts["bad"]:
        lines.append(
            f"skipped: {_count(len(facts['bad']), 'bad example')}, named in {MANIFEST}; the first:"
        )
        lines.append(f"  {facts['bad'][0]}")
    if facts["ignored"]["count"]:
        lines.append(f"ignored: {_count(facts['ignored']['count'], 'file')} of no field, such as "
                     f"{facts['ignored']['names'][0]}")  # fmt: skip
    source = json.dumps({"name": "array_record", "path": str(converted.path)})
    return "\n".join([*lines, f"source = {source}"])


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _fields_and_types(arguments: Sequence[str]) -> tuple[Fields | None, dict[str, str]]:
    """Return the fields and types that arguments `NAME`, `NAME:TYPE`, `NAME=A,B` or `NAME:TYPE=A,B` state."""
    fields: dict[str, tuple[str, ...]] = {}
    types: dict[str, str] = {}
    for argument in arguments:
        head, _, olds = argument.partition("=")
        begin, _, end = head.rpartition(":")
        name, as_type = (begin, end) if ":" in head and end in TYPES else (head, "")
        if not name or name in fields or (olds and not all(olds.split(","))):
            raise UserError(
                f"--field={argument}: write NAME, NAME:TYPE or NAME=A,B, each NAME once; TYPE is "
                f"{', '.join(TYPES)}."
            )
        fields[name] = tuple(olds.split(",")) if olds else (name,)
        types |= {name: as_type} if as_type else {}
    return fields or None, types


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = flags.plain_command("convert", __doc__)
    parser.add_argument(
        "source", nargs="+", metavar="SOURCE", help="tars, Parquet files or a folder of images"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--split", default="", metavar="NAME", help="make DIR/NAME; the label of its results"
    )
    parser.add_argument(
        "--shards", type=int, default=1, metavar="N", help="number of files (default 1)"
    )
    parser.add_argument(
        "--field", action="append", default=[], metavar="NAME[:TYPE][=A,B]", help="take only fields that are named"
    )  # fmt: skip
    parser.add_argument(
        "--max_bad", type=int, default=0, metavar="N", help="examples that may be excluded"
    )
    parser.add_argument(
        "--max_pixels", type=int, default=pictures.MAX_PIXELS, metavar="N", help="pixels of a picture at most"
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace an earlier conversion")
    args = parser.parse_args(argv)
    fields, types = _fields_and_types(args.field)
    start = time.perf_counter()
    converted = convert(
        args.source, args.out, split=args.split, shards=args.shards, fields=fields, types=types,
        max_bad=args.max_bad, max_pixels=args.max_pixels, force=args.force,
        log=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    print(summary(converted, time.perf_counter() - start))


if __name__ == "__main__":
    errors.run(main)
