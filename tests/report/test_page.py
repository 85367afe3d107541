"""The report: what it shows, that nothing of the data gets through as code, and how it looks in a browser."""

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from io import StringIO
from typing import Any

import numpy as np
import pytest
from etils import epath
from PIL import Image

from mmjax.core.errors import UserError
from mmjax.engine import checkpoint
from mmjax.monitor import metrics
from mmjax.monitor.goodput import ActivityLog
from mmjax.monitor.metrics import MetricWriter
from mmjax.monitor.tables import human_seconds, loss_text, percent, summary_tables
from mmjax.report.data import read_run
from mmjax.report.page import main, write_report

Parse = Callable[[str], Any]
EVIL = "<script>alert(1)</script>"
QUOTES = "\"'><img src=x onerror=alert(2)>&amp;\x00\x1b[2J\ud800"


@pytest.fixture(scope="module")
def run_copy(tiny_run: epath.Path, tmp_path_factory: pytest.TempPathFactory) -> epath.Path:
    """Return the finished tiny run, to be written into."""
    copy = tmp_path_factory.mktemp("report") / "tiny run"
    shutil.copytree(tiny_run, copy)
    return epath.Path(copy)


@pytest.fixture(scope="module")
def written(run_copy: epath.Path) -> epath.Path:
    return write_report(run_copy)


@pytest.fixture(scope="module")
def page(parse: Parse, written: epath.Path) -> Any:
    return parse(written.read_text())


# --- the report of a finished run ---------------------------------------------------------------


def test_one_file_that_fetches_nothing_and_runs_nothing(page: Any) -> None:
    page.assert_is_harmless()
    policy = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert len(policy) == 1 and policy[0].startswith("default-src 'none'")
    assert "script" not in policy[0] and "http" not in policy[0]


def test_title_tasks_and_every_result(page: Any, run_copy: epath.Path) -> None:
    assert ("title", "tiny run: a run of mmjax") in page.texts
    assert "14 of 14 steps over 2 tasks; finished." in page.text
    exact = {float(d["value"]) for d in page.all("data")}
    records = json.loads((run_copy / "results.json").read_text())
    assert len(records) == 8
    for record in records:
        assert record["task"] in page.text and record["name"] in page.text
        show = loss_text if record.get("unit") == "loss" else percent
        for key in ("value", "chance"):
            assert record[key] in exact
            assert show(record[key]) in page.text
    assert any("majority" in record and record["majority"] in exact for record in records)


@pytest.mark.parametrize("task", ["image_text", "masked_image"])
def test_every_loss_is_in_the_picture_at_its_height(
    page: Any, run_copy: epath.Path, task: str
) -> None:
    losses = [
        x["loss"] for x in metrics.read(run_copy) if x["kind"] == "train" and x["task"] == task
    ]
    points = page.points(f"Loss of {task} ", "line raw")
    assert len(points) == len(losses) >= 4
    # Pixels grow downward: a straight line with a negative slope, up to the rounding of pixels.
    slope, offset = np.polyfit(losses, points[:, 1], 1)
    assert slope < 0
    assert np.abs(slope * np.array(losses) + offset - points[:, 1]).max() < 0.11
    assert np.ptp(points[:, 1]) > 20


def test_costs_are_those_of_the_summary(page: Any, run_copy: epath.Path) -> None:
    told = json.loads((run_copy / "summary.json").read_text())
    exact = {float(d["value"]) for d in page.all("data")}
    for row in told["tasks"]:
        assert {row["step_seconds"], row["share"], row["flops_per_second"]} <= exact
    seconds = read_run(run_copy).seconds
    assert seconds["step"] / seconds["total"] in exact
    assert "Goodput" in page.text


