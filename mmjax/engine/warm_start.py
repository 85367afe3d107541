"""Parameters to begin with: from a run of mmjax or a file of arrays, by name; no code in it is run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mmjax.core.config import FREE
from mmjax.core.errors import UserError
from mmjax.core.files import read_bytes, replace_file
from mmjax.core.low_rank import FACTORS
from mmjax.core.parameters import STAT, Spec
from mmjax.core.teachers import TEACHER
from mmjax.core.workdir import PINNED
from mmjax.engine import checkpoint, processes
from mmjax.engine.grafts import TransformConfig, by_name, transformed
from mmjax.engine.state import EMA
from mmjax.engine.tensor_files import Entry, open_tensors, printable
from mmjax.optim.rules import matches
from mmjax.optim.transforms import as_matrix, layer_shape

Values = dict[str, np.ndarray]
EXPERTS = "/mlps/"  # in the names of a block's experts, where its MLP's have nothing
_LISTED = 12  # lines of an error


@dataclass(frozen=True)
class NameConfig:
    r"""Names of parameters in the source.

    Attributes:
      match: a regular expression of whole names here, canonical ones: `trunk/layers/(\d+)/mlp/(.*)`.
      name: their name there; `\1` and so on are the groups of `match`.
      transpose: there a matrix has its outputs first, as in PyTorch.
    """

    match: str
    name: str
    transpose: bool = False


@dataclass(frozen=True)
class WarmStartConfig:
    """The source of a new run's parameters; a resumed run does not read it.

    Attributes:
      path: a workdir of mmjax (its newest checkpoint when the run first begins), or a .npz or .safetensors
        file; empty for none.
      only: patterns of names here that are this source's part; all of them if empty.
      names: the first that matches gives a parameter's name there; else the name is the same.
      transforms: what is done with the arrays, in order, after `names` has transposed them.
      skip: patterns of names here that are still initialised randomly.
      ignore: patterns of names there that no parameter here needs to have.
      average: take the moving averages of a workdir that has them.
      strict: every parameter of the part that `skip` does not name must be there, in a shape that fits, and every
        array there that `ignore` does not name must be one of a parameter here; else what is missing, and a head of
        another shape, is initialised randomly, and other arrays stay unused.
      non_finite: take values that are NaN or infinite too.
    """

    path: str = ""
    only: tuple[str, ...] = ()
    names: tuple[NameConfig, ...] = ()
    transforms: tuple[TransformConfig, ...] = ()
    skip: tuple[str, ...] = ()
    ignore: tuple[str, ...] = field(default=(), metadata=FREE)
    average: bool = False
    strict: bool = field(default=True, metadata=FREE)
    non_finite: bool = field(default=False, metadata=FREE)


Sources = WarmStartConfig | tuple[WarmStartConfig, ...]


def sources_of(config: Sources) -> tuple[WarmStartConfig, ...]:
    """Return the sources that `init_from` names: one, several, or none.

    Raises:
      UserError: one of several has no path.
    """
    if isinstance(config, WarmStartConfig):
        return (config,) if config.path else ()
    for index, source in enumerate(config):
        if not source.path:
            raise UserError(f"init_from[{index}].path is missing; each source of a list has one.")
    return config


@dataclass
class WarmStart:
    """A warm start's `values` by canonical name, and lists to report."""

    values: Values = field(default_factory=dict)
    adapted: list[str] = field(default_factory=list)
    random: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def pin(
    config: WarmStartConfig,
    workdir: epath.Path,
    log: Callable[[str], None],
    allow_change: bool,
    file: str = PINNED,
) -> int | None:
    """Return the step of `pin_all` for one source; None if `path` is empty."""
    return pin_all((config,), workdir, log, allow_change, file)[0] if config.path else None


def pin_all(
    sources: Sequence[WarmStartConfig],
    workdir: epath.Path,
    log: Callable[[str], None],
    allow_change: bool,
    file: str = PINNED,
) -> list[int | None]:
    """Return the step of the run that each `path` names, settled when this run first begins; None of a file.

    It is kept in `WORKDIR/init_from.json`, or another `file`, with the digest of a file. A run that is restarted before
    its first checkpoint uses the same source step, even if the source run has advanced.

    Raises:
      UserError: what is there now is not what it was, and `allow_change` is False; otherwise it is logged.
    """
    if not sources:
        return []
    records: list[dict[str, Any]] = []
    if processes.is_first():
        known = _by_path(pinned(workdir, file))
        for source in sources:
            same = known.get(source.path, {})
            now = _source(source.path, same.get("step"))
            if same and now != same:
                words = (
                    f"init_from has changed since this run first began: it was {same}, it is {now}."
                )
                if not allow_change:
                    raise UserError(
                        f"{words} Restore it, add --allow_change to begin with the present one, or use another "
                        "--workdir."
                    )
                log(words)
            records.append(now)
        whole = records[0] if len(records) == 1 else {"sources": records}
        replace_file(workdir / file, json.dumps(whole))
    return [record.get("step") for record in processes.gather(records)[0]]


