"""One process of a run that notes which examples it places on its devices.

    python tests/pod/member.py OUT SECONDS --config=FILE --workdir=DIR --coordinator=... [...]

takes the arguments of `mmjax train` after its own, and writes OUT/PROCESS.ATTEMPT.jsonl: of each step a
line [first row, ids]. SECONDS makes every step last that much longer, so that a signal finds one. With MEMBER_SLOW =
PROCESS:SECONDS in the environment, the loader of that process takes so much longer for each batch; with
MEMBER_UNREADABLE = PROCESS its disk fails when it reads arrays.

Processes notice after `HEARTBEAT` seconds that another is gone; JAX's own default is 100. Each keeps its programs in
JAX's cache; JAX itself stores those of process 0 only, and the others' differ on CPUs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from jax._src import compilation_cache, compiler

from mmjax import train
from mmjax.core import errors
from mmjax.engine import arrays, loader
from mmjax.engine.loader import _make_rows, place
from mmjax.training import flight

HEARTBEAT = 10


def main() -> int:
    out, seconds, *words = sys.argv[1:]
    files: list[Any] = []

    def noted(rows: Any, start: int, *more: Any) -> Any:
        if not files:
            name = f"{jax.process_index()}.{time.time_ns()}.jsonl"
            files.append((Path(out) / name).open("w", buffering=1))
        ids = [int(i) for i in rows.fields["id"]]
        files[0].write(json.dumps([start, ids]) + "\n")
        time.sleep(float(seconds))
        return place(rows, start, *more)

    def slowly(*arguments: Any) -> Any:
        index, _, more = os.environ.get("MEMBER_SLOW", "").partition(":")
        if index == str(jax.process_index()):
            time.sleep(float(more))
        return _make_rows(*arguments)

    def fallibly(*arguments: Any) -> None:
        if os.environ.get("MEMBER_UNREADABLE") == str(jax.process_index()):
            raise OSError(5, "Input/output error", "a disk")
        read_part(*arguments)

    def cached(key: str, seconds: float, name: str, backend: Any, program: Any, *_: Any) -> None:
        compilation_cache.put_executable_and_time(key, name, program, backend, int(seconds))

    read_part = arrays._read_part
    join = partial(jax.distributed.initialize, heartbeat_timeout_seconds=HEARTBEAT)
    with (
        mock.patch.object(jax.distributed, "initialize", join),
        mock.patch.object(compiler, "_cache_write", cached),
        mock.patch.object(flight, "place", noted),
        mock.patch.object(loader, "_make_rows", slowly),
        mock.patch.object(arrays, "_read_part", fallibly),
    ):
        return train.main(words)


if __name__ == "__main__":
    errors.run(main)