def test_a_share_of_time_is_shown_once_and_is_that_of_the_terminal(
    page: Any, run_copy: epath.Path
) -> None:
    """Counted from the files: a task's seconds over those of all attempts when the run summed up."""
    attempts: dict[int, float] = {}
    for text in (run_copy / "goodput.jsonl").read_text().splitlines():
        line = json.loads(text)
        if line.get("phase") == "report":
            break  # the summary comes before the report
        attempts[line["attempt"]] = line["seconds"]
    lines = [x for x in metrics.read(run_copy) if x["kind"] == "train"]
    heads = [text for element, text in page.texts if element == "th"]
    assert heads.count("share of time") == 1
    stream = StringIO()
    summary_tables(json.loads((run_copy / "summary.json").read_text()), stream)
    for task in ("image_text", "masked_image"):
        spent = sum(x["timing"]["seconds"] for x in lines if x["task"] == task)
        share = spent / sum(attempts.values())
        assert percent(share) in page.text and f" {percent(share)}" in stream.getvalue()
    # Each activity has one label, one row and one share on the page, and the same ones in the terminal.
    spans = [text for element, text in page.texts if element == "span"]
    rows = [line.split("  ") for line in stream.getvalue().partition("spent on")[2].splitlines()]
    labels = [row[0] for row in rows[2:] if row[0]]
    assert len(labels) >= 6
    for label in labels:
        assert spans.count(label) == 1, label


def test_a_finished_run_has_nothing_that_still_goes_on(
    parse: Parse, tiny_run: epath.Path, tmp_path: Any
) -> None:
    """The run writes its own report inside an activity, which is open then."""
    copy = epath.Path(tmp_path) / "run"
    shutil.copytree(tiny_run, copy)
    with ActivityLog(copy) as log, log.activity("report"):
        page = parse(write_report(copy, 0).read_text())
    assert "finished." in page.text and "killed" not in page.text and "still" not in page.text
    told = json.loads((copy / "summary.json").read_text())
    assert str(human_seconds(told["seconds"]["total"])) in page.text
    # A run that is not at its end may have been killed, or be under way.
    going = _unfinished(tiny_run, tmp_path)
    log = (going / "goodput.jsonl").read_text().splitlines()
    (going / "metrics.jsonl").unlink()
    cut = next(i for i, text in enumerate(log) if '"phase": "step"' in text) + 1
    (going / "goodput.jsonl").write_text("\n".join(log[:cut]) + "\n")
    assert "(1 killed or still going)" in parse(write_report(going, 0).read_text()).text


def test_a_run_that_is_not_finished_is_summed_up_from_its_lines(
    parse: Parse, tiny_run: epath.Path, tmp_path: Any
) -> None:
    """Whatever an earlier end of it has left in `summary.json`."""
    going = _unfinished(tiny_run, tmp_path)
    lines = (going / "metrics.jsonl").read_text().splitlines()
    train = [line for line in lines if json.loads(line)["kind"] == "train"]
    (going / "metrics.jsonl").write_text("\n".join(train[:9]) + "\n")
    stale = json.loads((tiny_run / "summary.json").read_text())
    (going / "summary.json").write_text(json.dumps({**stale, "step": 5}))
    run = read_run(going)
    assert sum(row["visits"] for row in run.summary["tasks"]) == 9
    assert run.summary["step"] == 9


def test_columns_of_what_is_not_known_are_left_out(
    parse: Parse, run_copy: epath.Path, tmp_path: epath.Path
) -> None:
    copy = epath.Path(tmp_path / "run")
    shutil.copytree(run_copy, copy)
    told = json.loads((copy / "summary.json").read_text())
    assert "MFU" not in [
        t for tag, t in parse(write_report(copy, 0).read_text()).texts if tag == "th"
    ]
    for row in told["tasks"]:
        row["mfu"] = 0.375
    (copy / "summary.json").write_text(json.dumps(told))
    page = parse(write_report(copy, 0).read_text())
    assert "MFU" in [t for tag, t in page.texts if tag == "th"] and percent(0.375) in page.text


def test_the_schedule_is_the_one_that_ran(page: Any, run_copy: epath.Path) -> None:
    steps = [line for line in metrics.read(run_copy) if line["kind"] == "train"]
    lanes = [svg for svg in page.all("svg") if svg.get("class", "").startswith("lane")]
    assert len(lanes) == 2
    for task in ("image_text", "masked_image"):
        count = sum(line["task"] == task for line in steps)
        assert f"{task} runs at {count} of the first 14 steps" in {s["aria-label"] for s in lanes}
    places = [
        int(p)
        for d in page.all("path")
        if "h1v1" in d["d"]
        for p in re.findall(r"M(\d+) 0h", d["d"])
    ]
    assert sorted(places) == list(range(14))