def _by_path(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the record of each source that `pin_all` has written, by its path."""
    return {one.get("path", ""): one for one in record.get("sources", [dict(record)])}


def pinned_steps(sources: Sequence[WarmStartConfig], workdir: epath.Path) -> list[int | None]:
    """Return the step of each source that `pin_all` has recorded."""
    known = _by_path(pinned(workdir))
    return [known.get(source.path, {}).get("step") for source in sources]


def pinned(workdir: epath.Path, file: str = PINNED) -> dict[str, Any]:
    """Return what `pin_all` has written; empty if it has not been called."""
    path = workdir / file
    try:
        result = json.loads(read_bytes(path) or b"{}")
    except (ValueError, RecursionError):
        result = None
    if not isinstance(result, dict):
        raise UserError(
            f"'{path}' is damaged. It records the source of the run's first parameters: delete it to use "
            "the present one."
        )
    return result


def _source(name: str, step: int | None) -> dict[str, Any]:
    """Return the parameters of the source: of a run's checkpoints that of `step`, or else the newest."""
    path = epath.Path(name).expanduser()
    if path.is_dir():
        steps = checkpoint.steps(path)
        return {"path": name, "step": step if step in steps else next(iter(steps), None)}
    if not path.exists():
        return {"path": name, "sha256": None}
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**24):
            digest.update(part)
    return {"path": name, "sha256": digest.hexdigest()}


def warm_starts(
    sources: Sequence[WarmStartConfig],
    specs: Mapping[str, Spec],
    log: Callable[[str], None],
    steps: Sequence[int | None],
    seed: int = 0,
    optional: Mapping[str, Spec] = MappingProxyType({}),
) -> list[Values]:
    """Return the parameters that each source gives, see `warm_start`; each has its own part.

    Raises:
      UserError: two sources claim one parameter.
    """
    target = [name for spec in specs.values() for name in spec.canonical]
    claims = dict[str, str]()
    for source in sources:
        part = _part(source, target)
        for name in (name for name in target if name in part):
            if name in claims:
                raise UserError(
                    f"init_from: '{claims[name]}' and '{source.path}' both claim '{name}'. Name the part of each in "
                    "only, or exclude what it must not take by skip."
                )
            claims[name] = source.path
    parts = [
        warm_start(source, specs, log, step, seed, optional)
        for source, step in zip(sources, steps, strict=True)
    ]
    if len(sources) > 1 and len(claims) < len(target):
        free = [name for name in target if name not in claims]
        log(f"No source has a part in ({len(free)}): {', '.join(grouped(free))}")
    return parts


def warm_start(
    config: WarmStartConfig,
    specs: Mapping[str, Spec],
    log: Callable[[str], None],
    step: int | None = None,
    seed: int = 0,
    optional: Mapping[str, Spec] = MappingProxyType({}),
) -> Values:
    """Return parameters and buffers to begin with, by canonical name, each in its shape here; log what matched.

    A table of positions with other buckets is resampled. A dense layer's MLP initialises every expert that takes its
    place (sparse upcycling, Komatsuzaki et al. 2023); its router is in no dense run, so `skip` must name it. Low-rank
    factors that the source lacks are initialised. If the source is a run, its checkpoint of `step` is read, or the
    newest if None. What is `optional` is taken where it is there, as teachers are.

    Args:
      seed: of the run, for the initial values of new rows.

    Raises:
      UserError: a parameter that the source lacks, or has in a shape that does not fit; an array there without a
        parameter here; a pattern without a match; values that are not finite.
    """
    if not config.path:
        return {}
    target = {name: spec for spec in specs.values() for name in spec.canonical}
    source = open_source(config, step)
    copies = {name: spec for spec in optional.values() for name in spec.canonical}
    target |= {name: spec for name, spec in copies.items() if name in source.entries}
    taken = _take(config, target, source, seed)
    where = config.path if step is None else f"step {step} of {config.path}"
    size = len(_only(config, target)) if config.only else len(target)
    log(f"Initialised {len(taken.values)} of {size} parameters from {where}.")
    for words, names in (
        ("  adapted", taken.adapted),
        ("  initialised randomly", taken.random),
        ("  unused", taken.unused),
    ):
        if names:
            log(f"{words} ({len(names)}): {', '.join(grouped(names))}")
    return taken.values


