"""A package `tensorflow` that notes who asks for it, and is none."""

from __future__ import annotations

from pathlib import Path


def make(folder: Path) -> Path:
    """Write the package; return the folder to put on the path. Who asks for it is noted in `folder / "asked"`."""
    package = folder / "decoy" / "tensorflow"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import traceback\n"
        f"open({str(folder / 'asked')!r}, 'a').write(''.join(traceback.format_stack()[-12:]))\n"
        "raise ImportError('no TensorFlow')\n"
    )
    return package.parent
