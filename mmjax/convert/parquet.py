"""Parquet files: each row is an example, each column a field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from mmjax.convert.values import Found, Raw
from mmjax.core.errors import UserError

_BATCH = 64  # rows held at once
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*")


def read_parquet(file: epath.Path, fields: frozenset[str]) -> Iterator[Found]:
    """Yield the rows as examples."""
    import pyarrow
    import pyarrow.parquet as pq

    row = 0
    images: set[str] | None = None
    try:
        with file.open("rb") as opened:
            table = pq.ParquetFile(opened, pre_buffer=False, page_checksum_verification=True)
            columns = _columns(file, table.schema_arrow, fields)
            for batch in table.iter_batches(_BATCH, columns=columns, use_threads=False):
                names, values = batch.schema.names, zip(*map(_raw, batch.columns), strict=True)
                rows = [dict(zip(names, cells, strict=True)) for cells in values]
                images = _image_columns(rows) if images is None else images
                for cells in rows:
                    yield Found(f"{file.name}, row {row}", _present(cells, images))
                    row += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read after row {row}: {error}") from error


def _raw(column: Any) -> list[Raw]:
    """Return (kind, value) of each row; texts as bytes, which are checked one by one."""
    import pyarrow
    from pyarrow import types as t

    if t.is_string(column.type) or t.is_large_string(column.type):
        return [("text", v) for v in column.cast(pyarrow.large_binary()).to_pylist()]
    if t.is_struct(column.type):
        return [("file", v) for v in column.to_pylist()]
    return [("value", v) for v in column.to_pylist()]


def _present(row: Mapping[str, Raw], images: set[str]) -> dict[str, Raw]:
    """Return the fields of a row that are not null, those of image columns marked as such."""
    present = {name: raw for name, raw in row.items() if raw[1] is not None}
    for name in images & present.keys():
        kind, data = present[name]
        if kind == "value":
            present[name] = ("image", data)
        elif data["bytes"] is not None:
            present[name] = ("image", data["bytes"])
    return present


def _columns(file: epath.Path, schema: Any, fields: frozenset[str]) -> list[str]:
    missing = fields - set(schema.names)
    columns = [name for name in schema.names if not fields or name in fields]
    if not columns:
        raise UserError(
            f"{file} has no column {min(missing)!r}; it has: {', '.join(schema.names)}."
        )
    if len(set(columns)) < len(columns):
        raise UserError(f"{file} has two columns of one name: {', '.join(columns)}.")
    for name in columns:
        if not _fits(schema.field(name).type):
            raise UserError(
                f"{file}: column {name!r} has type {schema.field(name).type}, which a record cannot hold. "
                "Choose the columns to take by --field."
            )
    return columns


def _fits(kind: Any) -> bool:
    """Return whether a type can be read: texts, bytes, numbers, lists of them, and `{bytes, path}`."""
    from pyarrow import types as t

    if t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    if t.is_struct(kind):
        content = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else None
        return content is not None and (t.is_binary(content) or t.is_null(content))
    return _is_plain(kind)


def _is_plain(kind: Any) -> bool:
    from pyarrow import types as t

    if t.is_dictionary(kind):
        return _is_plain(kind.value_type)
    checks = (
        t.is_string, t.is_large_string, t.is_binary, t.is_large_binary, t.is_fixed_size_binary,
        t.is_integer, t.is_boolean, t.is_floating, t.is_null,
    )  # fmt: skip
    return any(check(kind) for check in checks)


def _image_columns(rows: Sequence[Mapping[str, Raw]]) -> set[str]:
    """Return the columns most of whose values begin as an image file does."""
    counts: dict[str, int] = {}
    for row in rows:
        for name, (kind, data) in row.items():
            content = data["bytes"] if kind == "file" and data is not None else data
            if kind != "text" and isinstance(content, bytes):
                counts[name] = counts.get(name, 0) + (1 if _is_image(content) else -1)
    return {name for name, count in counts.items() if count > 0}


def _is_image(data: bytes) -> bool:
    return data.startswith(_MAGIC) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
