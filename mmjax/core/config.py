"""Configs: read a file, apply overrides, check every key, compare with a saved one.

A config is plain data (JSON values). The schema is the code itself: a block with a `name` resolves to
the module `<name>` of that kind's package, and its other keys are the fields of the dataclass found there.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import json
import math
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, Union

from mmjax.core import parts as config_parts
from mmjax.core import settings
from mmjax.core.bounds import FieldError
from mmjax.core.errors import UserError, nearest
from mmjax.core.extensions import check_class, imported
from mmjax.core.renamed_keys import new_name

T = TypeVar("T")
# Packages whose modules a config names, each in a file of its own, by kind.
KINDS = {
    "algorithms": "mmjax.optim.algorithms",
    "blocks": "mmjax.blocks",
    "connectors": "mmjax.connectors",
    "evaluators": "mmjax.evaluators",
    "modalities": "mmjax.modalities",
    "objectives": "mmjax.objectives",
    "routers": "mmjax.nn.routers",
    "rules": "mmjax.schedule.rules",
    "sources": "mmjax.sources",
}
_BASE = "base"  # the module of a kind that defines its interface
_LARGEST = 2.0**128  # the least number that float32 has not
Block = dict[str, Any]


def read_file(path: str) -> Block:
    """Return the dict made by `get_config()` of a config.

    Args:
      path: a Python file, or the name of a config that ships with mmjax; `quickstart` is `configs/quickstart.py`.
        `NAME:SETTING` passes a setting, see `mmjax.core.settings`; to a function that takes none, the string itself.

    Raises:
      UserError: there is no such file, name or setting, or what it returns is no config.
    """
    name, _, argument = path.partition(":")
    file = config_file(name)
    module = load_module(file)
    if not hasattr(module, "get_config"):
        raise UserError(f"Config file '{file}' has no function get_config().")
    config = module.get_config(*_arguments(module.get_config, argument, name))
    block = plain(config.to_dict() if hasattr(config, "to_dict") else config, "config")
    if not isinstance(block, dict):
        raise UserError(
            f"get_config() of '{file}' returns {type(config).__name__}, not a ConfigDict."
        )
    return block


def config_file(name: str) -> str:
    """Return the file of a config: a path ends in `.py` or has a folder, all else is the name of one that ships."""
    is_path = name.endswith(".py") or "/" in name
    if is_path and Path(name).is_file():
        return name
    if not is_path and name in shipped():
        return str(_shipped_folder() / f"{name}.py")
    what = "config file" if is_path else "config"
    raise UserError(
        f"No {what} '{name}'.{_nearest_shipped(Path(name).stem)} "
        "Give --config one of these names, or the path of a Python file with get_config()."
    )


def _nearest_shipped(name: str) -> str:
    hint, known = nearest(name, shipped()), f" Known: {', '.join(shipped())}."
    return hint if hint == known else hint + known


def shipped() -> list[str]:
    """Return the names of the configs that ship with mmjax, sorted."""
    files = _shipped_folder().glob("*.py")
    return sorted(file.stem for file in files if not file.stem.startswith("_"))


def _shipped_folder() -> Path:
    """Return `mmjax/configs` of an installed wheel, or `configs` of the checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def load_module(file: str | Path) -> types.ModuleType:
    """Return a config file as a module; for configs that begin from another one:
    `load_module(Path(__file__).with_name("quickstart.py")).get_config()`.
    """
    path = hashlib.sha256(str(Path(file).resolve()).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"mmjax_config_{Path(file).stem}_{path}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where a dataclass looks up its annotations
    spec.loader.exec_module(module)
    return module


def _arguments(get_config: Callable[..., Any], argument: str, file: str) -> list[Any]:
    setting = settings.setting_type(get_config)
    if setting is not None:
        return [settings.parse(setting, argument, file)]
    arguments = [argument] if argument else []
    settings.check_call(get_config, arguments, file)
    return arguments


def plain(value: Any, where: str) -> Any:
    """Return `value` as JSON data (tuples become lists); anything else is an error naming the key."""
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(
            f"{where} is {value}; config values are JSON data, which has no such number."
        )
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UserError(
        f"{where} is a {type(value).__name__}; config values are JSON data. Name it instead."
    )


def override(config: Block, assignments: Sequence[str]) -> Block:
    """Return `config` with `a.b=value` assignments applied; values are Python literals, else strings.

    A key may be new to the file (a default); unknown ones are found later, by the schema. Entries of a list are
    numbered from 0: `model.layers.0.repeat=2`, or `model.layers[0].repeat=2`.

    Raises:
      UserError: an assignment without `=`, a key below a plain value, or a list without that entry.
    """
    config = json.loads(json.dumps(config))
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--config.{assignment}: write --config.KEY=VALUE.")
        *parents, last = re.sub(r"\[(\d+)\]", r".\1", key).split(".")
        block: Any = config
        for depth, name in enumerate(parents):
            where = ".".join(parents[: depth + 1])
            index = _index(block, name, key, ".".join(parents[:depth]))
            block = block.setdefault(index, {}) if isinstance(block, dict) else block[index]
            if not isinstance(block, dict | list):
                raise UserError(f"--config.{key}: '{where}' is a value, not a block.")
        block[_index(block, last, key, ".".join(parents))] = plain(settings.literal(text), key)
    return config


def _index(block: Block | list[Any], name: str, key: str, where: str) -> Any:
    """Return the index of a part of an assignment's key into the dictionary or list `where`."""
    if isinstance(block, dict):
        return name
    if not name.isdecimal() or int(name) >= len(block):
        numbers = f", numbered from 0 to {len(block) - 1}" if block else ""
        raise UserError(
            f"--config.{key}: the list '{where}' has no entry '{name}'; its length is {len(block)}{numbers}."
        )
    return int(name)


# --- names -------------------------------------------------------------------------------------


def names(kind: str) -> list[str]:
    """Return the names that a config may use for `kind`: the modules of its package."""
    package = importlib.import_module(KINDS[kind])
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name != _BASE)


