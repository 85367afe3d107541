"""Check which reader reads which source."""

from __future__ import annotations

from pathlib import Path

import pytest
from conversions import (
    says,
    write_tar,
)

from mmjax.convert.convert import convert


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "a.tar", [(f"{i}.txt", b"%d" % i) for i in range(10)])


def test_sources_that_make_no_sense(small: Path, tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"PK")
    (tmp_path / "in").mkdir()
    (tmp_path / "too").mkdir()
    out = tmp_path / "out"
    for sources, words in [
        (["nowhere.tar"], "There is no nowhere.tar"),
        ([tmp_path / "no*.tar"], "There is no"),
        ([tmp_path / "x.zip"], "x.zip is none of: .tar, .tar.gz"),
        ([small, tmp_path / "in"], "of several kinds (folder, tar)"),
        ([small, small], "a.tar is given twice"),
        ([tmp_path / "in", tmp_path / "too"], "Only one folder"),
    ]:
        says(words, lambda sources=sources: convert(sources, out))
    says("--split=../x: a name", lambda: convert([small], out, split="../x"))
    says("--shards=0", lambda: convert([small], out, shards=0))
    says("give the folder a name", lambda: convert([small], "."))
    assert not out.exists()
