"""Damages and withholds the files of runs, and counts what became of each: nothing may go wrong without a word.

    python tests/pod/faults.py --seed=0 [--flips=8] [--configs=toy,experts] [--out=benchmarks/results/faults.md]

Four small runs are trained, each with checkpoints of steps 4, 8 and 12. For every injection a copy of a run is
changed or its reading is made to fail, and the run is begun again as `mmjax train` begins it. An attempt is

- `previous`: the newest checkpoint was called damaged, and the one before it was taken, in its own bits;
- `refused`: the run ended with status 2 and the cause, and no checkpoint was moved or changed;
- `harmless`: the newest checkpoint was taken, in its own bits;
- `died`: a library ended the process, and no checkpoint was moved or changed;
- `traceback`: another error came out;
- `silent`: other values were taken, or an older checkpoint without a word.

Exit status 1 if any is `silent` or a `traceback`, or is not among the outcomes that its injection allows.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "extra"), str(HERE.parent.parent)]

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import smallruns  # noqa: E402
import toyrun  # noqa: E402
from etils import epath  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

from mmjax.core import errors  # noqa: E402
from mmjax.core.sharding import make_mesh  # noqa: E402
from mmjax.core.workdir import LEASE  # noqa: E402
from mmjax.engine import arrays, checkpoint, metadata  # noqa: E402
from mmjax.engine.checkpoint import CheckpointConfig, Checkpoints, Restored  # noqa: E402
from mmjax.engine.integrity import seal  # noqa: E402
from mmjax.experiment import Experiment, make_experiment  # noqa: E402
from mmjax.training.session import begin  # noqa: E402

NEWEST, BEFORE = 12, 8
OUTCOMES = ("previous", "refused", "harmless", "died", "traceback", "silent")
SECTOR = 512


# --- runs and attempts -------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A finished small run, to be copied.

    Attributes:
      name: its config's.
      workdir: where it lies.
      expected: what its two newest checkpoints hold.
    """

    name: str
    experiment: Experiment
    workdir: Path
    expected: Mapping[int, Restored]


@dataclass(frozen=True)
class Attempt:
    """The outcome of an injection, and the words that came with it."""

    outcome: str
    words: str


def train(name: str, folder: Path) -> Run:
    """Train a small run."""
    words = ("evaluation.every=0", *smallruns.RUNS[name])
    toyrun.run(folder / name, *words)
    experiment = make_experiment(toyrun.block(*words))
    expected = {}
    for step in (BEFORE, NEWEST):
        with tempfile.TemporaryDirectory() as other:
            copy = Path(shutil.copytree(folder / name, Path(other) / "run"))
            if step == BEFORE:
                shutil.rmtree(copy / "checkpoints" / str(NEWEST))
            expected[step] = _begin(experiment, copy, print)
    return Run(name, experiment, folder / name, expected)


def _begin(experiment: Experiment, workdir: Path, say: Callable[[str], None]) -> Restored:
    mesh = make_mesh(experiment.run.mesh, jax.devices()[:1])
    restored = begin(experiment, epath.Path(workdir), mesh, False, say).restored
    assert restored is not None, "the run began at step 0"
    with Checkpoints(epath.Path(workdir), CheckpointConfig(keep=3)):
        return restored


