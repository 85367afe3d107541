"""Compare every system with one device on every mesh of eight, and write a table of it.

    python -m tests.pod.matrix [--systems=coca,imp] [--meshes="data 8,fsdp 8"] [--out=docs/results/sharding.md]

Whoever closes an issue runs it and commits the table. A system is a name of `SETTINGS` or a config file; by default all
systems are compared on all meshes of `CASES`, which takes about half an hour. The command fails where a difference is
more than rounding, or where XLA makes an array whole to move it. `--extra=FOLDER` is that of `mmjax train`.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from sharded import CASES, CLOSE, CONTROL, ROOT, WARNING, run_apart  # noqa: E402

# A system's settings differ in sizes (tests/test_recipes*.py), which `small` sets. Of IMP's and LIMoE's, the one that
# has dense layers and experts; the layers of Mixture-of-Transformers are MoMa's.
SETTINGS = {
    "clip": ":l14", "coca": ":2b", "imp": ":moe-b", "limoe": ":b16", "lit": ":b16", "mbt": ":b",
    "mixture_of_mamba": ":1b", "moma": ":1b", "quickstart": "", "siglip": ":so400m", "transfusion": ":7b",
    "zorro": ":b",
}  # fmt: skip
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
OPTIONS = ("systems", "meshes", "out", "extra")
OUT = "docs/results/sharding.md"
TIMEOUT = 3600  # seconds for a system


@dataclass(frozen=True)
class Row:
    """A system's largest difference on each mesh, and the meshes on which XLA made an array whole."""

    system: str
    tasks: int
    largest: Mapping[str, float]
    is_whole: frozenset[str]

    @property
    def is_right(self) -> bool:
        """Return whether every difference is rounding and no array was made whole."""
        return all(x < CLOSE for x in self.largest.values()) and not self.is_whole


def file_of(system: str) -> str:
    """Return the config of a system."""
    return f"configs/{system}.py{SETTINGS[system]}" if system in SETTINGS else system


def row(system: str, cases: Sequence[str], extra: str = "") -> Row:
    """Compare a system with one device, in a process of its own."""
    file = file_of(system)
    words = [f"--extra={extra}"] if extra else []
    meshes = f"--meshes={','.join(cases)}"
    results, said = run_apart("sharded.py", meshes, *words, file, timeout=TIMEOUT)
    warned = {name for name, text in said.items() if WARNING in text}
    if CONTROL not in warned:
        raise RuntimeError("XLA did not warn of the control: its warnings cannot be read.")
    by_case = results[file]["cases"]
    largest = {
        case: max(worst[0] for kinds in by_case[case].values() for worst in kinds.values())
        for case in cases
    }
    is_whole = frozenset(c for c in cases if any(n.startswith(f"{file} / {c} /") for n in warned))
    return Row(system, len(results[file]["moved"]), largest, is_whole)


def table(rows: Sequence[Row], cases: Sequence[str], command: str) -> str:
    """Return the page in markdown."""
    missing = [name for name in SETTINGS if name not in {r.system for r in rows}]
    left_out = [case for case in CASES if case not in cases]
    lines = [
        "# Systems on meshes",
        "",
        "The largest difference from one device in the loss, the gradient and the state after one step, over all",
        "tasks of a system, relative to the largest entry of the array, in float64 on eight simulated devices. Each",
        f"system is made small. Rounding stays below {CLOSE:.0e}. A star marks a mesh on which XLA made an array",
        "whole to move it.",
        "",
        f"    {command}",
        "",
        f"Commit {commit()}; Python {platform.python_version()}; "
        + ", ".join(f"{name} {version(name)}" for name in PACKAGES)
        + ".",
        "",
    ]
    if missing or left_out:
        systems = f"systems {', '.join(missing)}" if missing else ""
        meshes = f"meshes {', '.join(left_out)}" if left_out else ""
        lines += [f"Not run here: {'; '.join(filter(None, [systems, meshes]))}.", ""]
    lines.append(f"| mesh | {' | '.join(f'{r.system} ({r.tasks})' for r in rows)} |")
    lines.append(f"| --- |{' ---: |' * len(rows)}")
    for case in cases:
        cells = [f"{r.largest[case]:.0e}{'*' if case in r.is_whole else ''}" for r in rows]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "In brackets: the number of tasks.", ""])


def commit() -> str:
    """Return the commit, `-dirty` with changes that are not committed, or `unknown`."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> None:
    """Write the table."""
    options = dict(word.removeprefix("--").partition("=")[::2] for word in sys.argv[1:])
    unknown = set(options) - set(OPTIONS)
    cases = options["meshes"].split(",") if "meshes" in options else list(CASES)
    if unknown or not set(cases) <= set(CASES):
        sys.exit(
            f"The options are {', '.join(f'--{o}=' for o in OPTIONS)}; meshes are among {list(CASES)}."
        )
    systems = options["systems"].split(",") if "systems" in options else list(SETTINGS)
    rows = []
    for system in systems:
        rows.append(row(system, cases, options.get("extra", "")))
        print(f"{system}: at most {max(rows[-1].largest.values()):.0e}", flush=True)
    words = [f'"{word}"' if " " in word else word for word in sys.argv[1:]]
    page = table(rows, cases, " ".join(["python -m tests.pod.matrix", *words]))
    out = Path(options.get("out", ROOT / OUT))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page)
    wrong = [r.system for r in rows if not r.is_right]
    if wrong:
        sys.exit(f"More than rounding, or arrays made whole: {', '.join(wrong)}; see {out}.")


if __name__ == "__main__":
    main()
