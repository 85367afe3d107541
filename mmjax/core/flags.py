"""Command lines: `--config=FILE --workdir=DIR --config.KEY=VALUE`, the same for every main."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from mmjax.core import config as configs
from mmjax.core.config import Block
from mmjax.core.errors import UserError


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with `--extra`, for a main that is no command of `mmjax`."""
    return _with_extra(argparse.ArgumentParser(description=description, allow_abbrev=False))


def command(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of `mmjax NAME`, with `--extra`; `doc` is the module's docstring, which the help shows."""
    return _with_extra(plain_command(name, doc))


def plain_command(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of a command that reads no config, and so takes no `--extra`."""
    return argparse.ArgumentParser(
        prog=f"mmjax {name}", description=doc, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def _with_extra(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument(
        "--extra", action="append", default=[], metavar="DIR",
        help="folder with your own modules: DIR/modalities/NAME.py, DIR/objectives/NAME.py, ...",
    )  # fmt: skip
    return parser


def add_config(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add `--config`, which takes what `mmjax.core.config.read_file` takes."""
    parser.add_argument(
        "--config", required=required, metavar="CONFIG",
        help="a config by name (quickstart), or a Python file with get_config(); CONFIG:SETTING chooses a setting",
    )  # fmt: skip


def add_workdir(parser: argparse.ArgumentParser) -> None:
    """Add `--workdir`, which must be given."""
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run's folder")


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """Return the arguments, and the `KEY=VALUE` of each `--config.KEY=VALUE`."""
    _skip_absent_tpu()
    # Libraries log much that a user cannot act on, whole tracebacks of an error that is raised
    # as well among it; what matters reaches them as that error.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    words = sys.argv[1:] if argv is None else argv
    # Taken out first: one with a space in its value would pass for a positional argument.
    overrides = [a.removeprefix("--config.") for a in words if a.startswith("--config.")]
    arguments, unknown = parser.parse_known_args(
        [a for a in words if not a.startswith("--config.")]
    )
    if unknown:
        raise UserError(f"Unknown argument {unknown[0]}. {usage(parser)}")
    for folder in arguments.extra:
        configs.add_folder(folder)
    return arguments, overrides


def _skip_absent_tpu() -> None:
    """Keep JAX from trying a TPU on a machine without one, where libtpu prints errors.

    A TPU may be there if JAX finds a chip, if there is a device file of one, or if the environment names one:
    then it is tried, and its errors are printed.
    """
    variables = ("JAX_PLATFORMS", "JAX_FORCE_TPU_INIT", "TPU_NAME", "TPU_ACCELERATOR_TYPE",
            "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "TPU_TOPOLOGY", "CLOUD_TPU_TASK_ID")  # fmt: skip
    files = [*Path("/dev").glob("accel*"), *Path("/dev").glob("vfio/[0-9]*")]
    if "jax" not in sys.modules or any(map(os.environ.get, variables)) or files:
        return
    from jax._src import hardware_utils, xla_bridge  # a light main has no JAX

    if not hardware_utils.num_available_tpu_chips_and_device_id()[0]:
        getattr(xla_bridge, "_backend_factories", {}).pop("tpu", None)


def usage(parser: argparse.ArgumentParser) -> str:
    """Return the usage on one line."""
    return f"{' '.join(parser.format_usage().split())} [--config.KEY=VALUE ...]"


def read_config(path: str, overrides: Sequence[str]) -> Block:
    return configs.override(configs.read_file(path), overrides)


def folder(path: str) -> epath.Path:
    """Return `path` as an absolute one, since Orbax takes no other; `~` and URIs (`gs://`) are understood."""
    if "://" in path:
        return epath.Path(path)
    return epath.Path(os.path.abspath(os.path.expanduser(path)))


def run_folder(path: str) -> epath.Path:
    """Return the folder of a run that is read, see `folder`; an error if it is a file."""
    workdir = folder(path)
    if "://" not in path and workdir.is_file():
        raise UserError(f"'{path}' is a file. Give a folder.")
    return workdir


def make_workdir(path: str) -> epath.Path:
    """Return the workdir, made if it is not there; an error if it is a file, or lies where no folder can be."""
    if not path:
        raise UserError("--workdir is empty. Give a folder.")
    workdir = folder(path)
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={path} is a file. Give a folder.")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, NotADirectoryError, FileExistsError) as error:
        raise UserError(
            f"--workdir={path} cannot be made: {error.strerror}. Give another folder."
        ) from error
    return workdir
