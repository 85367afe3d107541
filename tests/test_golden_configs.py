"""Every setting of `configs/` is built, and is as in its golden file, with all defaults."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from recipes import NAMES, experiment

from mmjax.modalities.text import Text
from mmjax.run_config import LogConfig

sys.path.insert(0, str(Path(__file__).resolve().parent / "golden"))

from write_configs import FOLDER, content, dumps, golden_file

REMEDY = "run PYTHONPATH=. python tests/golden/write_configs.py --write, and review what changes"


@pytest.mark.parametrize("name", NAMES)
def test_a_setting_is_as_its_golden_file_says(name: str) -> None:
    made = experiment(name)
    assert all(made.evaluators[task] for task in made.tasks)
    assert content(made) == golden_file(name).read_text(), REMEDY


def test_each_golden_file_is_of_a_setting() -> None:
    assert {path.name for path in FOLDER.glob("*")} == {golden_file(name).name for name in NAMES}
    assert len({golden_file(name) for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize(
    ("cls", "default", "changed", "before", "after"),
    [
        (LogConfig, 20, 10, '"log": {"flush_every": 20,', '"log": {"flush_every": 10,'),
        (Text, 128, 64, '   "max_positions": 128,', '   "max_positions": 64,'),
    ],
)
def test_a_default_that_changes_is_one_line_of_a_golden_file(
    monkeypatch: pytest.MonkeyPatch, cls: Any, default: int, changed: int, before: str, after: str
) -> None:
    """Of the interval of the log, and of a text's positions: keys that the quickstart leaves open."""
    golden = golden_file("quickstart").read_text()
    defaults = [changed if value == default else value for value in cls.__init__.__defaults__]
    monkeypatch.setattr(cls.__init__, "__defaults__", tuple(defaults))
    lines = set(content(experiment.__wrapped__("quickstart")).splitlines())
    old, new = (set(golden.splitlines()) - lines, lines - set(golden.splitlines()))
    assert len(old) == len(new) == 1
    assert old.pop().strip().startswith(before.strip()) and new.pop().strip().startswith(
        after.strip()
    )


def test_a_block_that_fits_into_a_line_is_written_on_one() -> None:
    longer = {"name": "x" * 60, "sizes": [1, 2], "at": {"of": "y" * 30}}
    written = dumps({"b": {"y": 1, "x": [True, None]}, "a": longer})
    assert json.loads(written) == {"b": {"y": 1, "x": [True, None]}, "a": longer}
    assert written.splitlines() == [
        "{",
        ' "a": {',
        '  "at": {"of": "' + "y" * 30 + '"},',
        '  "name": "' + "x" * 60 + '",',
        '  "sizes": [1, 2]',
        " },",
        ' "b": {"x": [true, null], "y": 1}',
        "}",
    ]
