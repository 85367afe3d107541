"""Data, files and code of a run are compared with those of its checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import toyrun
from harness import contents
from resumed import COUNT

from mmjax.core import config
from mmjax.core.errors import UserError
from mmjax.training import identity

OBJECTIVE = toyrun.EXTRA / "objectives" / "toy.py"


def test_other_data_under_the_same_config_is_refused(tmp_path: Path) -> None:
    toyrun.block()  # adds the folder that holds the source
    from mmjax.sources.toy import values

    file = tmp_path / "values.npy"
    np.save(file, values(COUNT))
    mine = (f"tasks.two.source.file={file}", "steps=4")
    toyrun.run(tmp_path / "run", *mine)
    changed = values(COUNT)
    changed[3, 0, 0] += 1
    np.save(file, changed)
    before = contents(tmp_path / "run")
    with pytest.raises(UserError) as error:
        toyrun.run(tmp_path / "run", *mine, "steps=8", allow_change=True)
    assert "data" in str(error.value) and "tasks.two.source" in str(error.value)
    assert "tasks.one" not in str(error.value)
    assert contents(tmp_path / "run") == before


def test_a_modality_that_no_task_reads_needs_no_files(tmp_path: Path) -> None:
    """Such as texts without a tokenizer, where the tasks on texts were taken out of a config."""
    toyrun.run(tmp_path / "run", "steps=1", "modalities.text={'name': 'text', 'vocabulary': 8}")
    identities = toyrun.meta(tmp_path / "run")["identities"]
    assert "tasks.one.source" in identities
    assert not [name for name in identities if name.startswith("modalities.")]
    assert not (tmp_path / "run" / "assets").exists()


def test_changed_code_is_refused_and_with_leave_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For example, a loss weight in an extension file."""
    workdir, changed = tmp_path / "run", tmp_path / "toy.py"
    toyrun.run(workdir, "steps=2")
    changed.write_text(OBJECTIVE.read_text().replace("jnp.square(", "2.0 * jnp.square("))
    assert changed.read_bytes() != OBJECTIVE.read_bytes()
    real = config._extension

    def extension(kind: str, name: str) -> Path | None:
        return changed if (kind, name) == ("objectives", "toy") else real(kind, name)

    monkeypatch.setattr(config, "_extension", extension)
    before = toyrun.bits(workdir)
    refused = r"changed since it was saved: code.objectives/toy. .*--allow_change"
    with pytest.raises(UserError, match=refused):
        toyrun.run(workdir, "steps=4")
    assert toyrun.bits(workdir) == before
    capsys.readouterr()
    toyrun.run(workdir, "steps=4", allow_change=True)
    assert "changed since it was saved: code.objectives/toy." in capsys.readouterr().out
    assert toyrun.meta(workdir)["identities"]["code.objectives/toy"] == identity.digest(
        changed.read_bytes()
    )
    toyrun.run(workdir, "steps=6")  # it is the run's code from here on
