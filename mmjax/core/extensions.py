"""Mistakes in the code of components, such as the user's own files: where they are, and checks that find them early."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import sysconfig
import traceback
import types
import typing
from pathlib import Path
from typing import Any

from mmjax.core.errors import CodeError, UserError

# An error of one of these types is rarely one of the data.
MISTAKES = (TypeError, AttributeError, NameError, KeyError, ImportError)
_BASES = {  # a block is any dataclass that can be built
    "algorithms": "Algorithm",
    "evaluators": "Evaluator",
    "modalities": "Modality",
    "objectives": "Objective",
    "routers": "Router",
    "rules": "Rule",
    "sources": "Source",
}
_PACKAGE = f"{Path(__file__).resolve().parents[1]}{os.sep}"
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})


def described(error: BaseException) -> str:
    """Return an error as `TYPE: MESSAGE (FILE:LINE)`."""
    words = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {words} ({_line_of(error)})"


def _line_of(error: BaseException) -> str:
    """Return `FILE:LINE` of the innermost frame in the user's code, else in mmjax's, else of the innermost one."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_shown(error.filename)}:{error.lineno}"
    frames = list(traceback.extract_tb(error.__traceback__))[::-1]
    users = [f for f in frames if not f.filename.startswith((_PACKAGE, "<", *_INSTALLED))]
    ours = [f for f in frames if f.filename.startswith(_PACKAGE)]
    chosen = [*users, *ours, *frames][:1]
    return f"{_shown(chosen[0].filename)}:{chosen[0].lineno}" if chosen else "no line known"


def defined_in(thing: Any) -> str:
    """Return `CLASS in FILE` for a class or an instance of it."""
    cls = thing if isinstance(thing, type | types.FunctionType) else type(thing)
    try:
        file = inspect.getsourcefile(cls)
    except (TypeError, OSError):
        file = None
    return f"{cls.__qualname__} in {_shown(file)}" if file else cls.__qualname__


def _shown(file: str) -> str:
    """Return a path relative to the working directory, if it is below it, or to mmjax's package."""
    for folder in (os.getcwd(), str(Path(_PACKAGE).parent)):
        if file.startswith(folder + os.sep):
            return os.path.relpath(file, folder)
    return file


def check_type(value: Any, expected: type, method: str, owner: Any) -> None:
    """Raise `CodeError` unless what a method of a component returned is of the expected type."""
    if not isinstance(value, expected):
        raise CodeError(
            f"{method} of {defined_in(owner)} returns {type(value).__name__}; it must return {expected.__name__}."
        )


def imported(module: str) -> types.ModuleType:
    """Return a module of the user's; raise `UserError` with the line if its import fails."""
    try:
        return importlib.import_module(module)
    except UserError:
        raise
    except Exception as error:
        kind, name = module.split(".")[-2:]
        raise UserError(f"{kind}/{name}.py cannot be imported. {described(error)}") from error


def check_class(cls: Any, kind: str, package: str, where: str) -> None:
    """Raise `UserError` unless what a config names is a class that can be built: a dataclass of its kind, and whole."""
    folder = package.replace(".", "/")
    if not isinstance(cls, type) or not dataclasses.is_dataclass(cls):
        problem = "is no dataclass. Its fields are the keys of the config: decorate it with @dataclass(frozen=True)."
    elif "__dataclass_fields__" not in vars(cls):
        problem = (
            "derives from a dataclass and is none itself, so that its fields are no keys of the config: decorate it "
            "with @dataclass(frozen=True)."
        )
    else:
        problem = _problem(cls, kind, package)
    if problem:
        raise UserError(f"{where} in {folder} {problem} ({defined_in(cls)})")


def _problem(cls: type, kind: str, package: str) -> str:
    name = _BASES.get(kind, "")
    if not name and not callable(getattr(cls, "build", None)):
        return "lacks the method build(width)."
    if name and not issubclass(cls, getattr(importlib.import_module(f"{package}.base"), name)):
        return f"does not derive from {name} of {package}.base."
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        return f"lacks {', '.join(missing)}: see {name} of {package}.base."
    try:
        typing.get_type_hints(cls)
    except Exception as error:
        return f"has a field whose type cannot be read: {type(error).__name__}: {error}."
    return ""
