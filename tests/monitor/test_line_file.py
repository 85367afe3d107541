"""The growing file: on a disk and in a store that cannot append."""

from pathlib import Path

import pytest
from bucket import Store, bucket
from etils import epath

from mmjax.core.files import is_local, read_bytes, replace_file
from mmjax.monitor.goodput import ActivityLog, summary
from mmjax.monitor.line_file import LineFile
from mmjax.monitor.metrics import MetricWriter, read


@pytest.fixture
def remote() -> epath.Path:
    return bucket() / "run"


def test_knows_local_from_remote(tmp_path: Path, remote: epath.Path) -> None:
    assert is_local(epath.Path(tmp_path))
    assert not is_local(remote)


def test_lines_are_with_the_system_after_push(tmp_path: Path) -> None:
    path = epath.Path(tmp_path) / "deep" / "lines"
    lines = LineFile(path)
    lines.append("one\ntwo\n")
    lines.push()
    assert path.read_text() == "one\ntwo\n"
    lines.close()
    lines.close()


def test_a_torn_line_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = epath.Path(tmp_path) / "lines"
    path.write_text("whole\nto")
    lines = LineFile(path)
    lines.append("next\n")
    lines.close()
    assert path.read_text() == "whole\nto\nnext\n"


@pytest.mark.parametrize("call", ["push", "sync"])
def test_a_full_disk_names_the_file(call: str) -> None:
    lines = LineFile(epath.Path("/dev/full"))
    lines.append("x\n")
    with pytest.raises(OSError, match="/dev/full"):
        getattr(lines, call)()
    with pytest.raises(OSError, match="/dev/full"):
        lines.close()
    lines.close()


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = epath.Path(tmp_path / "results.json")
    replace_file(path, "one")
    replace_file(path, b"two")
    assert path.read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["results.json"]

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*results\.json"):
        replace_file(path, "three")
    assert path.read_text() == "two"


def test_a_file_is_replaced_in_a_store(remote: epath.Path) -> None:
    for text in ("one", "two"):
        replace_file(remote / "results.json", text)
    assert (remote / "results.json").read_text() == "two"


def test_only_a_missing_file_is_empty(tmp_path: Path, remote: epath.Path) -> None:
    assert read_bytes(epath.Path(tmp_path) / "none") == b"" == read_bytes(remote / "none")
    with pytest.raises(IsADirectoryError):
        read_bytes(epath.Path(tmp_path))


def test_a_store_that_does_not_answer_loses_no_lines(
    remote: epath.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be read is not taken for an empty file, which would be written over."""
    (remote / "lines").write_text("one\n")

    def fail(*_: object, **__: object) -> bool:
        raise TimeoutError("no answer")

    with monkeypatch.context() as patched, pytest.raises(TimeoutError):
        patched.setattr(Store, "_open", fail)
        LineFile(remote / "lines")
    assert (remote / "lines").read_text() == "one\n"


def test_remote_keeps_what_is_there_and_syncs(remote: epath.Path) -> None:
    path = remote / "lines"
    for text in ("one\n", "two\n"):
        lines = LineFile(path)
        lines.append(text)
        lines.sync()
    assert path.read_text() == "one\ntwo\n"


def test_remote_pushes_are_few(remote: epath.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    lines = LineFile(remote / "lines")
    before = Store.puts
    for _ in range(50):
        lines.append("x\n")
        lines.push()
    assert Store.puts - before == 1
    now = 102.5
    lines.push()
    assert Store.puts - before == 2
    assert (remote / "lines").read_text() == "x\n" * 50


def test_metrics_and_phases_in_a_store(
    remote: epath.Path, caplog: pytest.LogCaptureFixture
) -> None:
    for resume in (0, 3):
        with (
            ActivityLog(remote) as log,
            MetricWriter(remote, resume) as writer,
            log.activity("step"),
        ):
            for step in range(resume, resume + 5):
                writer.write(step, "a", {"loss": step / 3}, {"seconds": 0.1})
    assert [record["step"] for record in read(remote)] == list(range(8))
    assert [record["loss"] for record in read(remote)] == [step / 3 for step in range(8)]
    assert summary(remote)["attempts"] == 2
    assert not (remote / "tensorboard").exists()
    assert sum("TensorBoard" in record.message for record in caplog.records) == 2


def test_steps_upload_nothing(remote: epath.Path) -> None:
    with MetricWriter(remote, 0) as writer:
        before = Store.puts
        for step in range(50):
            writer.write(step, "a", {"loss": 1.0}, {})
        assert Store.puts == before
        writer.flush()
        assert Store.puts == before + 1
        assert len(read(remote)) == 50