def test_gallery_shows_pictures_with_words_and_words_with_pictures(page: Any) -> None:
    images = [image for image in page.all("img") if re.fullmatch(r"image: \S.*", image["alt"])]
    # 12 queries of one image each, and 12 texts with 5 images each.
    assert len(images) == 12 + 12 * 5
    for image in images:
        picture = Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))
        assert picture.size == (64, 64) and np.asarray(picture.convert("RGB")).std() > 0
    assert len({image["src"] for image in images[:12]}) == 12
    marks = [d for d in page.all("li") if d.get("class") == "right"]
    assert len(marks) == page.text.count("\nright\n")
    assert not [d for d in page.all("p") if d.get("class") == "none"], "something is missing"


def test_time_parameters_and_versions(page: Any, run_copy: epath.Path) -> None:
    step, meta = read_run(run_copy).meta_step, read_run(run_copy).meta
    assert step == 14 and meta is not None
    assert f"jax {meta['environment']['jax']}" in page.text
    shapes = checkpoint.read_shapes(run_copy, step)["parameters"]
    total = sum(int(np.prod(leaf.shape)) for leaf in shapes.values())
    assert f"{total:,}" in page.text
    for words in ("trunk", "stems/text", "heads/masked_image", "compiling", "steps that count"):
        assert words in page.text


def test_every_table_names_its_columns_and_rows(page: Any) -> None:
    scopes = [th.get("scope") for th in page.all("th")]
    assert set(scopes) == {"col", "row", "rowgroup"}
    assert len(page.all("table")) == len(page.all("caption")) >= 7
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in page.all("svg"))
    assert page.all("html") == [{"lang": "en"}]


# --- runs that are not finished, and folders that are damaged -----------------------------------


def _unfinished(source: epath.Path, path: Any) -> epath.Path:
    """Return what is in the folder of a run killed in its first steps."""
    copy = epath.Path(path) / "killed"
    copy.mkdir()
    for name in ("config.json", "goodput.jsonl", "metrics.jsonl"):
        (copy / name).write_bytes((source / name).read_bytes())
    return copy


def test_killed_before_its_first_checkpoint(
    parse: Parse, tiny_run: epath.Path, tmp_path: Any, command: Callable[..., Any]
) -> None:
    killed = _unfinished(tiny_run, tmp_path)
    lines = (killed / "metrics.jsonl").read_text().splitlines()
    train = [line for line in lines if json.loads(line)["kind"] == "train"]
    (killed / "metrics.jsonl").write_text("\n".join(train[:3]) + "\n" + train[3][:20])
    log = (killed / "goodput.jsonl").read_text().splitlines()
    (killed / "goodput.jsonl").write_text("\n".join(log[:5]) + "\n" + log[5][:9])
    done = command("report.page", f"--workdir={killed}")
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout and not done.stderr
    page = parse((killed / "report.html").read_text())
    assert "3 of 14 steps over 2 tasks; not finished" in page.text
    assert "No evaluation yet." in page.text and "There is no checkpoint yet." in page.text
    assert len(page.points("Loss of image_text ", "line raw")) == 2


def test_before_its_first_step(parse: Parse, tiny_run: epath.Path, tmp_path: Any) -> None:
    killed = _unfinished(tiny_run, tmp_path)
    (killed / "metrics.jsonl").unlink()
    (killed / "goodput.jsonl").unlink()
    page = parse(write_report(killed).read_text())
    assert "0 of 14 steps" in page.text and "has not run yet" in page.text
    assert "trunk" in page.text


def test_going_on_shows_the_last_evaluation(
    parse: Parse, tiny_run: epath.Path, tmp_path: Any
) -> None:
    killed = _unfinished(tiny_run, tmp_path)
    lines = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    (killed / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines if line["step"] < 12)
    )
    (killed / "results.json").write_text((tiny_run / "results.json").read_text())  # of before
    run = read_run(killed)
    assert run.records_step == 10
    assert [r["value"] for r in run.records] == [
        x["value"] for x in lines if x["kind"] == "eval" and x["step"] == 10
    ]
    page = parse(write_report(killed, examples=0).read_text())
    assert "On held-out data, after 10 steps." in page.text
    assert not page.all("img") and "Held-out examples\n" not in page.text


