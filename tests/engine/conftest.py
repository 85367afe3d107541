"""Stores of a lease."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensorstore

from mmjax.engine.lease_store import FileStore, ObjectStore, Store


@pytest.fixture(params=["files", "memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "files":
        return FileStore(tmp_path)
    spec = {"memory": {"driver": "memory"}, "file": {"driver": "file", "path": f"{tmp_path}/"}}
    return ObjectStore(tensorstore.KvStore.open(spec[request.param]).result())