def attempt(run: Run, injection: Injection, rng: random.Random) -> Attempt:
    """Begin a copy of a run again under an injection."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(shutil.copytree(run.workdir, Path(folder) / "run"))
        refused: str | None = None
        with injection.apply(workdir, rng):
            before = _checkpoints(workdir)
            said: list[str] = []
            try:
                restored = _begin(run.experiment, workdir, said.append)
            except Exception as error:
                refused = errors.report(error)
                if refused is None:
                    return Attempt("traceback", f"{type(error).__name__}: {error}")
        if refused is not None:
            return Attempt("refused" if _checkpoints(workdir) == before else "silent", refused)
        return Attempt(_judge(run, restored, " ".join(said)), " ".join(said))


def _judge(run: Run, restored: Restored, said: str) -> str:
    expected = run.expected.get(restored.step)
    if expected is None or not _is_same(restored, expected):
        return "silent"
    if restored.step == NEWEST:
        return "harmless"
    return "previous" if f"Checkpoint {NEWEST} is damaged" in said else "silent"


def _is_same(one: Restored, other: Restored) -> bool:
    pairs, others = (jax.tree_util.tree_flatten_with_path(r.state)[0] for r in (one, other))
    arrays_are = [path for path, _ in pairs] == [path for path, _ in others] and all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for (_, a), (_, b) in zip(pairs, others, strict=True)
    )
    # What a run writes beside its steps may be another: `fill_disk` asks for a report.
    return arrays_are and {**one.meta, "config": 0} == {**other.meta, "config": 0}


def _checkpoints(workdir: Path) -> dict[str, bytes]:
    files = [p for p in (workdir / "checkpoints").rglob("*") if p.is_file()]
    return {str(p.relative_to(workdir)): p.read_bytes() for p in files}


# --- injections --------------------------------------------------------------------------------

Apply = Callable[[Path, random.Random], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Injection:
    """Something that goes wrong.

    Attributes:
      name: what.
      where: the file or the call that it strikes.
      apply: `apply(workdir, rng)` changes a copy of a run, and returns what is to hold while the run begins.
      allowed: the outcomes that are right.
    """

    name: str
    where: str
    apply: Apply
    allowed: tuple[str, ...] = ("previous", "harmless", "refused")


def _changed(relative: str, change: Callable[[bytes, random.Random], bytes | None]) -> Apply:
    """Change the bytes of a file of the newest checkpoint; None removes it."""

    def apply(workdir: Path, rng: random.Random) -> AbstractContextManager[Any]:
        path = workdir / "checkpoints" / str(NEWEST) / relative
        content = change(path.read_bytes(), rng)
        path.unlink() if content is None else path.write_bytes(content)
        return nullcontext()

    return apply


def _flip(content: bytes, rng: random.Random) -> bytes:
    at, bit = rng.randrange(len(content)), rng.randrange(8)
    return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]


def _zeroed(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(0, len(content), SECTOR)
    size = min(SECTOR, len(content) - at)
    return content[:at] + bytes(size) + content[at + size :]


CHANGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "bit flipped": _flip,
    "block zeroed": _zeroed,
    "cut in half": lambda content, _: content[: len(content) // 2],
    "last byte cut": lambda content, _: content[:-1],
    "emptied": lambda content, _: b"",
    "missing": lambda content, _: None,
}


def damages(run: Run, flips: int) -> Iterator[Injection]:
    """Yield every change to every file of the newest checkpoint; flips come several times."""
    folder = run.workdir / "checkpoints" / str(NEWEST)
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size):
        relative = str(path.relative_to(folder))
        for name, change in CHANGES.items():
            for _ in range(flips if change is _flip else 1):
                yield Injection(name, _kind(relative), _changed(relative, change))


def _kind(relative: str) -> str:
    """Return a file of a checkpoint, without the names that Orbax draws."""
    parts = relative.split("/")
    return "/".join([*parts[:-1], "*"] if "d" in parts else parts)


def _renamed(workdir: Path, rng: random.Random) -> AbstractContextManager[Any]:
    """Put a later step's name on a copy of an older step's folder."""
    folder = workdir / "checkpoints"
    shutil.rmtree(folder / str(NEWEST))
    shutil.copytree(folder / str(BEFORE), folder / str(NEWEST))
    return nullcontext()


def _swapped(*names: str) -> Apply:
    """Put parts of the step before in the place of the newest's."""

    def apply(workdir: Path, rng: random.Random) -> AbstractContextManager[Any]:
        for name in names:
            old, new = (workdir / "checkpoints" / str(s) / name for s in (BEFORE, NEWEST))
            shutil.rmtree(new) if new.is_dir() else new.unlink()
            shutil.copytree(old, new) if old.is_dir() else shutil.copyfile(old, new)
        return nullcontext()

    return apply


def _other_clock(workdir: Path, rng: random.Random) -> AbstractContextManager[Any]:
    """Write a clock of another step, under a seal that is right."""
    path = workdir / "checkpoints" / str(NEWEST) / "meta" / "metadata"
    content = {k: v for k, v in json.loads(path.read_text()).items() if k != "sha256"}
    content["clock"]["step"] -= 1
    path.write_text(json.dumps(seal(content)))
    return nullcontext()


