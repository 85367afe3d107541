"""Installed packages that embedded data sets read: their files, versions and licences.

Nothing here imports a package: files are found beside its modules.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmjax.core.errors import UserError

WRITING = {"array_record": "array_record", "tensorflow_datasets": "tensorflow-datasets"}
"""Module to package, of what every data set is written with."""


@dataclass(frozen=True)
class PackageSource:
    """A package that parts of the records come from, and what it asks of those who use them.

    Attributes:
      package: its name on the package index.
      module: the module beside which its files lie.
      gives: what is taken from it.
      licence: of what is taken, as the package or its makers state it.
      attribution: the makers, and what was changed.
      extra: mmjax's extra that installs it.
    """

    package: str
    module: str
    gives: str
    licence: str
    attribution: str
    extra: str = "data"

    def folder(self) -> Path:
        """Return the package's folder."""
        return folder(self.module, self.package, self.extra)

    def path(self, *parts: str) -> Path:
        """Return a file or folder inside the package; `UserError` when its layout has none."""
        path = self.folder().joinpath(*parts)
        if not path.exists():
            raise UserError(
                f"The installed {self.package} has no {'/'.join(parts)}: its version lays out its"
                " files otherwise. Install the one that mmjax names:"
                f" pip install 'mmjax[{self.extra}]'"
            )
        return path


def folder(module: str, package: str, extra: str = "data") -> Path:
    """Return the folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"Building this data set needs the package {package}, which is not installed:"
            f" pip install 'mmjax[{extra}]'"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def check(sources: Iterable[PackageSource], tools: dict[str, str]) -> None:
    """Raise `UserError` for the first package that is missing; `tools` maps module to package."""
    for source in sources:
        source.folder()
    for module, package in tools.items():
        folder(module, package)


def facts(sources: Iterable[PackageSource], tools: dict[str, str]) -> dict[str, Any]:
    """Return the facts on packages for the manifest: sources with versions and licences, and versions of the tools."""
    return {
        "sources": [_source_facts(source) for source in sources],
        "built_with": {package: version(package) for package in sorted(tools.values())},
    }


def licences(sources: Iterable[PackageSource]) -> str:
    """Return one line of what comes under which licence."""
    return "; ".join(f"{source.gives}: {source.licence}" for source in sources)


def version(package: str) -> str:
    """Return the installed version."""
    return importlib.metadata.version(package)


def _source_facts(source: PackageSource) -> dict[str, str]:
    return {
        "package": source.package,
        "version": version(source.package),
        "gives": source.gives,
        "licence": source.licence,
        "attribution": source.attribution,
    }
