"""Describe the keys of a config: type, default, bounds, class of change and meaning, read from the dataclasses.

A key's meaning stands under `Attributes:` in the docstring of its dataclass, its bounds in the calls of `check` and
`check_choices` in `__post_init__`, and its class of change in the metadata of its field.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Union

from mmjax.core import config as configs
from mmjax.core.bounds import words
from mmjax.core.errors import UserError, nearest

REQUIRED = "required"
# Kinds of blocks whose fields hold plain data that another module builds.
_HOLDS: Mapping[str, str] = {
    "objective": "objectives",
    "evaluators": "evaluators",
    **dict.fromkeys(("source", "names", "left", "right"), "sources"),
    "inputs": "inputs",
}
_INPUTS = "inputs"


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a block.

    Attributes:
      name: the key.
      type: its type, in words.
      default: its default as JSON, or `required`.
      bounds: an interval or the words to choose from; empty where the type is all.
      change: `free`, `schedule` or `structural`.
      meaning: what it sets; empty where the dataclass has no words for it.
    """

    name: str
    type: str
    default: str
    bounds: str
    change: str
    meaning: str


@dataclasses.dataclass(frozen=True)
class Target:
    """A place in a config.

    Attributes:
      path: its dotted key; empty for the whole config.
      summary: what stands there.
      module: where it is defined.
      keys: its keys, or the one key that it is.
      names: the components that may stand there, with a summary each, where the path leaves that open.
      is_value: whether it is a single value.
    """

    path: str
    summary: str
    module: str = ""
    keys: Sequence[Key] = ()
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    is_value: bool = False


def keys(
    cls: type, change: str = "structural", classes: Mapping[str, str] | None = None
) -> list[Key]:
    """Return the keys of a dataclass, those that must be given first.

    Args:
      change: the class of the block, which holds for keys that state none.
      classes: classes by key that the block's place states, see `mmjax.core.config.holds`.
    """
    hints, texts, limits = _hints(cls), meanings(cls), bounds(cls)
    rows = [
        Key(
            f.name,
            type_name(hints[f.name]),
            _default(f),
            limits.get(f.name, ""),
            str(f.metadata.get("change", (classes or {}).get(f.name, change))),
            texts.get(f.name) or _summary_of(hints[f.name]),
        )
        for f in dataclasses.fields(cls)
    ]
    return sorted(rows, key=lambda row: row.default != REQUIRED)


def summary(cls: type) -> str:
    """Return the first paragraph of a dataclass's docstring, or of its module's where it has none of its own."""
    text = _docstring(cls)
    if not text or text.startswith("Attributes:"):
        text = inspect.getdoc(inspect.getmodule(cls)) or ""
    return " ".join(text.split("\n\n")[0].split())


def meanings(cls: type) -> dict[str, str]:
    """Return the words for each attribute in the docstrings of a dataclass and its bases."""
    texts: dict[str, str] = {}
    for base in cls.__mro__:
        for name, text in _attributes(_docstring(base)):
            texts.setdefault(name, text)
    return texts


def bounds(cls: type) -> dict[str, str]:
    """Return the interval or the choices of each attribute that `__post_init__` checks."""
    limits: dict[str, str] = {}
    for base in cls.__mro__:
        method = vars(base).get("__post_init__")
        if method is not None and dataclasses.is_dataclass(base):
            for name, text in _checks(method):
                limits[name] = f"{limits[name]}; {text}" if name in limits else text
    return limits


def type_name(hint: Any) -> str:
    """Return an annotated type as a config writes it, such as `list of str`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in arguments)
    if origin is dict:
        return f"{type_name(arguments[1])} by name" if arguments[1] is not Any else "block"
    if origin is tuple:
        return f"list of {type_name(arguments[0])}"
    if dataclasses.is_dataclass(hint):
        return "block"
    return {type(None): "None", Any: "any"}.get(hint) or str(getattr(hint, "__name__", hint))


def find(
    path: str, schema: type, names: Sequence[str] = (), config: Mapping[str, Any] | None = None
) -> Target:
    """Return the place that a dotted key names.

    Args:
      path: such as `tasks.T.objective` or `model.layers[0].blocks[0]`; names of tasks and modalities may be any.
      schema: the dataclass of a whole config.
      names: the components on the way, such as `contrastive`, in order, where `config` has none.
      config: a config, whose components are taken.

    Raises:
      UserError: there is no such key, or no component of that name.
    """
    parts = [part for part in re.sub(r"\[(\w*)\]", r".\1", path).split(".") if part]
    return _Walk(path, list(names), config or {}).at(parts, schema, None, "structural", config)


def summaries(kind: str) -> dict[str, str]:
    """Return the names of a kind's components with a summary of each."""
    return {name: summary(configs.resolve(kind, name, kind)) for name in configs.names(kind)}