@contextmanager
def _failing(
    owner: Any, name: str, error: Callable[[], BaseException], after: int
) -> Iterator[None]:
    """Yield a function that fails once it has been called so many times."""
    function, calls = getattr(owner, name), iter(range(10**9))

    def failing(*arguments: Any, **more: Any) -> Any:
        if next(calls) >= after:
            raise error()
        return function(*arguments, **more)

    with mock.patch.object(owner, name, failing):
        yield


def _system(number: int) -> Callable[[], BaseException]:
    return lambda: OSError(number, os.strerror(number), "a file")


def _store(status: str, number: int | None = None) -> Callable[[], BaseException]:
    """Raise what TensorStore raises."""
    code = f" [os_error_code='{number}']" if number else ""
    return lambda: ValueError(f"{status}: Error reading \"a/file\"{code} [tensorstore_spec='...']")


_NUMBERS = (errno.EACCES, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ESTALE, errno.ETIMEDOUT)
ERRORS: dict[str, Callable[[], BaseException]] = {
    **{errno.errorcode[number]: _system(number) for number in _NUMBERS},
    "MemoryError": MemoryError,
}
STORE_ERRORS: dict[str, Callable[[], BaseException]] = {
    **{errno.errorcode[number]: _store("UNKNOWN", number) for number in _NUMBERS},
    "PERMISSION_DENIED": _store("PERMISSION_DENIED"),
    "UNAVAILABLE": _store("UNAVAILABLE"),
    "DEADLINE_EXCEEDED": _store("DEADLINE_EXCEEDED"),
    "RESOURCE_EXHAUSTED": _store("RESOURCE_EXHAUSTED"),
    "MemoryError": MemoryError,
}


def failures() -> Iterator[Injection]:
    """Yield errors of reading, which are no damage."""
    calls: Sequence[tuple[str, Any, str, Mapping[str, Callable[[], BaseException]]]] = (
        ("list of checkpoints", checkpoint, "_names", ERRORS),
        ("meta data", metadata, "_load", ERRORS),
        ("list of arrays", arrays, "_load", ERRORS),
        ("opening an array", arrays, "_open", STORE_ERRORS),
        ("reading an array", arrays, "_read_part", STORE_ERRORS),
    )
    for where, owner, name, kinds in calls:
        for kind, error in kinds.items():
            for after in (0, 1) if owner is arrays and name != "_load" else (0,):

                def apply(
                    workdir: Path,
                    rng: random.Random,
                    _call: tuple[Any, ...] = (owner, name, error, after),
                ) -> AbstractContextManager[Any]:
                    return _failing(*_call)

                yield Injection(f"read error {kind}", where, apply, ("refused",))


@contextmanager
def limit(kind: int, value: int) -> Iterator[None]:
    """Yield a limit of the system for this process."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def _few_files(left: int) -> Apply:
    """Leave so many files that can still be opened, for real."""

    def apply(workdir: Path, rng: random.Random) -> AbstractContextManager[Any]:
        used = {int(number) for number in os.listdir("/proc/self/fd")}
        free = (number for number in range(10**6) if number not in used)
        return limit(resource.RLIMIT_NOFILE, list(itertools.islice(free, left + 1))[-1])

    return apply


OTHERS: tuple[Injection, ...] = (
    Injection("8 renamed to 12", "folder", _renamed, ("previous",)),
    Injection("meta data of 8", "meta", _swapped("meta"), ("previous",)),
    Injection("arrays of 8", "state", _swapped("state"), ("previous",)),
    Injection(
        "checksums of 8", "state/checksums.json", _swapped("state/checksums.json"), ("previous",)
    ),
    Injection("clock of step 11, sealed", "meta/metadata", _other_clock, ("previous",)),
    Injection("no file can be opened", "process", _few_files(0), ("refused",)),
    *(
        Injection(f"{n} files can be opened", "process", _few_files(n), ("refused", "harmless"))
        for n in (1, 2, 4, 8)
    ),
)


def injections(run: Run, flips: int) -> Iterator[Injection]:
    """Yield all that is done to a run. Add a kind of fault here."""
    yield from damages(run, flips)
    yield from failures()
    yield from OTHERS


# --- disks that fill up ------------------------------------------------------------------------


def fill_disk(run: Run, size: int) -> Attempt:
    """Train on where no file may grow past `size` bytes, as on a full disk; then begin again without the limit."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(shutil.copytree(run.workdir, Path(folder) / "run"))
        shutil.rmtree(workdir / "checkpoints" / str(NEWEST))
        words = ("evaluation.every=0", *smallruns.RUNS[run.name], "log.report=True")
        text = None
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            # What is compiled here must not be cut short in a cache that others read.
            with _uncached(), limit(resource.RLIMIT_FSIZE, size), contextlib.redirect_stdout(None):
                toyrun.run(workdir, *words)
        except Exception as error:
            text = errors.report(error)
            if text is None:
                return Attempt("traceback", f"{type(error).__name__}: {error}")
        finally:
            signal.signal(signal.SIGXFSZ, before)
        if text is not None and str(workdir) not in text:
            return Attempt("traceback", f"names no file: {text}")
        restored = _begin(run.experiment, workdir, lambda _: None)
        is_same = restored.step in run.expected and _is_same(restored, run.expected[restored.step])
        kept = restored.step == NEWEST or text is not None
        outcome = "harmless" if text is None else "refused"
        return Attempt(outcome if is_same and kept else "silent", text or "")


