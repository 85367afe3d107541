"""Settings of a config file: the words after its path, such as `moe-b` of `configs/imp.py:moe-b`, as typed values.

A config file with settings describes them by a frozen dataclass, and its `get_config` takes one:

    @dataclass(frozen=True, kw_only=True)
    class Setting:
        moe: bool = False
        size: Literal["s", "b"]
        videos: Literal["released", "mixed"] = "released"

    def get_config(setting: Setting) -> ConfigDict:

A field is a choice of words, or a flag that is off by default. The name of a setting joins the words of its fields by
dashes, in their order: the word chosen, or the flag's own name. A field at its default is not written, so each setting
has one name: here `s`, `s-mixed`, `moe-b` and so on, eight in all. A combination that `__post_init__` refuses with a
`ValueError` is no setting. The setting whose fields are all at their defaults has the empty name: it is what the file
gives without an argument, and a file that has no such setting requires an argument.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import typing
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Literal, TypeVar

from mmjax.core.errors import UserError, nearest

T = TypeVar("T")


def setting_type(get_config: Callable[..., Any]) -> type[Any] | None:
    """Return the dataclass that `get_config` takes, None if it takes none."""
    try:
        parameters = inspect.signature(get_config, eval_str=True).parameters.values()
    except NameError:  # an annotation for type checkers alone
        return None
    hints = [p.annotation for p in parameters]
    is_setting = bool(hints) and isinstance(hints[0], type) and dataclasses.is_dataclass(hints[0])
    return hints[0] if is_setting else None


def parse(cls: type[T], argument: str, file: str) -> T:
    """Return the setting that an argument names.

    Args:
      cls: the dataclass of a file's settings.
      argument: a setting's name, empty for the default.
      file: the config file's path, for messages.

    Raises:
      UserError: there is no such setting, or the file has no default; names the nearest, or all of them.
    """
    settings = table(cls, file)
    if argument in settings:
        return settings[argument]
    if not argument:
        known = ", ".join(settings)
        raise UserError(
            f"Config file '{file}' needs a setting: write --config={file}:SETTING, one of {known}."
        )
    spelled = {_spelled(setting): name for name, setting in settings.items()}
    if spelled.get(argument):
        hint = f" Did you mean '{spelled[argument]}'?"
    else:
        hint = nearest(argument, [name for name in settings if name])
    raise UserError(f"'{file}' has no setting '{argument}'.{hint}")


def _spelled(setting: Any) -> str:
    """Return the name that a setting would have if words of defaults were written."""
    values = ((f.name, getattr(setting, f.name)) for f in dataclasses.fields(setting))
    return "-".join(key if value is True else value for key, value in values if value)


def table(cls: type[T], file: str) -> dict[str, T]:
    """Return the settings of a file by name.

    Raises:
      UserError: a field that is no choice of words and no flag, or two settings of one name.
    """
    hints = typing.get_type_hints(cls)
    choices = [
        list(_choices(field, hints[field.name], file))
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
    ]
    settings: dict[str, T] = {}
    for chosen in itertools.product(*choices):
        name = "-".join(word for word, _, _ in chosen if word)
        with suppress(ValueError):
            setting = cls(**{key: value for _, key, value in chosen})
            if name in settings:
                raise UserError(
                    f"{file}: two settings have the name '{name}'. Rename a field's word."
                )
            settings[name] = setting
    return settings


def _choices(
    field: dataclasses.Field[Any], hint: Any, file: str
) -> Iterator[tuple[str, str, bool | str]]:
    """Yield the values of a field: the word in the setting's name, the field's name, the value."""
    words = typing.get_args(hint)
    if typing.get_origin(hint) is Literal and all(isinstance(word, str) for word in words):
        for word in sorted(words, key=lambda word: word != field.default):
            yield ("" if word == field.default else word), field.name, word
    elif hint is bool and field.default is False:
        yield from (("", field.name, False), (field.name, field.name, True))
    else:
        raise UserError(
            f"'{field.name}' of {file} is no setting. Annotate it as a Literal of words, or as bool with the default "
            "False."
        )


def check_call(get_config: Callable[..., Any], arguments: list[str], file: str) -> None:
    """Raise `UserError` if `get_config` does not take these arguments."""
    signature = inspect.signature(get_config)
    try:
        signature.bind(*arguments)
    except TypeError as error:
        if not signature.parameters:
            words = f"has no settings, and '{arguments[0]}' was given. Write --config={file}."
        elif not arguments:
            words = f"needs a setting: get_config{signature}. Write --config={file}:SETTING."
        else:
            words = f"takes no single setting: get_config{signature}. Give it one parameter."
        raise UserError(f"Config file '{file}' {words}") from error


def literal(text: str) -> Any:
    """Return the value that a word of a command line stands for: a Python literal, else the word itself."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