def add_folder(folder: str) -> None:
    """Let configs also name modules under `folder/<kind>/NAME.py` (the user's own code)."""
    if not Path(folder).is_dir():
        raise UserError(f"--extra={folder}: no such folder.")
    kinds = [kind for kind in KINDS if (Path(folder) / kind).is_dir()]
    if not kinds:
        raise UserError(
            f"--extra={folder}: no folder in it has the name of a kind ({', '.join(KINDS)}). "
            "Put a module of your own in DIR/KIND/NAME.py, and give DIR."
        )
    for kind in kinds:
        _add_path(kind, str((Path(folder) / kind).resolve()))
    if folder not in _added:
        _added.append(folder)


_added: list[str] = []


def added_folders() -> tuple[str, ...]:
    """Return the folders of `add_folder`; another process is to add them too."""
    return tuple(_added)


_noting: list[set[tuple[str, str]]] = []


@contextmanager
def noting() -> Iterator[set[tuple[str, str]]]:
    """Note the (kind, name) of all modules that configs resolve to within the block."""
    used: set[tuple[str, str]] = set()
    _noting.append(used)
    try:
        yield used
    finally:
        _noting.remove(used)


def digests_of_extensions(used: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the SHA-256 of the files of modules outside mmjax (`--extra`), by `KIND/NAME`.

    Modules of such folders that these import are among them, and so on.

    Args:
      used: (kind, name) of the modules; those of mmjax itself are skipped.
    """
    digests: dict[str, str] = {}
    coming = sorted(used)
    while coming:
        kind, name = coming.pop()
        file = _extension(kind, name)
        if file is None or f"{kind}/{name}" in digests:
            continue
        content = file.read_bytes()
        digests[f"{kind}/{name}"] = hashlib.sha256(content).hexdigest()
        with suppress(SyntaxError, ValueError):  # changed since it was imported
            coming += _imported(content)
    return dict(sorted(digests.items()))


def _extension(kind: str, name: str) -> Path | None:
    """Return the file of a module in a folder of `add_folder`; None if it is mmjax's own or there is none."""
    first, *added = importlib.import_module(KINDS[kind]).__path__
    files = (Path(path) / f"{name}.py" for path in added)
    return next((file for file in files if file.is_file()), None)


def _imported(content: bytes) -> list[tuple[str, str]]:
    """Return (kind, name) of the modules of a kind's package that a file imports."""
    names: list[str] = []
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [
        (kind, name.removeprefix(f"{package}.").split(".")[0])
        for name in names
        for kind, package in KINDS.items()
        if name.startswith(f"{package}.")
    ]


def _add_path(kind: str, path: str) -> None:
    package = importlib.import_module(KINDS[kind])
    if path in package.__path__:
        return
    for module in pkgutil.iter_modules([path]):
        if module.name in names(kind):
            raise UserError(
                f"{path}/{module.name}.py: there is a '{module.name}' in {_folder(kind)} already. "
                "Give your own another name."
            )
    package.__path__.append(path)


def _folder(kind: str) -> str:
    return KINDS[kind].replace(".", "/")


def resolve(kind: str, name: Any, where: str) -> Any:
    """Return the object that the module `name` of a kind defines under its own name, in CamelCase."""
    if not isinstance(name, str) or name not in names(kind):
        raise UserError(
            f"{where}.name: no '{name}' in {_folder(kind)}.{nearest(str(name), names(kind))} "
            "(Modules of your own: --extra=DIR.)"
        )
    load = imported if _extension(kind, name) else importlib.import_module
    module = load(f"{KINDS[kind]}.{name}")
    for used in _noting:
        used.add((kind, name))
    expected = "".join(part.capitalize() for part in name.split("_"))
    if not hasattr(module, expected):
        raise UserError(f"{where}.name: {module.__file__} does not define '{expected}'.")
    return getattr(module, expected)


def component(kind: str, block: Mapping[str, Any], where: str) -> Any:
    """Build the component that `block` names: `{name: ..., **fields}`."""
    if "name" not in block:
        raise UserError(f"{where}: 'name' is missing.{nearest('', names(kind))}")
    cls = resolve(kind, block["name"], where)
    check_class(cls, kind, KINDS[kind], f"{where}.name: '{block['name']}'")
    return build(cls, {k: v for k, v in block.items() if k != "name"}, where)


# --- schema ------------------------------------------------------------------------------------


def build(cls: type[T], block: Mapping[str, Any], where: str) -> T:
    """Build a dataclass from a block: unknown, missing and wrongly typed keys are errors that name them."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in block:
        if key not in fields:
            inner = _key_of_component(key, block, hints)
            known = [*fields, *_with_name(cls, {})]
            moved = f" Did you mean '{where}.{inner}'?" if inner else nearest(key, known)
            hint = new_name(key, fields) or moved
            raise UserError(f"Unknown config key '{where}.{key}'.{hint}")
    values = {}
    for name, field in fields.items():
        if name in block:
            values[name] = _checked(block[name], hints[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"Config key '{where}.{name}' is missing ({_type_name(hints[name])}).")
    try:
        return cls(**values)
    except FieldError as error:
        raise UserError(f"{where}.{error.key} {error.words}") from error


def _key_of_component(key: str, block: Mapping[str, Any], hints: Mapping[str, Any]) -> str:
    """Return `FIELD.KEY` if the component in a field of the block has this key, else an empty string."""
    for name, hint in hints.items():
        if hasattr(hint, "KIND"):
            cls = _schema_of(hint, [block.get(name, {})])
            if key == "name" or key in getattr(cls, "__dataclass_fields__", ()):
                return f"{name}.{key}"
    return ""


def _with_name(hint: Any, block: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a component's block with the name that it has by default, if its kind has a default."""
    return {"name": hint.DEFAULT, **block} if hasattr(hint, "DEFAULT") else block


def _checked(value: Any, hint: Any, where: str) -> Any:
    """Return `value` as the annotated type: ints are floats too, lists become tuples, blocks dataclasses."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        option = _option(value, [a for a in arguments if a is not type(None)])
        if option is not None:
            return _checked(value, option, where)
    if hasattr(hint, "KIND") and isinstance(value, Mapping):
        return component(hint.KIND, _with_name(hint, value), where)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(typing.cast(type, hint), value, where)
    if origin is dict and isinstance(value, Mapping):
        return {k: _checked(v, arguments[1], f"{where}.{k}") for k, v in value.items()}
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_checked(v, arguments[0], f"{where}[{i}]") for i, v in enumerate(value))
    if hint in (int, float) and isinstance(value, int | float) and not _fits(value):
        raise UserError(f"{where} is {value}; expected a finite number that fits into its type.")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (
        isinstance(hint, type)
        and isinstance(value, hint)
        and (hint is not int or not isinstance(value, bool))
    ):
        return value
    raise UserError(f"Config key '{where}' is {value!r}; expected {_type_name(hint)}.")


def _option(value: Any, options: list[Any]) -> Any:
    """Return the value as the first of several types that it fits, or as the only one; else None."""
    shapes = {tuple: list | tuple, dict: Mapping, float: int | float}

    def fits(option: Any) -> bool:
        kind = typing.get_origin(option) or option
        shape = Mapping if dataclasses.is_dataclass(kind) else shapes.get(kind, kind)
        return isinstance(value, shape)

    return options[0] if len(options) == 1 else next(filter(fits, options), None)


def _fits(value: float) -> bool:
    """Return whether an integer fits into 64 bits, a float into float32."""
    return abs(value) < 2**63 if isinstance(value, int) else abs(value) < _LARGEST


def _type_name(hint: Any) -> str:
    """Return the annotated type in words, such as "an integer"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(a) for a in arguments)
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a block of keys"
    if origin is tuple:
        return f"a list, each {_type_name(arguments[0])}"
    return "None" if hint is type(None) else str(getattr(hint, "__name__", hint))