def check_files(
    config: WarmStartConfig,
    step: int | None,
    specs: Mapping[str, Spec],
    values: Values,
    identities: Mapping[str, str],
) -> None:
    """Compare the files of modalities, such as tokenizers, with those of the run that embeddings are taken from.

    Args:
      step: of that run; None for values of a file, which has no step.
      values: those that `warm_start` returned.
      identities: digests of the files here, by `modalities.NAME/FILE`.

    Raises:
      UserError: a table with a row for each piece is taken, and its pieces are others here.
    """
    if step is None:
        return
    saved = checkpoint.read_meta(epath.Path(config.path).expanduser(), step).get("identities", {})
    for modality in sorted({key.partition("/")[0] for key in identities}):
        one, other = (
            {digest for key, digest in files.items() if key.startswith(f"{modality}/")}
            for files in (identities, saved)
        )
        stem = f"stems/{modality.removeprefix('modalities.')}/"
        tables = [
            name
            for spec in specs.values()
            for name in spec.canonical
            if "vocabulary" in spec.axes and name.startswith(stem) and name in values
        ]
        if one and other and one != other and tables:
            raise UserError(
                f"init_from: the run in '{config.path}' read {modality} by another tokenizer (SHA-256 "
                f"{min(other)[:12]}..., here {min(one)[:12]}...), so that rows of {tables[0]} are of other pieces. "
                f"Take its tokenizer, in {config.path}/assets, or init_from.skip=['{tables[0]}']."
            )


def grouped(names: Iterable[str]) -> list[str]:
    """Return names in order, those that differ in a layer's index only as one: `trunk/layers/*/norm (12)`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        head, blank, tail = name.partition(" ")
        pattern = re.sub(r"(?<![^/.])\d+(?![^/.])", "*", head)
        groups.setdefault(pattern + blank + tail, []).append(name)
    return [
        printable(members[0] if len(members) == 1 else f"{pattern} ({len(members)})")
        for pattern, members in groups.items()
    ]


@dataclass(frozen=True)
class _Way:
    """The name of a parameter's array in the source, and the function that adapts it."""

    source: str
    adapt: Callable[[np.ndarray], np.ndarray]


def _take(
    config: WarmStartConfig, target: Mapping[str, Spec], source: Source, seed: int
) -> WarmStart:
    taken, ways = WarmStart(), dict[str, _Way]()
    missing, wrong, known = list[str](), list[str](), set[str]()
    part, whole = _only(config, target), _part(config, target)
    transforms = by_name(config.transforms, target)
    for name, spec in target.items():
        origin, transpose = _origin(name, config.names, source.entries)
        known.add(origin)
        if name not in part:
            continue
        if name not in whole:
            taken.random.append(name)
        elif origin not in source.entries:
            is_needed = config.strict and not name.endswith(FACTORS)
            (missing if is_needed else taken.random).append(name)
        else:
            source_shape, shape = source.entries[origin].shape, layer_shape(spec)[0]
            size = source_shape[::-1] if transpose else source_shape
            adapt = _adapter(size, spec, shape)
            if name in transforms:
                adapt = transformed(transforms[name], name, spec, seed, _adapter, taken.adapted)
            elif adapt is not None and size != shape:
                taken.adapted.append(f"{name} {list(size)} -> {list(shape)}")
            if adapt is not None:
                ways[name] = _Way(origin, _transposed(adapt) if transpose else adapt)
            elif name.startswith("heads/") and not config.strict:
                taken.random.append(f"{name} (there {list(size)})")
            else:
                wrong.append(f"{name}: expected {list(shape)}, found {list(size)} ({origin})")
    origins = dict.fromkeys(way.source for way in ways.values())
    taken.unused = sorted(source.entries.keys() - origins.keys())
    surplus = _surplus(config, source.entries, known)
    _check(config, len(part), taken.unused, missing, wrong, surplus, is_empty=not ways)
    values = source.read(origins)
    _check_values(config, values)
    taken.values = {name: way.adapt(values[way.source]) for name, way in ways.items()}
    return taken


