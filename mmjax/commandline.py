"""Command lines: `--config=FILE --workdir=DIR --config.KEY=VALUE`, the same for every main."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from etils import epath

from mmjax import config as configs
from mmjax.config import Block
from mmjax.errors import UserError


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, allow_abbrev=False)
    made.add_argument(
        "--extra", action="append", default=[], metavar="DIR",
        help="folder with modules of one's own: DIR/modalities/NAME.py, DIR/objectives/NAME.py, ...",
    )  # fmt: skip
    return made


def parse(
    made: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and the `KEY=VALUE` of each `--config.KEY=VALUE`."""
    # Libraries report much that a person cannot act on; what matters reaches them as an error.
    logging.getLogger("absl").setLevel(logging.ERROR)
    arguments, rest = made.parse_known_args(argv)
    overrides = [a.removeprefix("--config.") for a in rest if a.startswith("--config.")]
    unknown = [a for a in rest if not a.startswith("--config.")]
    if unknown:
        raise UserError(
            f"Unknown argument {unknown[0]}. {made.format_usage().strip()} [--config.KEY=VALUE ...]"
        )
    for folder in arguments.extra:
        configs.add_folder(folder)
    return arguments, overrides


def read_config(path: str, overrides: Sequence[str]) -> Block:
    return configs.override(configs.read_file(path), overrides)


def make_workdir(path: str) -> epath.Path:
    """The workdir, made if it is not there; an error if it is a file."""
    workdir = epath.Path(path).expanduser()
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={path} is a file. Give a folder.")
    workdir.mkdir(parents=True, exist_ok=True)
    return workdir
