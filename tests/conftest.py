"""Many devices on one machine, the data set built once, and a small run that several tests read."""

from __future__ import annotations

import fcntl
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

# Before JAX starts: eight CPU devices, and a compilation cache that outlives the test run.
DEVICES = 8
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mmjax"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}".strip()
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / "xla-tests"))
# Whatever takes long or short to compile, as `use_cache` has it in a run.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("MMJAX_DATA_DIR", str(_CACHE / "data"))
# Modules that several tests share: `toyrun`, `harness`; and the hooks of `budget`.
sys.path[:0] = [str(Path(__file__).resolve().parent / folder) for folder in ("extra", "pod")]

import decoy  # noqa: E402
import jax  # noqa: E402
import mains  # noqa: E402
import pytest  # noqa: E402
from budget import pytest_addoption, pytest_terminal_summary  # noqa: E402, F401
from etils import epath  # noqa: E402
from harness import Harness  # noqa: E402
from hypothesis import settings  # noqa: E402

from mmjax import show  # noqa: E402
from mmjax.data import data_dir  # noqa: E402
from mmjax.datasets import build  # noqa: E402

# The same examples on every machine: what lands is what was tested. `--hypothesis-profile=search` draws others.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile("same")

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "configs" / "tiny.py"
QUICKSTART_TINY = ROOT / "tests" / "configs" / "quickstart_tiny.py"


@pytest.fixture(scope="session", autouse=True)
def _devices() -> None:
    assert len(jax.devices()) == DEVICES, (
        f"tests need {DEVICES} forced CPU devices, found {jax.devices()}"
    )


@pytest.fixture(scope="module", autouse=True)
def _released() -> Iterator[None]:
    """Release the programs of a module's tests once a process has mapped many pieces of memory.

    Linux allows a process 65,530 of them, and each program takes one or more; XLA ends the process at the limit.
    """
    yield
    if _mapped() > _most_mapped[0]:
        jax.clear_caches()
        gc.collect()
        _most_mapped[0] = _mapped() + MAPPED


MAPPED = 10_000  # pieces of memory that may be mapped until programs are released again
_most_mapped = [MAPPED]


def _mapped() -> int:
    """Return how many pieces of memory this process has mapped; 0 where the system has no such list."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


@pytest.fixture
def x64() -> Iterator[None]:
    """Let JAX compute in 64 bits: arrays are float64 where nothing else is asked for."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def emoji_dir() -> epath.Path:
    """Return the data folder with the emoji data set built in it."""
    build.build("emoji")
    return data_dir()


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def command(emoji_dir: epath.Path) -> Command:
    """Return `command("train", "--workdir=...", devices=1)`: a main of mmjax in a process of its own."""

    def run(
        name: str,
        *arguments: str,
        devices: int = 1,
        env: Mapping[str, str] | None = None,
        timeout: float = 900,
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command_line(name, *arguments), env=environment(devices, env), capture_output=True, text=True,
            timeout=timeout, check=False,
        )  # fmt: skip

    return run


def command_line(name: str, *arguments: str) -> list[str]:
    """Return the words of `python -m mmjax.NAME ARGUMENTS`."""
    return [sys.executable, "-m", f"mmjax.{name}", *arguments]


def environment(devices: int = 1, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a process with `devices` forced CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": path, "COLUMNS": "80", **(more or {})}


@pytest.fixture(scope="session")
def tiny_run(command: Command, tmp_path_factory: pytest.TempPathFactory) -> epath.Path:
    """Return a finished run of the tiny config, see `_shared_run`; read it, do not change it."""
    return _shared_run(command, TINY, tmp_path_factory)


@pytest.fixture(scope="session")
def quickstart_run(command: Command, tmp_path_factory: pytest.TempPathFactory) -> epath.Path:
    """Return a finished run of the quickstart's six tasks, made tiny; read it, do not change it."""
    for name in build.BUNDLES["quickstart"]:
        build.build(name)
    return _shared_run(command, QUICKSTART_TINY, tmp_path_factory)


def _shared_run(command: Command, config: Path, factory: pytest.TempPathFactory) -> epath.Path:
    """Return a finished run of a config: the first worker that asks trains it, the others wait for it.

    It is trained with a decoy of TensorFlow on its path, which notes whether it is imported.
    """
    base = factory.getbasetemp()  # under pytest-xdist a worker's own, in that of all
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / config.stem
    folder.mkdir(exist_ok=True)
    workdir, finished = folder / "run", folder / "finished"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.exists():
            env = {"PYTHONPATH": f"{decoy.make(folder)}{os.pathsep}{ROOT}"}
            done = command("train", f"--config={config}", f"--workdir={workdir}", env=env)
            assert done.returncode == 0, done.stderr
            finished.touch()
    return epath.Path(workdir)


@pytest.fixture(scope="session")
def toy_command() -> Callable[..., Harness]:
    """Return `toy_command(workdir)`: starts, watches and kills runs of the toy config, in processes of their own."""

    def make(workdir: Path, *overrides: str, env: Mapping[str, str] | None = None) -> Harness:
        folder, config = ROOT / "tests" / "extra", ROOT / "tests" / "configs" / "toy.py"
        words = [f"--extra={folder}", f"--config={config}", f"--workdir={workdir}", *overrides]
        return Harness(command_line("train", *words), environment(1, env), workdir)

    return make


@pytest.fixture(scope="session")
def tiny_command(emoji_dir: epath.Path) -> Callable[..., Harness]:
    """Return the same as `toy_command`, of the tiny config."""

    def make(workdir: Path, *overrides: str, env: Mapping[str, str] | None = None) -> Harness:
        words = [f"--config={TINY}", f"--workdir={workdir}", *overrides]
        return Harness(command_line("train", *words), environment(1, env), workdir)

    return make


@pytest.fixture(scope="session")
def environment_of() -> Callable[..., dict[str, str]]:
    """Return `environment_of(devices, more)`: for processes that are no main of mmjax."""
    return environment


@pytest.fixture(scope="session")
def digest_of() -> Callable[..., str]:
    """Return `digest_of(workdir)`: the last line of `mmjax show WORKDIR --digest`."""

    def last_line(workdir: Path, *arguments: str) -> str:
        done = mains.run(show.main, str(workdir), "--digest", *arguments)
        assert done.status == 0, done.err
        return done.out.splitlines()[-1]

    return last_line