def test_what_evaluate_finds_stands_on_the_page_with_step_time_and_command(
    parse: Parse, tiny_run: epath.Path, tmp_path: Any
) -> None:
    copy = _unfinished(tiny_run, tmp_path)
    [record, *_] = json.loads((tiny_run / "results.json").read_text())
    said = {"step": 12, "time": "2026-01-02T03:04:05+00:00", "command": "mmjax evaluate <b>"}
    lines = [json.dumps({**record, **said, "value": 0.4321}), '{"torn']
    (copy / "evaluations.jsonl").write_text("\n".join(lines))
    assert [r["value"] for r in read_run(copy).evaluations] == [0.4321]
    page = parse(write_report(copy, examples=0).read_text())
    for words in ("By mmjax evaluate (1)", said["time"], "mmjax evaluate <b>", "43.2 %"):
        assert words in page.text


def test_results_of_another_evaluation_are_not_given_a_step(
    tiny_run: epath.Path, tmp_path: Any
) -> None:
    """As version 0.1 wrote them, whose `evaluate` replaced the run's results."""
    killed = _unfinished(tiny_run, tmp_path)
    records = json.loads((tiny_run / "results.json").read_text())
    for record in records:
        del record["step"]
    (killed / "results.json").write_text(json.dumps(records))
    assert read_run(killed).records_step == 14
    records[0]["value"] = 0.123456
    (killed / "results.json").write_text(json.dumps(records))
    run = read_run(killed)
    assert run.records_step is None and run.records[0]["value"] == 0.123456


def test_a_torn_checkpoint_gives_way_to_the_one_before(
    parse: Parse, run_copy: epath.Path, tmp_path: Any
) -> None:
    copy = epath.Path(tmp_path) / "torn"
    shutil.copytree(run_copy, copy)
    newest, before = checkpoint.steps(copy)
    shutil.rmtree(copy / "checkpoints" / str(newest) / "state")
    page = parse(write_report(copy, examples=2).read_text())
    assert f"By the checkpoint of step {before}." in page.text
    assert len(page.all("img")) == 2 + 2 * 5 + 2 * 4
    shutil.rmtree(copy / "checkpoints" / str(newest) / "meta")
    assert read_run(copy).meta_step == before