def input_keys(modality: Any, change: str = "schedule") -> list[Key]:
    """Return the keys that a task has for a modality: those of its `Input`, and `instances`."""
    several = "clips or texts of each example, every one preprocessed alone; 0 for one without an axis of its own"
    return [
        *keys(modality.Input, change),
        Key("instances", "int", "0", "at least 0", change, several),
    ]


def nested(cls: type) -> Iterator[tuple[str, type, str]]:
    """Yield the blocks that a dataclass's keys hold: the path below it, their dataclass and its class of change.

    Components, which a `name` chooses, are not among them, see `summaries`.
    """
    for row in keys(cls):
        field = next(f for f in dataclasses.fields(cls) if f.name == row.name)
        hint, schema = _without_none(_hints(cls)[row.name]), _block_schema(field)
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        place = {dict: f"{row.name}.NAME", tuple: f"{row.name}[i]"}.get(origin, row.name)
        inner = schema or (arguments[origin is dict] if origin in (dict, tuple) else hint)
        if (
            isinstance(inner, type)
            and dataclasses.is_dataclass(inner)
            and not hasattr(inner, "KIND")
        ):
            yield place, inner, row.change


@dataclasses.dataclass
class _Walk:
    """A walk down the schema, and beside it down a config."""

    path: str
    names: list[str]
    config: Mapping[str, Any]
    classes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def at(self, parts: Sequence[str], hint: Any, field: Any, change: str, value: Any) -> Target:
        """Return the place `parts` below a value of type `hint`, which a field holds."""
        hint = _without_none(hint)
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        schema = _block_schema(field)
        if schema == _INPUTS and arguments[1:] != (Any,):
            return self._input(parts, change)
        if schema and (hint is Any or arguments[1:] == (Any,)):
            return self._block(parts, schema, field, change, value)
        if origin in (dict, tuple):
            inner = configs.entry(value, parts[0]) if parts else None
            return self.at(parts[1:], arguments[origin is dict], field, change, inner)
        if hasattr(hint, "KIND") or dataclasses.is_dataclass(hint):
            return self._block(parts, hint, field, change, value)
        raise UserError(f"'{self.path}' is below a single value.")

    def _block(
        self, parts: Sequence[str], schema: Any, field: Any, change: str, value: Any
    ) -> Target:
        kind: str = schema if isinstance(schema, str) else getattr(schema, "KIND", "")
        cls = self._component(kind, value) if kind else schema
        if cls is None:
            if parts:
                raise UserError(
                    f"'{self.path}': the keys depend on which of {_package(kind)} stands there. Add its name "
                    "(`mmjax describe KEY NAME`) or a config (`--config=CONFIG`)."
                )
            return Target(
                self.path, f"One of {_package(kind)}, chosen by `name`.", names=summaries(kind)
            )
        if field is not None:
            self.classes = field.metadata.get("classes", self.classes)
        rows = keys(cls, change, self.classes)
        if not parts:
            return Target(self.path, summary(cls), cls.__module__, rows)
        return self._key(parts, cls, rows, value)

    def _key(self, parts: Sequence[str], cls: type, rows: Sequence[Key], value: Any) -> Target:
        (part, *inner_parts), known = parts, {row.name: row for row in rows}
        if part not in known:
            raise UserError(f"'{self.path}': no key '{part}'.{nearest(part, known)}")
        field = next(f for f in dataclasses.fields(cls) if f.name == part)
        hint, row = _hints(cls)[part], known[part]
        below = {k: v for k, v in self.classes.items() if k.startswith(f"{part}.")}
        self.classes = {key.removeprefix(f"{part}."): change for key, change in below.items()}
        is_plain = typing.get_origin(_without_none(hint)) in (dict, tuple)
        if not _is_block(hint, field) and (
            is_plain or not inner_parts
        ):  # an entry of plain data is described as a whole
            return Target(self.path, row.meaning, cls.__module__, [row], is_value=True)
        return self.at(inner_parts, hint, field, row.change, configs.entry(value, part))

    def _input(self, parts: Sequence[str], change: str) -> Target:
        if not parts:
            words = "Settings of each modality that the task reads, by the modality's name."
            return Target(self.path, words, names=summaries("modalities"))
        modalities = self.config.get("modalities", {})
        block = modalities.get(parts[0], {"name": parts[0]})
        cls = self._component(
            "modalities", block if block["name"] in configs.names("modalities") else {}
        )
        if cls is None:
            raise UserError(
                f"'{self.path}': add the modality's name: {', '.join(configs.names('modalities'))}."
            )
        rows = input_keys(cls, change)
        if len(parts) == 1:
            return Target(self.path, summary(cls), cls.__module__, rows)
        known = {row.name: row for row in rows}
        if parts[1] not in known:
            raise UserError(f"'{self.path}': no key '{parts[1]}'.{nearest(parts[1], known)}")
        row = known[parts[1]]
        return Target(self.path, row.meaning, cls.__module__, [row], is_value=True)

    def _component(self, kind: str, value: Any) -> Any:
        """Return the class of a component: the config's, else the next of the names, else None."""
        name = value.get("name") if isinstance(value, Mapping) else None
        if name is None and self.names:
            name = self.names.pop(0)
        if name is None:
            return None
        return configs.resolve(kind, name, self.path)


