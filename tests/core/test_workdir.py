"""Names of a run's files, which runs of older versions have too."""

from __future__ import annotations

import zipfile
from pathlib import Path

from mmjax.core import workdir

RUN = Path(__file__).parents[1] / "golden" / "c995adf" / "toy.zip"


def test_an_older_run_has_its_files_under_these_names() -> None:
    with zipfile.ZipFile(RUN) as archive:
        names = {name.removeprefix("run/") for name in archive.namelist()}
    assert {workdir.METRICS, workdir.GOODPUT} <= names


def test_no_two_files_share_a_name() -> None:
    names = [value for name, value in vars(workdir).items() if name.isupper()]
    assert len(names) == 9 and len(set(names)) == len(names)
    assert all("/" not in name and name.endswith((".json", ".jsonl", ".html")) for name in names)