@contextmanager
def _uncached() -> Iterator[None]:
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks once whether there is one
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


SIZES = (0, 100, 1000, 3000, 10_000, 30_000, 1_000_000)


# --- memory that ends --------------------------------------------------------------------------

MEGABYTES = (0, 20, 100, 400)


def starve(run: Run, megabytes: int) -> Attempt:
    """Begin in a process that may take so much more memory than it has when it begins."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(shutil.copytree(run.workdir, Path(folder) / "run"))
        before = _checkpoints(workdir)
        command = [sys.executable, __file__, f"--begin={run.name}", f"--folder={workdir}"]
        ended = subprocess.run(
            [*command, f"--memory={megabytes}"], capture_output=True, text=True, timeout=600
        )
        words = ended.stderr.strip().splitlines()[-1:] or [""]
        if _checkpoints(workdir) != before:
            return Attempt("silent", f"a checkpoint was moved: {words[0]}")
        known = {0: "harmless", 2: "refused"}
        outcome = "died" if ended.returncode < 0 else known.get(ended.returncode, "traceback")
        return Attempt(outcome, words[0])


def begin_starved(name: str, workdir: Path, megabytes: int) -> int:
    """Run what `starve` starts."""
    experiment = make_experiment(toyrun.block("evaluation.every=0", *smallruns.RUNS[name]))
    status = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) for line in status if line.startswith("VmSize"))
    with limit(resource.RLIMIT_AS, 1024 * used + 10**6 * megabytes):
        return 0 if _begin(experiment, workdir, print).step == NEWEST else 1


# --- a second process --------------------------------------------------------------------------

HOLD = """
import sys, time
from etils import epath
from mmjax.engine.lease import hold
with hold(epath.Path(sys.argv[1]), "train", False):
    print("holds", flush=True)
    time.sleep(3600)
"""
FATES = ("lives", "is stopped", "was killed")


def intrude(run: Run, fate: str) -> Attempt:
    """Train in a workdir that another process holds, or held until it was killed."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(shutil.copytree(run.workdir, Path(folder) / "run"))
        words = [sys.executable, "-c", HOLD, str(workdir)]
        here = {**os.environ, "PYTHONPATH": str(HERE.parent.parent)}
        holder = subprocess.Popen(words, stdout=subprocess.PIPE, env=here)
        try:
            assert holder.stdout is not None and holder.stdout.readline() == b"holds\n"
            if fate != "lives":
                holder.send_signal(signal.SIGSTOP if fate == "is stopped" else signal.SIGKILL)
            if fate == "was killed":
                holder.wait()
            return _intruded(run, workdir, holder.pid)
        finally:
            holder.kill()
            holder.wait()


def _intruded(run: Run, workdir: Path, holder: int) -> Attempt:
    before = _files(workdir)
    try:
        with contextlib.redirect_stdout(None):
            toyrun.run(workdir, "evaluation.every=0", *smallruns.RUNS[run.name])
    except Exception as error:
        text = errors.report(error)
        if text is None:
            return Attempt("traceback", f"{type(error).__name__}: {error}")
        is_right = _files(workdir) == before and f"process {holder} " in text
        return Attempt("refused" if is_right else "silent", text)
    restored = _begin(run.experiment, workdir, lambda _: None)
    is_same = restored.step == NEWEST and _is_same(restored, run.expected[NEWEST])
    return Attempt("harmless" if is_same else "silent", "")


