"""Change the meta data of a checkpoint as somebody would who can seal them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmjax.engine.integrity import seal, unseal


@contextmanager
def edited(workdir: Path, step: int) -> Iterator[dict[str, Any]]:
    """Give the meta data of a checkpoint, and write what is made of them, with a new checksum."""
    path = Path(workdir) / "checkpoints" / str(step) / "meta" / "metadata"
    meta = unseal(json.loads(path.read_text()), "meta data")
    yield meta
    path.write_text(json.dumps(seal(meta)))
