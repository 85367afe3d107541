"""The launch scripts, under stand-ins for Python and pip: nothing is installed or fetched."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = "bash cat chmod cksum cp dirname env find git ls mkdir mktemp rm sed sort tail tee".split()

# A Python that answers the probe, makes environments that hold itself, and notes every call. Each
# line of the file `fails` beside the calls names a call that is to fail.
STAND_IN = """#!{bash}
case "$1" in
  -c) echo "{version} {kind} {maker} $0"; exit ;;
esac
echo "{version} $*" >>"{calls}"
while IFS= read -r pattern; do
  case "$*" in *"$pattern"*) echo "stand-in: $pattern fails" >&2; exit 1 ;; esac
done <"{fails}"
case "$*" in
  "-m venv "*)
    for target; do :; done
    mkdir -p "$target/bin"
    cp "$0" "$target/bin/python"
    printf '#!{bash}\\necho "{version} shellcheck" >>"{calls}"\\n' >"$target/bin/shellcheck"
    chmod +x "$target/bin/shellcheck"
    ;;
  "-m mmjax train "*) echo "$# arguments in $PWD" >>"{calls}" ;;
  "-m pytest "*) echo "===== 3 passed in 0.10s ====="; ;;
esac
"""


@dataclass
class Machine:
    """A checkout with a space in its path, and a PATH that holds only what a test puts on it."""

    root: Path
    bin: Path
    home: Path
    calls_file: Path
    fails_file: Path

    def add(
        self, where: Path, version: str = "3.11.7", kind: str = "cpython", maker: str = "ensurepip"
    ) -> Path:
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text(
            STAND_IN.format(
                bash=shutil.which("bash"),
                version=version,
                kind=kind,
                maker=maker,
                calls=self.calls_file,
                fails=self.fails_file,
            )
        )
        where.chmod(0o755)
        return where

    def fail_on(self, *patterns: str) -> None:
        self.fails_file.write_text("".join(f"{pattern}\n" for pattern in patterns))

    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines()

    def forget_calls(self) -> None:
        self.calls_file.write_text("")

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": str(self.bin), "HOME": str(self.home), "TMPDIR": str(self.home), **variables}
        return subprocess.run(
            ["bash", *command],
            env=env,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )

    def launch(
        self, script: str, *arguments: str, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return self.run(str(self.root / "launch" / script), *arguments, **variables)

    def sourced(self, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run `code` with launch/lib.sh sourced."""
        lib = self.root / "launch" / "lib.sh"
        return self.run("-c", f'set -euo pipefail; source "$0"; {code}', str(lib), **variables)


