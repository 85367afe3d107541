"""Settings of a config file: their names, their values, and what an argument that names none is answered."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from mmjax.core import config, settings
from mmjax.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sized:
    """A size is required; its experts are never apart."""

    moe: bool = False
    size: Literal["s", "b"]
    form: Literal["plain", "mixed", "apart"] = "plain"

    def __post_init__(self) -> None:
        if self.moe and self.form == "apart":
            raise ValueError("no such model")


@dataclass(frozen=True)
class Open:
    """All fields have a default."""

    form: Literal["mixed", "plain"] = "plain"


def test_a_name_joins_the_words_that_are_not_defaults() -> None:
    assert settings.table(Sized, "a.py") == {
        "s": Sized(size="s"),
        "s-mixed": Sized(size="s", form="mixed"),
        "s-apart": Sized(size="s", form="apart"),
        "b": Sized(size="b"),
        "b-mixed": Sized(size="b", form="mixed"),
        "b-apart": Sized(size="b", form="apart"),
        "moe-s": Sized(moe=True, size="s"),
        "moe-s-mixed": Sized(moe=True, size="s", form="mixed"),
        "moe-b": Sized(moe=True, size="b"),
        "moe-b-mixed": Sized(moe=True, size="b", form="mixed"),
    }


def test_the_empty_name_is_the_default_setting() -> None:
    assert settings.parse(Open, "", "a.py") == Open("plain")
    assert settings.parse(Open, "mixed", "a.py") == Open("mixed")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("moe-c", "'a.py' has no setting 'moe-c'. Did you mean 'moe-"),
        (
            "b-plain",
            "has no setting 'b-plain'. Did you mean 'b'",
        ),  # a default's word is not written
        ("moe-b-apart", "has no setting 'moe-b-apart'. Did you mean 'b-apart'"),
        ("mixed-b", "has no setting 'mixed-b'."),
        (
            "QQQQQQ",
            "has no setting 'QQQQQQ'. Known: b, b-apart, b-mixed, moe-b, moe-b-mixed, moe-s,",
        ),
    ],
)
def test_an_unknown_setting_is_answered_with_the_nearest_or_all(argument: str, words: str) -> None:
    with pytest.raises(UserError) as raised:
        settings.parse(Sized, argument, "a.py")
    assert words in str(raised.value)


def test_a_missing_setting_is_answered_with_all_of_them() -> None:
    with pytest.raises(UserError) as raised:
        settings.parse(Sized, "", "a.py")
    assert str(raised.value) == (
        "Config file 'a.py' needs a setting: write --config=a.py:SETTING, one of "
        "s, s-mixed, s-apart, b, b-mixed, b-apart, moe-s, moe-s-mixed, moe-b, moe-b-mixed."
    )


def field_of(hint: Any, default: Any) -> type[Any]:
    namespace = {"__annotations__": {"size": hint}, "size": default}
    return dataclass(type("Setting", (), namespace))


@pytest.mark.parametrize(("hint", "default"), [(int, 3), (bool, True), (Literal[1, 2], 1)])
def test_a_field_that_is_no_setting_is_refused(hint: Any, default: Any) -> None:
    with pytest.raises(UserError, match="'size' of a.py is no setting. Annotate it as a Literal"):
        settings.table(field_of(hint, default), "a.py")


def test_two_settings_of_one_name_are_refused() -> None:
    @dataclass(frozen=True)
    class Twice:
        mixed: bool = False
        form: Literal["plain", "mixed"] = "plain"

    with pytest.raises(UserError, match="a.py: two settings have the name 'mixed'"):
        settings.table(Twice, "a.py")


# --- config files ------------------------------------------------------------------------------

FILE = """{future}
from dataclasses import dataclass
from typing import Literal

@dataclass(frozen=True, kw_only=True)
class Setting:
    size: Literal["small", "large"]
    long: bool = False

def get_config(setting: Setting):
    return {{"width": {{"small": 8, "large": 16}}[setting.size], "steps": 20 if setting.long else 10}}
"""


@pytest.mark.parametrize("future", ["", "from __future__ import annotations"])
def test_a_config_file_is_given_its_setting(tmp_path: Path, future: str) -> None:
    path = tmp_path / "made.py"
    path.write_text(FILE.format(future=future))
    assert config.read_file(f"{path}:small") == {"width": 8, "steps": 10}
    assert config.read_file(f"{path}:large-long") == {"width": 16, "steps": 20}
    with pytest.raises(UserError, match=f"'{path}' has no setting 'larg'. Did you mean 'large'"):
        config.read_file(f"{path}:larg")
    with pytest.raises(UserError, match=f"write --config={path}:SETTING, one of small, small-long"):
        config.read_file(str(path))


def test_files_of_one_name_have_their_own_settings(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "made.py" for folder in "ab"]
    for path, words in zip(paths, ("small", "smaller"), strict=True):
        path.parent.mkdir()
        text = FILE.format(future="from __future__ import annotations")
        path.write_text(text.replace('"small"', f'"{words}"'))
    modules = [config.load_module(path) for path in paths]
    first, second = (settings.table(module.Setting, "made.py") for module in modules)
    assert list(first)[:1] == ["small"] and list(second)[:1] == ["smaller"]


def test_a_function_without_a_setting_is_given_the_argument_itself(tmp_path: Path) -> None:
    path = tmp_path / "made.py"
    path.write_text("def get_config(steps: 'Missing' = '7'):\n    return {'steps': int(steps)}\n")
    assert config.read_file(f"{path}:9") == {"steps": 9}
    assert config.read_file(str(path)) == {"steps": 7}
