"""Files that are whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bucket import bucket
from etils import epath

from mmjax.core.files import replace_file


@pytest.mark.parametrize("remote", [False, True])
def test_a_file_is_replaced_as_a_whole(remote: bool, tmp_path: Path) -> None:
    folder = bucket() if remote else epath.Path(tmp_path)
    for content in (b"one", b"\x00\xff" * 1000, b""):
        replace_file(folder / "file", content)
        assert (folder / "file").read_bytes() == content
    assert [p.name for p in folder.iterdir()] == ["file"]


def test_a_full_disk_leaves_the_old_file_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = epath.Path(tmp_path) / "file"
    replace_file(path, b"old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=str(path)):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
