"""Loading a run never runs code from it: no pickle in a workdir, and none read."""

from __future__ import annotations

import ast
import pickletools
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_workdir_holds_no_pickle(tiny_run):
    files = [f for f in Path(tiny_run).rglob("*") if f.is_file()]
    assert len(files) > 10
    assert not [f for f in files if f.suffix in (".pkl", ".pickle", ".pt", ".npy", ".joblib")]
    assert not [f for f in files if is_pickle(f.read_bytes())]


def is_pickle(content: bytes) -> bool:
    if content[:1] != b"\x80" or content[1:2] not in (b"\2", b"\3", b"\4", b"\5"):
        return False
    try:
        return any(op.name == "STOP" for op, *_ in pickletools.genops(content))
    except ValueError:
        return False


def test_a_pickle_would_be_seen():
    import pickle

    assert is_pickle(pickle.dumps({"a": print})) and not is_pickle(b"\x80\x04 not one")


def test_mmjax_neither_reads_pickles_nor_runs_text():
    modules = {
        "pickle",
        "dill",
        "cloudpickle",
        "marshal",
        "shelve",
        "joblib",
        "tensorflow",
        "torch",
    }
    for path in (ROOT / "mmjax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").split(".")[0]]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "__import__", "compile"), path
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path
            assert not modules & set(names), path
