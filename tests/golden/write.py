"""Write a golden checkpoint: PYTHONPATH=. python tests/golden/write.py tests/golden/formatN.zip

Run once for each format, by the code that writes that format first; its file is never written again.
`format1.zip` is of commit 6b61e79.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "extra"), str(HERE.parent / "pod")]

import toyrun  # noqa: E402

OVERRIDES = ("steps=4", "optimizer.ema=0.9", "tasks.one.source.corrupt=(3,)")


def main(out: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        toyrun.run(workdir, *OVERRIDES)
        held = {n: float(x.astype("float64").sum()) for n, x in toyrun.parameters(workdir).items()}
        expected = {"bits": toyrun.bits(workdir), "sums": held}
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
            for path in sorted(p for p in (workdir / "checkpoints").rglob("*") if p.is_file()):
                file.write(path, path.relative_to(workdir))
            file.write(workdir / "metrics.jsonl", "metrics.jsonl")
            file.writestr("expected.json", json.dumps(expected, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
