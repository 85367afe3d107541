"""The benchmark of checksums: three ways to save that differ in what they store, not in what they restore."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import checksums
from benchmarks._pairs import Effort
from benchmarks.checkpoints import _on_device


def test_all_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "SIZES", (0.001,))
    found = {each.name: each for each in checksums.measure(Effort({}, 3, 1))}
    for kind in ("saved", "restored"):
        for name in ("format 2", "crc32c"):
            assert len(found[f"0.001 GB, {kind}: {name} to format 1"].values) == 3
        assert min(found[f"0.001 GB, {kind}: format 1"].values) > 0


@pytest.mark.parametrize(("options", "is_found"), [({}, False), ({"use_zarr3": True}, True)])
def test_only_the_codec_finds_a_changed_byte(
    tmp_path: Path, options: dict[str, bool], is_found: bool
) -> None:
    values = {"x": np.arange(4096, dtype=np.float32)}
    with checksums._crc32c():
        peer = checksums._orbax(*_on_device(values), options)
        peer.save(tmp_path)()
    (path,) = (p for p in tmp_path.rglob("d/*") if p.stat().st_size > 4 * 4096 - 1)
    content = bytearray(path.read_bytes())
    at = content.index(values["x"][:2048].tobytes())
    content[at + 100] ^= 1
    path.write_bytes(content)
    if is_found:
        with pytest.raises(Exception, match="array index") as error:
            peer.restore(tmp_path)
        assert "Digest mismatch" in str(error.value.__cause__)
    else:
        assert not np.array_equal(peer.restore(tmp_path)["x"], values["x"])