def check_names(names: Iterable[str], where: str) -> None:
    """Raise unless all `names` can be parts of parameter names, of file names and of tables."""
    for name in names:
        if not re.fullmatch(r"\w[\w-]*", name):
            raise UserError(
                f"{where}: '{name}' is no name; use letters, digits, underscores and dashes."
            )


# --- comparing with a saved config -------------------------------------------------------------


def flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, leaf) pairs of a config; lists of plain values are leaves."""
    if isinstance(config, Mapping) and config:
        for key in sorted(config):
            yield from flat(config[key], f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(config, list) and any(isinstance(v, Mapping) for v in config):
        for index, value in enumerate(config):
            yield from flat(value, f"{prefix}.{index}")
    else:
        yield prefix, config


# Metadata of a field of the schema: what a change of its key means for a run that exists. It holds for the keys below
# it too, where these state nothing else. A free key may change at any time; a schedule key changes the course of the
# run from then on; a structural key fixes its parameters or data. The last is the class of all that states none.
FREE: Mapping[str, Any] = {"change": "free"}
SCHEDULE: Mapping[str, Any] = {"change": "schedule"}
STRUCTURAL: Mapping[str, Any] = {"change": "structural"}


def holds(schema: str | type, classes: Mapping[str, str] | None = None) -> Mapping[str, Any]:
    """Return metadata of a field whose plain blocks are built as dataclasses later.

    Args:
      schema: the dataclass, or the kind whose module each block's `name` chooses.
      classes: `free`, `schedule` or `structural` by key, for keys whose fields state none.
    """
    return {"holds": schema, "classes": classes or {}}


def key_class(key: str, schema: type, *blocks: Block) -> str:
    """Return `free`, `schedule` or `structural`: what a change of a key means for a run that exists.

    It is metadata of the key's field (`FREE`, `SCHEDULE`, `STRUCTURAL`). A key that the schema lacks, or that is below
    a block whose `name` is unknown, has the class of the field that holds it.

    Args:
      key: dotted, as `flat` gives it.
      schema: the dataclass of a whole config.
      blocks: configs that have the key; the first that names a component there decides which one it is.
    """
    return _class_of(key.split("."), schema, {}, blocks, "structural")


def _class_of(
    parts: Sequence[str], hint: Any, metadata: Mapping[str, Any], blocks: Iterable[Any], kind: str
) -> str:
    """Return the class of the key `parts` below a value of type `hint`, held by a field with this metadata."""
    if not parts:
        return kind
    blocks, (part, *remaining) = list(blocks), parts
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        options = [a for a in arguments if a is not type(None)]
        is_list = parts[0].isdecimal()  # an entry of a list, where one may stand for a block
        lists = [a for a in options if is_list and typing.get_origin(a) is tuple]
        return _class_of(parts, (lists or options)[0], metadata, blocks, kind)
    if "holds" in metadata and (hint is Any or arguments[1:] == (Any,)):
        kind = metadata["classes"].get(".".join(parts), kind)
        return _class_of(parts, _schema_of(metadata["holds"], blocks), {}, blocks, kind)
    inner = [entry(block, part) for block in blocks]
    if hasattr(hint, "KIND"):
        hint = _schema_of(hint, blocks)
    if origin in (dict, tuple):
        return _class_of(remaining, arguments[origin is dict], metadata, inner, kind)
    if not dataclasses.is_dataclass(hint):
        return kind
    field = {f.name: f for f in dataclasses.fields(hint)}.get(part)
    if field is None:
        return kind
    hint, kind = _hints(typing.cast(type, hint))[part], field.metadata.get("change", kind)
    return _class_of(remaining, hint, field.metadata, inner, kind)


_hints = functools.cache(typing.get_type_hints)


def _schema_of(schema: str | type, blocks: Iterable[Any]) -> Any:
    """Return the class that a block is built as, the first of `blocks` that names one; None if none does.

    `schema` is a dataclass, or a kind or the base class of one.
    """
    kind = schema if isinstance(schema, str) else getattr(schema, "KIND", None)
    if kind is None:
        return schema
    for block in blocks:
        with suppress(UserError):
            if isinstance(block, Mapping):
                return resolve(kind, _with_name(schema, block).get("name"), "")
    return None


def entry(block: Any, part: str) -> Any:
    """Return an entry of a dictionary or list; None if it has none, or is neither."""
    if isinstance(block, Mapping):
        return block.get(part)
    if isinstance(block, (list, tuple)) and part.isdecimal() and int(part) < len(block):
        return block[int(part)]
    return None


@dataclasses.dataclass(frozen=True)
class Difference:
    """One key that differs between the saved config and the new one; None where it is absent."""

    key: str
    kind: str
    saved: Any
    new: Any

    def __str__(self) -> str:
        saved, new = (
            "{...}" if isinstance(v, Mapping) else repr(v) for v in (self.saved, self.new)
        )
        return f"{self.key} ({self.kind}): saved {saved}, now {new}"


def compare(saved: Block, new: Block, schema: type) -> list[Difference]:
    """Return the differences by key.

    A whole task, modality or tower that comes or goes is one difference, and counts as `schedule`. `schema` is the
    dataclass of a whole config, whose fields state their class (see `key_class`).
    """
    saved, new = config_parts.alike(saved, new)
    old_leaves, new_leaves = dict(flat(saved)), dict(flat(new))
    differences = [
        Difference(f"{section}.{name}", "schedule", before.get(name), after.get(name))
        for section in config_parts.SECTIONS
        for before, after in [[config_parts.blocks(c, section) for c in (saved, new)]]
        for name in before.keys() ^ after.keys()
    ]
    moved = {difference.key for difference in differences}
    for key in old_leaves.keys() | new_leaves.keys():
        before, after = old_leaves.get(key), new_leaves.get(key)
        names = key.split(".")
        is_moved = ".".join(names[:2]) in moved or ".".join(names[:3]) in moved
        if before != after and not is_moved:
            differences.append(Difference(key, key_class(key, schema, new, saved), before, after))
    return sorted(differences, key=lambda difference: difference.key)


def check_compatible(
    saved: Block, new: Block, allow_change: bool, schema: type
) -> list[Difference]:
    """Return the differences that the run may take up; structural ones, or schedule ones not allowed, raise."""
    differences = compare(saved, new, schema)
    structural = [d for d in differences if d.kind == "structural"]
    if structural:
        lines = "\n  ".join(map(str, structural))
        raise UserError(
            "This workdir holds a run of another config; these keys fix its parameters or data:\n  "
            f"{lines}\nUse another --workdir, or the saved values."
        )
    schedule = [d for d in differences if d.kind == "schedule"]
    if schedule and not allow_change:
        lines = "\n  ".join(map(str, schedule))
        raise UserError(
            f"The config changes the course of the run in this workdir:\n  {lines}\n"
            "Add --allow_change to start a new segment with it, or use another --workdir."
        )
    return differences
