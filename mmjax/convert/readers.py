"""Readers of other formats, for `mmjax convert`: tars, Parquet files, folders of images.

A reader yields one `Found` at a time. Nothing is ever extracted to disk, no link is followed, and names
inside an archive or a table are data: none becomes a path outside the folder that was given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from etils import epath

from mmjax.convert.folder import read_folder
from mmjax.convert.parquet import read_parquet
from mmjax.convert.tar import SUFFIXES, read_tar
from mmjax.convert.values import Found, Ignored
from mmjax.core.errors import UserError


def find(sources: Sequence[epath.PathLike]) -> tuple[str, list[epath.Path]]:
    """Return the kind of the sources, and their files (a folder is one)."""
    files = [file for source in sources for file in _matching(epath.Path(source).expanduser())]
    if len(set(files)) < len(files):
        raise UserError(f"{max(files, key=files.count)} is given twice.")
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1:
        raise UserError(
            f"The sources are of several kinds ({', '.join(sorted(kinds))}): convert each alone."
        )
    if kinds == {"folder"} and len(files) > 1:
        raise UserError("Only one folder of images can be converted at a time.")
    return kinds.pop(), files


def _matching(path: epath.Path) -> list[epath.Path]:
    if path.exists():
        return [path]
    result = sorted(path.parent.glob(path.name)) if any(c in path.name for c in "*?[") else []
    if not result:
        raise UserError(f"There is no {path}.")
    return result


def _kind(file: epath.Path) -> str:
    name = file.name.lower()
    if file.is_dir():
        return "folder"
    if any(name.endswith(suffix) for suffix in SUFFIXES):
        return "tar"
    if name.endswith(".parquet"):
        return "parquet"
    raise UserError(f"{file} is none of: {', '.join(SUFFIXES)}, .parquet, a folder of images.")


def read(
    kind: str, files: Sequence[epath.Path], ignored: Ignored, fields: frozenset[str]
) -> Iterator[Found]:
    """Yield the examples of all files in order; only `fields`, if that saves reading (all if empty)."""
    for file in files:
        if kind == "tar":
            yield from read_tar(file, ignored)
        elif kind == "parquet":
            yield from read_parquet(file, fields)
        else:
            yield from read_folder(file, ignored)
