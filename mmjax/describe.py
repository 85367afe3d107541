"""Describe the keys of a config: type, default, bounds, class of change and meaning.

    mmjax describe optimizer
    mmjax describe tasks.T.objective
    mmjax describe tasks.T.objective contrastive
    mmjax describe 'model.layers[0].blocks[0].experts' transformer
    mmjax describe tasks.image_text.objective --config=quickstart

Without KEY it describes the top of a config. Names of tasks, modalities and phases in KEY may be any. Where a block's
`name` decides what its keys are, give NAME, or a config that has the block; else the names to choose from are listed.

A key is `free` (change it at any time), `schedule` (a change needs `--allow_change` and starts a new segment of the
schedule) or `structural` (a run that exists refuses a change).
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Sequence

from mmjax.core import errors, flags
from mmjax.core.describe import REQUIRED, Key, Target, find


def lines(target: Target, width: int = 100) -> Iterator[str]:
    """Yield what the command prints about a place in a config."""
    yield f"{target.path or 'config'}{f' ({target.module})' if target.module else ''}"
    if target.is_value:
        yield from _key(target.keys[0], width)
        return
    yield from textwrap.wrap(target.summary, width)
    for key in target.keys:
        yield ""
        yield from _key(key, width)
    for name, summary in target.names.items():
        yield ""
        yield f"  {name}"
        yield from textwrap.wrap(
            summary, width, initial_indent="      ", subsequent_indent="      "
        )


def _key(key: Key, width: int) -> Iterator[str]:
    value = "required" if key.default == REQUIRED else f"default {key.default}"
    limits = f"{key.bounds}; " if key.bounds else ""
    yield f"  {key.name}: {key.type}, {value}; {limits}{key.change}"
    yield from textwrap.wrap(
        key.meaning, width, initial_indent="      ", subsequent_indent="      "
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the keys of the place in a config that the first argument names."""
    parser = flags.command("describe", __doc__)
    parser.add_argument(
        "key", nargs="?", default="", metavar="KEY", help="dotted key; none for all of a config"
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="components on the way to KEY, in order"
    )
    flags.add_config(parser)
    arguments, overrides = flags.parse(parser, argv)
    config = flags.read_config(arguments.config, overrides) if arguments.config else None
    from mmjax.run_config import RunConfig  # loads JAX, which the help does without

    target = find(arguments.key, RunConfig, arguments.names, config)
    print("\n".join(lines(target, min(shutil.get_terminal_size().columns, 100))))


if __name__ == "__main__":
    errors.run(main)