def _surplus(config: WarmStartConfig, entries: Iterable[str], known: set[str]) -> list[str]:
    """Return the arrays there, without teachers, that no parameter here has and `ignore` does not match, if strict."""
    entries = [name for name in entries if not name.startswith(TEACHER)]
    patterns = [
        matches(pattern, entries, f"init_from.ignore[{index}]")
        for index, pattern in enumerate(config.ignore)
    ]
    ignored = frozenset[str]().union(*patterns)
    return sorted(set(entries) - known - ignored) if config.strict else []


def _only(config: WarmStartConfig, target: Iterable[str]) -> frozenset[str]:
    """Return the parameters of a source's part, `skip` or not."""
    names = list(target)
    patterns = (matches(p, names, f"init_from.only[{i}]") for i, p in enumerate(config.only))
    return frozenset[str]().union(*patterns) if config.only else frozenset(names)


def _part(config: WarmStartConfig, target: Iterable[str]) -> frozenset[str]:
    """Return the parameters that a source claims."""
    names = list(target)
    return _only(config, names) - _skipped(config, names)


def _skipped(config: WarmStartConfig, target: Iterable[str]) -> frozenset[str]:
    """Return the parameters that `skip` matches; every pattern must match one, those of `names` too."""
    target = list(target)
    for index, rule in enumerate(config.names):
        matches(rule.match, target, f"init_from.names[{index}].match")
    patterns = (matches(p, target, f"init_from.skip[{i}]") for i, p in enumerate(config.skip))
    return frozenset[str]().union(*patterns)


def _transposed(adapt: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda value: adapt(value.T)


def _check(
    config: WarmStartConfig,
    count: int,
    unused: list[str],
    missing: list[str],
    wrong: list[str],
    surplus: list[str],
    is_empty: bool,
) -> None:
    """Refuse a source that has nothing of this model, or not all that it must have."""
    if is_empty and not wrong:
        raise UserError(
            f"init_from: none of the {count} parameters is in '{config.path}', which holds "
            f"{_some(grouped(unused)) or 'nothing'}. Give their names there in init_from.names."
        )
    lines = wrong[:_LISTED]
    if len(wrong) > _LISTED:
        lines.append(f"and {len(wrong) - _LISTED} more")
    if missing:
        lines.append(f"{len(missing)} of the {count} parameters are not there:")
        lines += [f"  {group}{_nearest(group, unused)}" for group in grouped(missing)]
    if surplus:
        lines.append(f"{len(surplus)} of the arrays there have no parameter here:")
        lines += [f"  {group}" for group in grouped(surplus)]
    if surplus and not missing and not wrong:
        lines = [*lines[: _LISTED + 1], *["  and more"] * (len(lines) > _LISTED + 1)]
        raise UserError(
            f"init_from '{config.path}' holds more than this config has:\n  "
            + "\n  ".join(lines)
            + "\nGive their names here in init_from.names, or list them in init_from.ignore if they are not to be "
            "used ('.*' matches all)."
        )
    if lines:
        raise UserError(
            f"init_from '{config.path}' does not fit this config:\n  "
            + "\n  ".join(lines)
            + "\nGive their names there in init_from.names, list them in init_from.skip to initialise them "
            "randomly, or change model and modalities. (mmjax show DIR --names lists the parameters of a run.)"
        )


def _some(names: list[str]) -> str:
    others = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + others


def _nearest(group: str, unused: Iterable[str]) -> str:
    close = get_close_matches(group, grouped(unused), n=1, cutoff=0.4)
    return f" (the nearest there: {close[0]})" if close else ""


def _check_values(config: WarmStartConfig, values: Values) -> None:
    for name, value in values.items():
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise UserError(
                f"init_from '{config.path}': '{printable(name)}' is {value.dtype}; a parameter is a floating-point "
                "array. Store it as one, or name its parameters in init_from.skip."
            )
        with np.errstate(over="ignore"):  # what is out of float32's range is infinite in it
            bad = int((~np.isfinite(value.astype(np.float32))).sum())
        if bad and not config.non_finite:
            raise UserError(
                f"init_from '{config.path}': '{printable(name)}' has {bad} of {value.size} values that are not "
                "finite in float32. Repair the file, name its parameters in init_from.skip, or set "
                "init_from.non_finite = True to use them anyway."
            )


def _origin(
    name: str, names: tuple[NameConfig, ...], entries: Mapping[str, Entry]
) -> tuple[str, bool]:
    """Return a parameter's name in the source, and whether it is transposed there."""
    origin, transpose = name, False
    for rule in names:
        match = re.fullmatch(rule.match, name)
        if match:
            origin, transpose = _expanded(match, rule), rule.transpose
            break
    if origin not in entries and EXPERTS in origin:
        origin = origin.replace(EXPERTS, "/", 1)
    return origin, transpose


def _expanded(match: re.Match[str], rule: NameConfig) -> str:
    try:
        return match.expand(rule.name)
    except (re.error, IndexError) as error:
        raise UserError(
            f"init_from.names: '{rule.name}' is no name for what '{rule.match}' matches: {error}."
        ) from error


def _adapter(
    size: tuple[int, ...], spec: Spec, shape: tuple[int, ...]
) -> Callable[[np.ndarray], np.ndarray] | None:
    """Return a function that makes an array of `size` one of `shape`; None if there is no way."""
    if size == shape:
        return lambda value: value
    if size == as_matrix(spec)[0]:
        return lambda value: value.reshape(shape)
    axes = spec.axes[1:] if spec.stack else spec.axes
    if axes[:1] == ("experts",) and size == shape[1:]:
        return lambda value: np.broadcast_to(value, shape)
    is_table = axes[:1] == ("positions",) and len(size) == len(shape)
    if is_table and size[0] and size[1:] == shape[1:]:
        return lambda value: resample(value, shape[0])
    return None


def resample(table: np.ndarray, buckets: int) -> np.ndarray:
    """Return a table of positions `[n, D]` with another number of buckets, linear between the old ones.

    A coordinate c in [0, 1) reads bucket `int(c n)`. So bucket j of the new ones stands at j / buckets,
    and what stood there in the old table stays exactly.
    """
    at = np.arange(buckets) * len(table) / buckets
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, len(table) - 1)
    part = (at - low)[:, None]
    wide = table.astype(np.promote_types(table.dtype, np.float32))
    return ((1 - part) * wide[low] + part * wide[high]).astype(table.dtype)


