"""The tests lie as the modules do: `mmjax/nn/dense.py` is tested in `tests/nn/test_dense.py` (or `test_dense_*.py`)."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS, PACKAGE = ROOT / "tests", ROOT / "mmjax"

# Modules without a test of their name, each with the reason.
UNTESTED = {
    "generation/spans.py": "a dataclass without code",
    "report/style.py": "CSS: tests/report/test_page.py looks at the page in a browser",
}
# Folders of tests of what is no package of mmjax, or of several processes and compilers.
FOLDERS = {
    "aot": "plans by the compilers of accelerators",
    "benchmarks": "benchmarks/",
    "launch": "launch/",
    "notebooks": "notebooks/",
    "pod": "several processes and devices",
    "smoke": "the main job on the newest Python",
}
# Tests of several packages at once, beside `tests/conftest.py`, by how their names begin.
TOGETHER = {
    "accumulate": "accumulation is optimizer, schedule and loop",
    "bad": "bad data, configs and meshes, as every command refuses them",
    "budget": "tests/extra/budget.py",
    "docs": "docs/ and README.md",
    "golden": "runs and configs of older versions",
    "import": "imports and layers of all modules",
    "instances": "instances pass from modality to objective",
    "language": "prose, docstrings and names of the whole repository",
    "layout": "this file",
    "lora": "low-rank deltas in runs: rules, state, mesh, load",
    "plugin": "a user's modules, of every kind",
    "published": "settings of configs/ against the papers'",
    "recipes": "configs/",
    "rows": "rows that do not exist, in every objective",
    "shared_time": "one time for all inputs of an example",
    "untied_train": "a run of untied layers",
    "wheel": "the wheel, in an environment of its own",
}


def name_of(module: Path) -> str:
    """Return the name of a module in its tests': `__main__` is `main`."""
    return module.stem.strip("_")


MODULES = sorted(
    path.relative_to(PACKAGE)
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py" and not path.stem.endswith("_pb2")
)
FILES = sorted(path.relative_to(TESTS) for path in TESTS.rglob("test_*.py"))


def has_tests(module: Path) -> bool:
    names = (f"test_{name_of(module)}.py", f"test_{name_of(module)}_*.py")
    return any(f.parent == module.parent and any(map(f.match, names)) for f in FILES)


def beginnings(file: Path) -> set[str]:
    """Return the names with which that of a test file begins: `dense_wide` begins with `dense`."""
    words = file.stem.removeprefix("test_").split("_")
    return {"_".join(words[:n]) for n in range(1, len(words) + 1)}


def names_something(file: Path) -> bool:
    """Return whether a test file's name begins with that of a module or package beside it."""
    beside = {name_of(m) for m in MODULES if m.parent == file.parent}
    beside |= {m.parent.name for m in MODULES if m.parent.parent == file.parent}
    return bool(beginnings(file) & beside)


def is_excepted(file: Path) -> bool:
    """Return whether a reason is given for a test file that names no module."""
    if len(file.parts) == 1:
        return bool(beginnings(file) & TOGETHER.keys())
    return file.parts[0] in FOLDERS


def test_modules_and_tests_are_seen() -> None:
    assert Path("nn/dense.py") in MODULES and Path("nn/test_dense.py") in FILES
    assert Path("nn/routers/soft.py") in MODULES and len(MODULES) > 150 < len(FILES)


def test_each_module_has_tests_of_its_name() -> None:
    missing = [f"{m.parent}/test_{name_of(m)}.py" for m in MODULES if not has_tests(m)]
    assert len(missing) == len(UNTESTED), f"Add to tests/, or give a reason here: {missing}"


def test_each_file_of_tests_names_what_it_tests() -> None:
    unknown = [str(f) for f in FILES if not (is_excepted(f) or names_something(f))]
    assert not unknown, (
        f"These name no module beside them: rename them, or give a reason here: {unknown}"
    )


def test_exceptions_are_needed() -> None:
    """A reason for something that is not there, or that has tests by now, is left from before."""
    untested = {str(m) for m in MODULES if not has_tests(m)}
    assert untested == UNTESTED.keys()
    folders = {f.parts[0] for f in FILES if len(f.parts) > 1}
    assert folders >= FOLDERS.keys() and not any((PACKAGE / name).exists() for name in FOLDERS)
    alone = [f.stem.removeprefix("test_") for f in FILES if len(f.parts) == 1]
    for begin in TOGETHER:
        assert any(name == begin or name.startswith(f"{begin}_") for name in alone), begin
        assert not (PACKAGE / f"{begin}.py").exists(), begin
