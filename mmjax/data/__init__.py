"""Data sets, the order in which their examples are read, and the text tokenizer."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from etils import epath

DATA_DIR_VARIABLE = "MMJAX_DATA_DIR"
DEFAULT_DATA_DIR = "~/.cache/mmjax/data"


def data_dir() -> epath.Path:
    """Return the folder where data sets are built and looked for: `$MMJAX_DATA_DIR`, else `~/.cache/mmjax/data`."""
    from etils import epath  # here, so that importing a sibling module stays light

    return epath.Path(os.environ.get(DATA_DIR_VARIABLE) or DEFAULT_DATA_DIR).expanduser()
