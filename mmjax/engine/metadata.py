"""The meta data of a checkpoint: one JSON document with the clock, the config, and what they depend on.

From format 2 on it is sealed by a SHA-256 that also covers the step, and the step must be that of its folder.
Documents of format 1 have no digest; of both, the parts that a run goes by are checked for their types.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any

from etils import epath

from mmjax.core import migrations
from mmjax.core.errors import UserError
from mmjax.engine.integrity import DECODING, SEAL, Mismatch, seal, unseal, words
from mmjax.engine.state import Clock

FORMAT = 2
AVERAGE_OF = "average_of"  # the checkpoints of which one is the average, see `mmjax.average`
_FILE = ("meta", "metadata")


def document(step: int, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is written as the meta data of a step."""
    return seal({"format": FORMAT, "step": step, migrations.KEY: migrations.VERSION, **meta})


def read(folder: epath.Path) -> dict[str, Any]:
    """Return the metadata of the checkpoint in `folder`, whose name is its step, with its config in today's form.

    Raises:
      Mismatch: it is not what was written for this step.
      UserError: it is of a newer format.
    """
    meta = read_sealed(folder)
    meta = {"identities": {}, "environment": {}, **meta}
    _check(meta, int(folder.name))
    return migrations.upgrade_meta(meta)


def read_sealed(folder: epath.Path) -> dict[str, Any]:
    """Return the document in `folder`, verified if it is of format 2; its content is not checked.

    Raises:
      As `read`.
    """
    meta = _load(folder.joinpath(*_FILE))
    number = meta.get("format") if isinstance(meta, dict) else None
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise Mismatch("its meta data have no format")
    if number > FORMAT:
        raise UserError(
            f"Checkpoint {folder} has format {number}; this mmjax reads up to {FORMAT}. Install a newer mmjax."
        )
    if number > 1 or SEAL in meta:
        meta = unseal(meta, "its meta data")
        if meta["step"] != int(folder.name):
            raise Mismatch(f"it was saved as step {meta['step']}")
    return dict(meta)


def _load(path: epath.Path) -> Any:
    return json.loads(path.read_bytes().decode())


def is_verified(meta: Mapping[str, Any]) -> bool:
    """Return whether the checkpoint has checksums, which are compared wherever it is read."""
    return bool(meta["format"] > 1)


def _check(meta: Mapping[str, Any], step: int) -> None:
    """Raise `Mismatch` where types differ from what a run takes for granted."""
    try:
        clock = Clock.from_json(meta["clock"])
    except (UserError, *DECODING) as error:
        raise Mismatch(f"its clock cannot be read ({words(error)})") from error
    hints = typing.get_type_hints(Clock)
    for field in dataclasses.fields(Clock):
        if field.name != "schedule" and not _conforms(
            getattr(clock, field.name), hints[field.name]
        ):
            raise Mismatch(f"its clock.{field.name} is not as a run writes it")
    if clock.step != step:
        raise Mismatch(f"its clock is at step {clock.step}")
    for name in ("identities", "environment", "config"):
        if not isinstance(meta.get(name), dict):
            raise Mismatch(f"its meta data have no {name}")
    if not _conforms(meta.get(migrations.KEY, 1), int):
        raise Mismatch(f"its {migrations.KEY} is no number")
    _check_config(meta["config"])
    coming = [s for s in clock.schedule.segments if s.start > step] + [clock.schedule.segment(step)]
    if not {task for s in coming for task, weight in s.weights.items() if weight} <= set(
        meta["config"]["tasks"]
    ):
        raise Mismatch("its schedule names tasks that its config does not have")


def _check_config(config: Mapping[str, Any]) -> None:
    """Check the blocks of a saved config that are read before it is compared with the schema."""
    tasks: Any = config.get("tasks")
    blocks = [
        config.get(name, {}) for name in ("optimizer", "schedule", "evaluation", "modalities")
    ]
    blocks += list(tasks.values()) if isinstance(tasks, dict) and tasks else [None]
    if all(isinstance(block, dict) for block in blocks):
        inner = [task.get(key) for task in tasks.values() for key in ("objective", "inputs")]
        phases = config.get("schedule", {}).get("phases", [])
        inner += phases if isinstance(phases, list) else [None]
        numbers = (config.get("steps"), config.get("evaluation", {}).get("every", 0))
        if all(isinstance(b, dict) for b in inner) and all(_conforms(n, int) for n in numbers):
            return
    raise Mismatch("its config is not as a run writes it")


def _conforms(value: Any, hint: Any) -> bool:
    """Return whether a value has an annotated type. Counts are not negative, and truth values are no numbers."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        pairs = value.items() if isinstance(value, Mapping) else [(None, None)]
        return all(_conforms(k, arguments[0]) and _conforms(v, arguments[1]) for k, v in pairs)
    if origin is tuple:
        return isinstance(value, tuple) and all(_conforms(item, arguments[0]) for item in value)
    if hint is Any or not isinstance(hint, type):
        return True
    if hint in (int, float):
        kinds = (int,) if hint is int else (int, float)
        return (
            isinstance(value, kinds)
            and not isinstance(value, bool)
            and (hint is float or value >= 0)
        )
    if dataclasses.is_dataclass(hint) and isinstance(value, hint):
        hints = typing.get_type_hints(hint)
        return all(
            _conforms(getattr(value, f.name), hints[f.name]) for f in dataclasses.fields(hint)
        )
    return isinstance(value, hint)