def put(path: Path, lines: str) -> None:
    """Put an executable of these lines of shell."""
    path.write_text(f"#!{shutil.which('bash')}\n{lines}\n")
    path.chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    root = tmp_path / "some where" / "mm jax"
    shutil.copytree(ROOT / "launch", root / "launch")
    shutil.copytree(ROOT / ".ci", root / ".ci")
    for name in ("setup.cfg", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found, f"this machine has no {tool}"
        (tools / tool).symlink_to(found)
    put(tools / "chromium", "")
    home = tmp_path / "home of me"
    home.mkdir()
    result = Machine(root, tools, home, tmp_path / "calls.txt", tmp_path / "fails.txt")
    result.forget_calls()
    result.fail_on()
    return result


# Which Python


def test_versions_of_the_scripts_are_those_of_the_package() -> None:
    package = configparser.ConfigParser()
    package.read(ROOT / "setup.cfg")
    lib = (ROOT / "launch" / "lib.sh").read_text()
    oldest, newest = (
        int(re.findall(rf"^{name}_MINOR=(\d+)$", lib, re.M)[0]) for name in ("OLDEST", "NEWEST")
    )
    assert package["options"]["python_requires"] == f">=3.{oldest},<3.{newest + 1}"


def test_probe_of_a_real_python_names_version_and_path(machine: Machine) -> None:
    result = machine.sourced('probe "$THIS"', THIS=sys.executable)
    version, kind, maker, path = result.stdout.strip().split(" ", 3)
    assert version == ".".join(map(str, sys.version_info[:3]))
    assert kind == sys.implementation.name
    assert maker in ("ensurepip", "pip", "none")
    assert Path(path).exists()
    if maker == "ensurepip":
        assert Path(path).resolve() == Path(sys.executable).resolve()


def test_python3_is_taken_when_it_will_do(machine: Machine) -> None:
    machine.add(machine.bin / "python3", "3.11.2")
    machine.add(machine.bin / "python3.13", "3.13.0")
    assert machine.sourced("pick_python").stdout.startswith("3.11.2 ")


@pytest.mark.parametrize(
    "python3",
    [
        {"version": "3.9.18"},
        {"version": "2.7.18", "kind": "python2", "maker": "none"},
        {"version": "3.14.0"},
        {"version": "3.12.9", "kind": "pypy"},
        {"version": "3.13.0", "kind": "free-threaded"},
        {"version": "3.12.9", "maker": "none"},
    ],
    ids=lambda python3: " ".join(python3.values()),
)
def test_else_the_newest_that_will(machine: Machine, python3: dict[str, str]) -> None:
    machine.add(machine.bin / "python3", **python3)
    machine.add(machine.bin / "python3.11", "3.11.30")
    pyenv = machine.home / ".pyenv" / "versions"
    machine.add(pyenv / "3.12.10" / "bin" / "python", "3.12.10")
    machine.add(pyenv / "3.12.9" / "bin" / "python", "3.12.9")
    machine.add(pyenv / "3.14.1" / "bin" / "python", "3.14.1")
    assert machine.sourced("pick_python").stdout.split()[0] == "3.12.10"


def test_pyenv_elsewhere(machine: Machine) -> None:
    elsewhere = machine.home / "py env"
    python = machine.add(elsewhere / "versions" / "3.13.0" / "bin" / "python", "3.13.0")
    result = machine.sourced("pick_python", PYENV_ROOT=str(elsewhere))
    assert result.stdout == f"3.13.0 cpython ensurepip {python}\n"


def test_a_python_that_does_not_run_is_passed_over(machine: Machine) -> None:
    shim = machine.add(machine.bin / "python3.13", "3.13.0")
    shim.write_text(f"#!{shutil.which('bash')}\necho 'shim: not installed' >&2\nexit 127\n")
    machine.add(machine.bin / "python3.12", "3.12.1")
    result = machine.sourced("pick_python")
    assert result.stdout.startswith("3.12.1 ") and result.stderr == ""


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_only_a_too_old_python(machine: Machine, script: str) -> None:
    machine.add(machine.bin / "python3", "3.9.2")
    result = machine.launch(script)
    assert result.returncode != 0
    assert "needs CPython 3.11 to 3.13" in result.stderr
    assert "Python 3.9.2" in result.stderr and "too old" in result.stderr
    assert machine.calls() == []


def test_no_python_at_all(machine: Machine) -> None:
    result = machine.launch("quickstart.sh")
    assert result.returncode == 2
    assert "found: none" in result.stderr and "apt-get install python3" in result.stderr


def test_what_is_too_new_or_cannot_make_environments_is_named(machine: Machine) -> None:
    machine.add(machine.bin / "python3", "3.14.0")
    machine.add(machine.bin / "python3.12", "3.12.3", maker="none")
    result = machine.launch("quickstart.sh")
    assert result.returncode == 2
    assert re.search(r"Python 3\.14\.0, .*: too new", result.stderr)
    assert "apt-get install python3.12-venv" in result.stderr


def test_a_chosen_python_that_is_too_old_is_refused_though_another_would_do(
    machine: Machine,
) -> None:
    machine.add(machine.bin / "python3", "3.11.7")
    old = machine.add(machine.home / "old python", "3.10.1")
    result = machine.launch("quickstart.sh", PYTHON=str(old))
    assert result.returncode == 2
    assert "old python" in result.stderr and "3.10.1: too old" in result.stderr
    assert machine.calls() == []


def test_a_chosen_python_that_is_not_there(machine: Machine) -> None:
    result = machine.launch("quickstart.sh", PYTHON="./nope")
    assert result.returncode == 2
    assert "nope will not do: does not run" in result.stderr


# quickstart.sh


def test_quickstart_sets_up_builds_and_trains_in_the_root(machine: Machine) -> None:
    machine.add(machine.bin / "python3")
    result = machine.launch("quickstart.sh", "--config.steps=3", "--config.note=a b")
    assert result.returncode == 0, result.stderr
    venv, pip_version, install, build, train, how = machine.calls()
    assert venv == f"3.11.7 -m venv {machine.root}/.venv"
    assert pip_version == "3.11.7 -m pip --version"
    assert install.startswith("3.11.7 -m pip install") and install.endswith("--editable .[data]")
    assert build == "3.11.7 -m mmjax build quickstart"
    assert train == (
        "3.11.7 -m mmjax train --config=configs/quickstart.py --workdir=runs/quickstart"
        " --config.steps=3 --config.note=a b"
    )
    assert how == f"7 arguments in {machine.root}"


def test_second_time_calls_no_pip(machine: Machine) -> None:
    machine.add(machine.bin / "python3")
    assert machine.launch("quickstart.sh", "--setup_only").returncode == 0
    machine.forget_calls()
    result = machine.launch("quickstart.sh", "--setup_only")
    assert result.returncode == 0, result.stderr
    assert machine.calls() == ["3.11.7 -m mmjax build quickstart"]


def test_second_time_keeps_the_environment_when_another_python3_comes_first(
    machine: Machine,
) -> None:
    machine.add(machine.bin / "python3")
    machine.launch("quickstart.sh", "--setup_only")
    machine.forget_calls()
    machine.add(machine.bin / "python3", "3.12.1")
    machine.launch("quickstart.sh", "--setup_only")
    assert machine.calls() == ["3.11.7 -m mmjax build quickstart"]


def test_a_chosen_python_of_another_version_rebuilds(machine: Machine) -> None:
    machine.add(machine.bin / "python3")
    machine.launch("quickstart.sh", "--setup_only")
    machine.forget_calls()
    python = machine.add(machine.home / "other", "3.12.1")
    machine.launch("quickstart.sh", "--setup_only", PYTHON="./other")
    assert machine.calls()[0] == f"3.12.1 -m venv {machine.root}/.venv"
    assert python.exists()


@pytest.mark.parametrize("name", ["setup.cfg", "setup.py", "pyproject.toml"])
def test_changed_requirements_run_pip_again_in_the_same_environment(
    machine: Machine, name: str
) -> None:
    machine.add(machine.bin / "python3")
    machine.launch("quickstart.sh", "--setup_only")
    machine.forget_calls()
    with (machine.root / name).open("a") as file:
        file.write("# changed\n")
    machine.launch("quickstart.sh", "--setup_only")
    calls = "\n".join(machine.calls())
    assert "pip install" in calls and "-m venv" not in calls


def test_a_first_install_cut_short_is_made_again_from_nothing(machine: Machine) -> None:
    machine.add(machine.bin / "python3")
    machine.fail_on("pip install")
    result = machine.launch("quickstart.sh")
    assert result.returncode == 2
    assert "could not install mmjax[data]" in result.stderr and "package index" in result.stderr
    leftover = machine.root / ".venv" / "lib" / "half"
    leftover.parent.mkdir()
    leftover.write_text("")
    machine.fail_on()
    machine.forget_calls()
    assert machine.launch("quickstart.sh", "--setup_only").returncode == 0
    assert [call.split()[2] for call in machine.calls()] == [
        "venv",
        "pip",
        "pip",
        "mmjax",
    ]
    assert not leftover.exists()


def test_an_update_cut_short_goes_on_and_is_not_taken_for_done(machine: Machine) -> None:
    machine.add(machine.bin / "python3")
    machine.launch("quickstart.sh", "--setup_only")
    before = (machine.root / "setup.cfg").read_text()
    (machine.root / "setup.cfg").write_text(before + "# changed\n")
    machine.fail_on("pip install")
    assert machine.launch("quickstart.sh", "--setup_only").returncode == 2
    machine.fail_on()
    machine.forget_calls()
    # Back to requirements that had a stamp: what pip left half done must still be repaired.
    (machine.root / "setup.cfg").write_text(before)
    assert machine.launch("quickstart.sh", "--setup_only").returncode == 0
    calls = "\n".join(machine.calls())
    assert "pip install" in calls and "-m venv" not in calls


def test_an_environment_whose_python_is_gone_is_rebuilt(machine: Machine) -> None:
    machine.add(machine.bin / "python3")
    machine.launch("quickstart.sh", "--setup_only")
    (machine.root / ".venv" / "bin" / "python").unlink()
    machine.forget_calls()
    assert machine.launch("quickstart.sh", "--setup_only").returncode == 0
    assert machine.calls()[0] == f"3.11.7 -m venv {machine.root}/.venv"


def test_a_moved_checkout_makes_its_environment_again(machine: Machine) -> None:
    machine.add(machine.bin / "python3")
    machine.launch("quickstart.sh", "--setup_only")
    machine.root = machine.root.rename(machine.root.with_name("moved here"))
    machine.forget_calls()
    assert machine.launch("quickstart.sh", "--setup_only").returncode == 0
    assert machine.calls()[0] == f"3.11.7 -m venv {machine.root}/.venv"


def test_without_ensurepip_the_pip_of_the_python_is_used(machine: Machine) -> None:
    machine.add(machine.bin / "python3", maker="pip")
    assert machine.launch("quickstart.sh", "--setup_only").returncode == 0
    venv, pip = machine.calls()[:2]
    assert venv == f"3.11.7 -m venv --without-pip {machine.root}/.venv"
    assert pip.startswith(f"3.11.7 -m pip --python {machine.root}/.venv/bin/python install")


def test_ones_own_environment_is_used_once_and_never_deleted(machine: Machine) -> None:
    mine = machine.home / "my env"
    machine.add(mine / "bin" / "python", "3.12.4")
    (mine / "precious").write_text("kept")
    for expected in (1, 0):
        machine.forget_calls()
        result = machine.launch("quickstart.sh", "--setup_only", MMJAX_VENV="my env")
        assert result.returncode == 0, result.stderr
        assert sum("pip install" in call for call in machine.calls()) == expected
        assert not any("-m venv" in call for call in machine.calls())
    assert (mine / "precious").read_text() == "kept"


def test_a_folder_that_is_no_environment_is_left_alone(machine: Machine) -> None:
    machine.add(machine.bin / "python3")
    folder = machine.home / "photos"
    folder.mkdir()
    (folder / "one.jpg").write_text("")
    result = machine.launch("quickstart.sh", MMJAX_VENV=str(folder))
    assert result.returncode == 2
    assert "photos is not empty" in result.stderr
    assert [path.name for path in folder.iterdir()] == ["one.jpg"]
    assert machine.calls() == []


def test_data_that_cannot_be_built_stops_before_training(machine: Machine) -> None:
    machine.add(machine.bin / "python3")
    machine.fail_on("mmjax build")
    result = machine.launch("quickstart.sh")
    assert result.returncode == 2
    assert result.stderr.endswith("error: the data could not be built; the reason stands above.\n")
    assert not any("mmjax train" in call for call in machine.calls())


def test_the_exit_status_is_that_of_training(machine: Machine) -> None:
    machine.add(machine.bin / "python3")
    machine.fail_on("mmjax train")
    assert machine.launch("quickstart.sh").returncode == 1


def test_git_is_missed_aloud_but_not_needed(machine: Machine) -> None:
    machine.add(machine.bin / "python3")
    (machine.bin / "git").unlink()
    first = machine.launch("quickstart.sh", "--setup_only")
    assert first.returncode == 0 and "git was not found" in first.stdout
    assert "note:" not in machine.launch("quickstart.sh", "--setup_only").stdout


@pytest.mark.parametrize("script", ["docs.sh", "release.sh", "test.sh"])
def test_scripts_share_the_code_of_the_help(script: str) -> None:
    text = (ROOT / "launch" / script).read_text()
    assert 'help_if_asked "$@"' in text and "--help" not in text


@pytest.mark.parametrize("script", ["docs.sh", "quickstart.sh", "release.sh", "test.sh"])
def test_help(machine: Machine, script: str) -> None:
    result = machine.launch(script, "--help")
    assert result.returncode == 0
    assert f"bash launch/{script}" in result.stdout and "set -euo" not in result.stdout
    assert machine.calls() == []


# test.sh


def stages(result: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Return stage name to verdict, from the closing summary."""
    summary = result.stdout.split("--- summary\n")[1].splitlines()[:-1]
    pattern = re.compile(r"(ok|FAILED|not run|-) +(.*?)(?: \(\d+ s\))?$")
    found = [pattern.match(line) for line in summary]
    return {match[2]: match[1] for match in found if match}


@pytest.fixture
def two_pythons(machine: Machine) -> Machine:
    machine.add(machine.bin / "python3", "3.11.7")
    machine.add(machine.home / ".pyenv" / "versions" / "3.13.0" / "bin" / "python", "3.13.0")
    machine.add(machine.home / ".pyenv" / "versions" / "3.14.0" / "bin" / "python", "3.14.0")
    return machine


def test_everything_runs_on_the_right_pythons(two_pythons: Machine) -> None:
    result = two_pythons.run(str(two_pythons.root / ".ci" / "run"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert set(stages(result).values()) == {"ok"}
    calls = two_pythons.calls()
    installs = [call for call in calls if "pip install" in call]
    assert [call.split()[0] for call in installs] == ["3.11.7", "3.13.0"]
    # The TPU's compiler is for the full suite alone.
    assert [call.split()[-1] for call in installs] == [".[tests,aot]", ".[tests]"]
    for part in ("ruff check", "ruff format --check", "mypy mmjax", "shellcheck", "pytest -n 2"):
        assert any(call.startswith("3.11.7") and part in call for call in calls), part
    assert "3.11.7 -m mkdocs build --strict --quiet" in calls
    assert "3.13.0 -m pytest tests/smoke" in calls
    assert result.stdout.splitlines()[-1] == "===== 3 passed in 0.10s ====="


@pytest.mark.parametrize(
    ("call", "stage"),
    [
        ("ruff check", "ruff check"),
        ("mypy mmjax", "mypy"),
        ("mkdocs build", "docs"),
        ("pytest tests/smoke", "smoke on Python 3.13.0"),
        ("pytest -n", "pytest, all tests"),
    ],
)
def test_a_failed_stage_fails_the_run_and_the_others_still_run(
    two_pythons: Machine, call: str, stage: str
) -> None:
    two_pythons.fail_on(call)
    result = two_pythons.launch("test.sh")
    assert result.returncode == 1
    verdicts = stages(result) if call != "pytest -n" else {}
    if verdicts:
        assert [name for name, verdict in verdicts.items() if verdict == "FAILED"] == [stage]
        assert result.stdout.splitlines()[-1] == "===== 3 passed in 0.10s ====="
    else:
        assert f"FAILED  {stage}" in result.stdout
    assert len([done for done in two_pythons.calls() if "-m pytest" in done]) == 2


def test_a_newest_environment_that_fails_does_not_stop_the_suite(two_pythons: Machine) -> None:
    venv = two_pythons.home / "tests env"
    two_pythons.fail_on(f"-m venv {venv}-newest")
    result = two_pythons.launch("test.sh", MMJAX_TEST_VENV=str(venv))
    assert result.returncode == 1
    verdicts = stages(result)
    assert verdicts["environment of Python 3.13.0"] == "FAILED"
    assert verdicts["smoke on Python 3.13.0"] == "not run"
    assert verdicts["pytest, all tests"] == "ok"


def test_a_missing_browser_is_said_where_it_cannot_be_installed(two_pythons: Machine) -> None:
    (two_pythons.bin / "chromium").unlink()
    result = two_pythons.launch("test.sh")
    assert result.returncode == 1
    failed = [name for name, verdict in stages(result).items() if verdict == "FAILED"]
    assert failed == ["browser"]
    assert "apt-get install chromium-headless-shell" in result.stderr


def test_a_missing_browser_is_installed_where_it_can_be(two_pythons: Machine) -> None:
    (two_pythons.bin / "chromium").unlink()
    put(two_pythons.bin / "id", "echo 0")
    put(two_pythons.bin / "apt-get", f'echo "apt-get $*" >>"{two_pythons.calls_file}"')
    assert two_pythons.launch("test.sh").returncode == 0
    installs = [call for call in two_pythons.calls() if call.startswith("apt-get install")]
    assert len(installs) == 1 and installs[0].endswith(" chromium-headless-shell")


def test_one_python_only_is_said(machine: Machine) -> None:
    machine.add(machine.bin / "python3", "3.12.1")
    result = machine.launch("test.sh")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "it is the suite's own, 3.12; the suite holds the smoke" in result.stdout
    assert not (machine.root / ".venv-test-newest").exists()


def test_arguments_run_only_pytest_with_them(two_pythons: Machine) -> None:
    result = two_pythons.launch("test.sh", "tests/test_x.py", "-k", "y or z")
    assert result.returncode == 0, result.stderr
    assert two_pythons.calls()[-1] == "3.11.7 -m pytest -n 0 tests/test_x.py -k y or z"
    assert sum("-m ruff" in call or "-m pytest" in call for call in two_pythons.calls()) == 1
    two_pythons.fail_on("-m pytest")
    assert two_pythons.launch("test.sh", "tests/test_x.py").returncode == 1


def test_second_run_of_the_tests_installs_nothing(two_pythons: Machine) -> None:
    two_pythons.launch("test.sh")
    two_pythons.forget_calls()
    two_pythons.launch("test.sh", MMJAX_TEST_WORKERS="1")
    assert not any("pip" in call or "venv" in call for call in two_pythons.calls())
    assert any("pytest -n 1 " in call for call in two_pythons.calls())


def test_scripts_can_be_run() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


# The manual and the release


def test_the_manual_is_built_in_strict_mode_by_an_environment_of_its_extra(
    machine: Machine,
) -> None:
    machine.add(machine.bin / "python3", "3.12.1")
    result = machine.launch("docs.sh")
    assert result.returncode == 0, result.stdout + result.stderr
    install, build = machine.calls()[-2:]
    assert install.endswith("--editable .[docs]")
    assert build == "3.12.1 -m mkdocs build --strict --quiet"
    machine.fail_on("mkdocs")
    result = machine.launch("docs.sh")
    assert result.returncode == 2 and "the manual could not be built" in result.stderr


@pytest.mark.parametrize(
    ("tag", "section", "message"),
    [
        ("v1.2.3", "## [1.2.3] - 2026-01-31", ""),
        ("v1.2.4", "## [1.2.3] - 2026-01-31", "Tag v1.2.3."),
        ("v1.2.3", "## [1.2.3] - Unreleased", "no dated section for 1.2.3"),
    ],
    ids=["all agree", "another tag", "no date"],
)
def test_a_release_needs_tag_version_and_changelog_to_agree(
    machine: Machine, tag: str, section: str, message: str
) -> None:
    put(machine.bin / "grep", f'exec {shutil.which("grep")} "$@"')
    machine.add(machine.bin / "python3", "3.12.1")
    (machine.root / "mmjax").mkdir()
    (machine.root / "mmjax" / "__init__.py").write_text('__version__ = "1.2.3"\n')
    (machine.root / "CHANGELOG.md").write_text(f"# Changelog\n\n{section}\n")
    (machine.root / "dist").mkdir()
    (machine.root / "dist" / "mmjax-1.2.3-py3-none-any.whl").touch()
    result = machine.launch("release.sh", tag)
    assert result.returncode == (2 if message else 0), result.stderr
    assert message in result.stderr
    assert any("pip wheel" in call for call in machine.calls()) == (not message)