# --- reading -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A run's checkpoint or a file, as a source of parameters.

    Attributes:
      entries: shape and dtype by name.
      read: names -> arrays; reads no others.
    """

    entries: Mapping[str, Entry]
    read: Callable[[Iterable[str]], Values]


def open_source(config: WarmStartConfig, step: int | None = None) -> Source:
    """List the arrays of a workdir's checkpoint (the newest if `step` is None), or of a file."""
    path = epath.Path(config.path).expanduser()
    if not path.exists():
        raise UserError(f"init_from.path: there is no '{config.path}'.")
    if path.is_dir():
        return _open_run(path, config.average, step)
    try:
        file = open_tensors(path)
    except UserError as error:
        raise UserError(f"init_from.path: {error}") from error
    return Source(file.entries, file.read)


def _open_run(path: epath.Path, average: bool, step: int | None) -> Source:
    steps = checkpoint.steps(path)
    if not steps:
        raise UserError(f"init_from.path: '{path}' holds no checkpoint.")
    chosen = steps[0] if step is None else step
    saved = checkpoint.read_shapes(path, chosen)
    # Name here -> part and name there: averaged parameters go with averaged buffers.
    places = {
        name.removeprefix(EMA): ("buffers", name)
        for name in saved.get("buffers", {})
        if name.startswith(EMA if average else STAT)
    }
    if not average:
        places |= {name: ("parameters", name) for name in saved["parameters"]}
    teachers = [name for name in saved.get("buffers", {}) if name.startswith(TEACHER)]
    places |= {name: ("buffers", name) for name in teachers if places}
    shapes = {name: saved[part][there] for name, (part, there) in places.items()}
    if not shapes:
        raise UserError(f"init_from.average: the run in '{path}' keeps no averages.")

    def read(names: Iterable[str]) -> Values:
        abstract: dict[str, dict[str, Any]] = {"parameters": {}, "buffers": {}}
        for name in (names := list(names)):
            part, there = places[name]
            leaf = jax.ShapeDtypeStruct(shapes[name].shape, shapes[name].dtype)
            abstract[part][there] = leaf
        values = checkpoint.read_state(path, chosen, abstract)
        return {name: np.asarray(values[places[name][0]][places[name][1]]) for name in names}

    return Source({n: Entry(s.shape, str(s.dtype), s.dtype) for n, s in shapes.items()}, read)