def _files(workdir: Path) -> dict[str, bytes]:
    """Return what a workdir holds, but for the lease, whose heartbeat moves."""
    files = [p for p in workdir.rglob("*") if p.is_file() and not p.name.startswith(LEASE)]
    return {str(p.relative_to(workdir)): p.read_bytes() for p in files}


# --- counting ----------------------------------------------------------------------------------


@dataclass
class Table:
    """Outcomes by injection, place and run."""

    counts: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    samples: dict[str, str] = field(default_factory=dict)

    def add(self, run: str, name: str, where: str, allowed: Sequence[str], found: Attempt) -> None:
        self.counts.setdefault((name, where), Counter())[found.outcome] += 1
        self.samples.setdefault(f"{name}, {where}: {found.outcome}", found.words)
        if found.outcome not in allowed:
            self.wrong.append(f"{run}: {name}, {where}: {found.outcome} ({found.words})")

    def total(self) -> Counter[str]:
        return sum(self.counts.values(), Counter())

    def markdown(self, command: str) -> str:
        total = self.total()
        rows = [("all", "all", total), *((*key, n) for key, n in sorted(self.counts.items()))]
        lines = [
            f"| {name} | {where} | {sum(n.values())} | {' | '.join(str(n[o]) for o in OUTCOMES)} |"
            for name, where, n in rows
        ]
        head = f"| injected | where | attempts | {' | '.join(OUTCOMES)} |"
        return "\n".join(
            [
                "# faults",
                "",
                "Damage, failing reads, full disks and second processes, and what became of the runs;",
                "`tests/pod/faults.py` explains the outcomes.",
                "",
                f"- Command: `{command}`",
                f"- {sum(total.values())} attempts on {len(smallruns.RUNS)} runs: {total['silent']} silent, "
                f"{total['traceback']} tracebacks, {len(self.wrong)} outcomes that are not right.",
                "",
                head,
                "| --- | --- | --- |" + " --- |" * len(OUTCOMES),
                *lines,
                "",
            ]
        )


def inject(names: Sequence[str], folder: Path, seed: int, flips: int) -> Table:
    """Return every injection on every run."""
    table = Table()
    for name in names:
        rng = random.Random(f"{seed} {name}")
        run = train(name, folder)
        for each in injections(run, flips):
            table.add(name, each.name, each.where, each.allowed, attempt(run, each, rng))
        for size in SIZES:
            found = fill_disk(run, size)
            table.add(
                name, f"files of at most {size} bytes", "workdir", ("refused", "harmless"), found
            )
        for fate in FATES:
            allowed = ("harmless",) if fate == "was killed" else ("refused",)
            table.add(name, f"a process that {fate}", "workdir", allowed, intrude(run, fate))
        for megabytes in MEGABYTES if name == names[0] else ():
            words = f"{megabytes} MB of memory left"
            table.add(
                name, words, "process", ("refused", "died", "harmless"), starve(run, megabytes)
            )
        print(f"{name}: {dict(table.total())}", flush=True)
    return table


def main() -> int:
    made = argparse.ArgumentParser(description="Damage and withhold the files of runs.")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--flips", type=int, default=8, help="flipped bits per file, one at a time")
    made.add_argument("--configs", default=",".join(smallruns.RUNS), help="names, with commas")
    made.add_argument("--folder", default="", help="a new temporary folder if empty")
    made.add_argument("--out", default="", help="a file for the table, in Markdown")
    made.add_argument("--begin", default="", help=argparse.SUPPRESS)
    made.add_argument("--memory", type=int, default=0, help=argparse.SUPPRESS)
    given = made.parse_args()
    if given.begin:
        return begin_starved(given.begin, Path(given.folder), given.memory)
    folder = Path(given.folder or tempfile.mkdtemp(prefix="faults"))
    table = inject(given.configs.split(","), folder, given.seed, given.flips)
    if given.out:
        command = " ".join(["python", "tests/pod/faults.py", *sys.argv[1:]])
        Path(given.out).write_text(table.markdown(command))
    print(*table.wrong, sep="\n")
    print(
        f"{sum(table.total().values())} attempts: {dict(table.total())}; {len(table.wrong)} not right."
    )
    return 1 if table.wrong else 0


if __name__ == "__main__":
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    errors.run(main)