def test_data_that_is_not_there_is_said_on_the_page(
    parse: Parse, run_copy: epath.Path, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMJAX_DATA_DIR", str(tmp_path / "nothing"))
    copy = epath.Path(tmp_path) / "copy"
    shutil.copytree(run_copy, copy)
    page = parse(write_report(copy).read_text())
    assert "Not shown: " in page.text and str(tmp_path / "nothing") in page.text
    assert "Loss" in page.text and not page.all("img")


def test_without_the_folder_of_its_modules_the_report_of_before_stays(
    parse: Parse, tiny_run: epath.Path, tmp_path: Any
) -> None:
    run = _unfinished(tiny_run, tmp_path)
    config = json.loads((run / "config.json").read_text())
    config["modalities"]["image"]["name"] = "of_the_user"
    (run / "config.json").write_text(json.dumps(config))
    (run / "report.html").write_bytes(b"the report of before")
    words = (
        r"no 'of_the_user' .*report\.html' is not written\. Give each --extra=DIR .*--examples=0"
    )
    with pytest.raises(UserError, match=words):
        main([f"--workdir={run}"])
    assert (run / "report.html").read_bytes() == b"the report of before"
    assert main([f"--workdir={run}", "--examples=0"]) == 0
    assert parse((run / "report.html").read_text()).all("title")


def test_no_run(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="No run in"):
        write_report(epath.Path(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_report_of_before(
    run_copy: epath.Path, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = _unfinished(run_copy, tmp_path)
    before = write_report(killed).read_text()
    (killed / "report.html.partial").mkdir()  # so that it cannot be written
    with pytest.raises(OSError):
        write_report(killed)
    assert (killed / "report.html").read_text() == before


# --- hostile data -------------------------------------------------------------------------------


@pytest.fixture
def hostile_run(tmp_path: Any) -> epath.Path:
    """Return a run whose names are all code, with numbers that are none, of thousands of steps."""
    workdir = epath.Path(tmp_path) / "run <b>&amp;"
    tasks = [EVIL, QUOTES.replace("\ud800", ""), "never"]
    with MetricWriter(workdir, 0) as writer, ActivityLog(workdir) as activities:
        for step in range(400):
            loss = float("nan") if step == 7 else float("inf") if step == 8 else 1 / (step + 1)
            values = {"loss": loss, "grad_norm": 1.0, EVIL: 1.0, "visit": step // 2}
            writer.write(step, tasks[step % 2], values, {"seconds": 0.0, "wait": 0.0})
        shared = {"task": EVIL, "name": QUOTES.replace("\ud800", ""), "split": EVIL}
        writer.write_eval(400, [
            {**shared, "value": 0.5, "chance": 0.0, "count": 3, "unit": EVIL},
            {**shared, "value": float("nan"), "chance": None, "count": None},
            {**shared, "value": 2.0, "chance": 0.0, "count": 1, "unit": "loss"},
        ])  # fmt: skip
        activities.event(EVIL, text=QUOTES)
        with activities.activity(EVIL):
            pass
    blocks = {task: {"batch": 4, "weight": 1} for task in tasks}
    config = {"steps": 400, "seed": 0, "tasks": blocks, EVIL: QUOTES}
    (workdir / "config.json").write_text(json.dumps(config))
    return workdir


def test_nothing_hostile_gets_through(parse: Parse, hostile_run: epath.Path) -> None:
    content = write_report(hostile_run).read_text()
    page = parse(content)
    page.assert_is_harmless()
    assert EVIL not in content and page.text.count(EVIL) >= 8
    assert "<img" not in content and page.text.count("<img src=x onerror=alert(2)>") >= 4
    assert "\x00" not in content and "\x1b" not in content
    assert "run <b>&amp;" in page.text


def test_losses_that_are_not_finite_are_counted_and_leave_a_gap(
    parse: Parse, hostile_run: epath.Path
) -> None:
    page = parse(write_report(hostile_run).read_text())
    assert "200 visits, 1 without update (not finite)" in page.text
    assert len(page.points(f"Loss of {EVIL} ", "line raw")) == 199
    lines = [p["d"] for p in page.all("path") if p.get("class", "").startswith("line raw")]
    assert any(d.count("M") == 2 for d in lines)
    assert "never" in page.text and "has not run yet" in page.text


# --- in a browser -------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1000, 400])
def test_looks_right_in_a_browser(
    browser: Any, written: epath.Path, width: int, scheme: str
) -> None:
    browser.assert_looks_right(written, width, scheme)
    assert browser.ask("document.images.length") == 104


def test_lines_are_drawn_where_the_numbers_say(browser: Any, written: epath.Path) -> None:
    browser.open(written, 1000, "light")
    inside = """[...document.querySelectorAll("svg.chart .line")].filter(line => {
      const a = line.getBBox(); return a.x < 46 || a.y < 0 || a.x + a.width > 391 || a.y + a.height > 177
    }).length"""
    assert browser.ask("document.querySelectorAll('svg.chart .line').length") >= 10
    assert browser.ask(inside) == 0


def test_hostile_run_in_a_browser(browser: Any, hostile_run: epath.Path) -> None:
    written = write_report(hostile_run)
    browser.open(written, 400, "light")
    browser.assert_is_quiet()
    assert browser.ask("document.scripts.length + document.images.length") == 0
    assert browser.ask("document.documentElement.scrollWidth") == 400


def test_the_browser_would_tell(browser: Any, tmp_path: Any) -> None:
    page = epath.Path(tmp_path) / "bad.html"
    page.write_text("<script>console.error('no')</script><img src='http://127.0.0.1:9/x.png'>")
    browser.open(page, 400, "light")
    with pytest.raises(AssertionError):
        browser.assert_is_quiet()


def test_a_missing_browser_says_how_to_get_one(
    browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MMJAX_BROWSER", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(AssertionError, match="apt-get install .* chromium-headless-shell"):
        browser.find()