def _package(kind: str) -> str:
    return f"`{configs.KINDS[kind].replace('.', '/')}/`"


def _block_schema(field: Any) -> Any:
    """Return what the plain blocks of a field are built as: a dataclass, a kind, `inputs`, or None."""
    if field is None or "dict[str, Any]" not in str(field.type):
        return None
    return field.metadata.get("holds") or _HOLDS.get(field.name)


def _is_block(hint: Any, field: Any) -> bool:
    hint = _without_none(hint)
    arguments = typing.get_args(hint)
    inner = (
        arguments[-1] if typing.get_origin(hint) is dict else arguments[0] if arguments else hint
    )
    return bool(_block_schema(field)) or dataclasses.is_dataclass(inner) or hasattr(inner, "KIND")


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (Union, types.UnionType):
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return hint


def _docstring(cls: type) -> str:
    """Return the docstring that a class itself has; not the signature that `dataclass` gives one without."""
    text = inspect.cleandoc(vars(cls).get("__doc__") or "")
    return "" if text.startswith(f"{cls.__name__}(") else text


def _attributes(text: str) -> Iterator[tuple[str, str]]:
    """Yield the name and words of each entry under `Attributes:`."""
    lines = text.partition("Attributes:")[2].split("\n")
    lines = [line for line in lines if line.strip()]
    if not lines:
        return
    indent = len(lines[0]) - len(lines[0].lstrip())
    entries: list[list[str]] = []
    for line in lines:
        if len(line) - len(line.lstrip()) > indent and entries:
            entries[-1].append(line.strip())
        elif match := re.match(r"((?:\w+, )*\w+): ?(.*)", line[indent:]):
            entries.append([*match.groups()])
        else:
            break
    for names, *parts in entries:
        for name in names.split(", "):
            yield name, " ".join(parts)


def _checks(method: Any) -> Iterator[tuple[str, str]]:
    """Yield the attribute and the bounds of each argument of `check` and `check_choices` in a method."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    for node in ast.walk(tree):
        called = (
            node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
        )
        if called not in ("check", "check_choices") or not isinstance(node, ast.Call):
            continue
        for argument in node.keywords:
            try:
                value = _value(argument.value, method.__globals__)
            except (ValueError, KeyError, AttributeError):  # an expression, or a name of the method
                if argument.arg:
                    yield argument.arg, ast.unparse(argument.value)
                continue
            pairs = {argument.arg: value} if argument.arg else value  # `**{...}`
            for key, limits in pairs.items():
                yield key, words(limits) if called == "check" else ", ".join(map(_word, limits))


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """Return the value of a constant, a name, an attribute, a tuple or a `dict.fromkeys` of these."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return names[node.id]
        case ast.Attribute():
            return getattr(_value(node.value, names), node.attr)
        case ast.Starred():
            return _value(node.value, names)
        case ast.Tuple():
            parts = [(isinstance(e, ast.Starred), _value(e, names)) for e in node.elts]
            return tuple(x for is_many, part in parts for x in (part if is_many else [part]))
        case ast.Call(func=ast.Attribute(attr="fromkeys"), args=arguments):
            return dict.fromkeys(*(_value(argument, names) for argument in arguments))
    raise ValueError(f"no constant, name or tuple: {ast.unparse(node)}")


def _word(choice: str) -> str:
    return choice or '""'


def _default(field: Any) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return REQUIRED
    if dataclasses.is_dataclass(value):
        module = type(value).__module__.rpartition(".")[2]
        return f'{{"name": "{module}"}}' if hasattr(value, "KIND") else "{}"
    return json.dumps(value, default=str)


def _summary_of(hint: Any) -> str:
    cls = _without_none(hint)
    return summary(cls) if isinstance(cls, type) and dataclasses.is_dataclass(cls) else ""


_hints = functools.cache(typing.get_type_hints)
