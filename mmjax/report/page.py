"""Write the report of a run: `report.html` in its folder, one file that needs nothing else.

    mmjax report --workdir=DIR [--examples=N]

Everything comes from the files of the folder, so it can be written at any time: during the run,
after it was killed, on another machine. The panels of held-out examples need a checkpoint, the data and,
where the run has modules of its own, the run's --extra=DIR.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import jax
from etils import epath

from mmjax.core import errors, flags
from mmjax.core.errors import UserError
from mmjax.core.files import replace_file
from mmjax.core.workdir import REPORT
from mmjax.engine import checkpoint
from mmjax.engine.compile import use_cache
from mmjax.experiment import make_experiment
from mmjax.loading import TrainedModel
from mmjax.monitor.parameter_rows import rows_of_checkpoint, rows_of_config
from mmjax.monitor.tables import human_bytes
from mmjax.report import parts as parts
from mmjax.report.classes import classified
from mmjax.report.costs import costs
from mmjax.report.data import Run, read_run
from mmjax.report.gallery import retrieved
from mmjax.report.html import Html, join, section, tag
from mmjax.report.panel import EXAMPLES, Panel, credit_line, task_section
from mmjax.report.pictures import pictured
from mmjax.report.results import results
from mmjax.report.routing import routing
from mmjax.report.style import STYLE

# Should anything of the data ever get past the escaping, the browser still runs and fetches nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"


def write_report(workdir: epath.Path, examples: int = EXAMPLES) -> epath.Path:
    """Write `report.html`, whole or not at all.

    What cannot be shown (no checkpoint yet, data that is not on this machine) is noted on the page.

    Args:
      workdir: the run's folder.
      examples: queries of each panel of held-out examples; 0 for none, and no model is loaded.

    Returns:
      The file's path.

    Raises:
      UserError: the folder holds no run, or a file of it is broken in the middle.
    """
    workdir = flags.run_folder(str(workdir))
    run = read_run(workdir)
    content = page(run, _gallery(run, examples) if examples else Html(""))
    replace_file(workdir / REPORT, content)
    return workdir / REPORT


def page(run: Run, gallery: Html) -> Html:
    """Return the whole page."""
    rows, note = _parameters(run)
    title = f"{run.name}: a run of mmjax"
    sections = (
        section("Results", *results(run)),
        section("Loss", parts.losses(run)),
        section("Held-out examples", gallery),
        section("Schedule", *parts.schedule(run)),
        section("Optimisation", *parts.optimisation(run)),
        section("Routing", *routing(run)),
        section("Time", *costs(run)),
        section("Parameters", parts.parameters(rows) if rows else tag("p", note, class_="none")),
        section("Events", *parts.events(run)),
        section("Config", _config(run)),
    )
    total = sum(row["total"] for row in rows)
    body = tag("main", tag("h1", run.name), *parts.facts(run, total), *sections)
    return join(
        [
            Html("<!doctype html>\n"),
            tag("html", _head(title), tag("body", body, _foot()), lang="en"),
        ]
    )


def _head(title: str) -> Html:
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )


def _foot() -> Html:
    now = datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m-%d %H:%M UTC")
    again = tag("code", "mmjax report --workdir=DIR")
    return tag(
        "footer", f"Written {now} from the files of the run's folder; ", again, " updates it."
    )


def _config(run: Run) -> Html | None:
    if not run.config:
        return None
    shown = tag("pre", json.dumps(run.config, indent=1, ensure_ascii=False), tabindex="0")
    return tag("details", tag("summary", "config.json"), shown)


def _parameters(run: Run) -> tuple[list[dict[str, Any]], str]:
    """Return the rows of the parameter table, from the config, else from the checkpoint; or why there are none."""
    try:
        experiment = make_experiment(run.config, str(run.workdir / "assets"))
        return rows_of_config(experiment.declaration.specs), ""
    except UserError as error:
        if run.meta is None:
            return [], f"The config cannot be read: {error}"
    return rows_of_checkpoint(checkpoint.read_shapes(run.workdir, run.meta_step)["parameters"]), ""


def _gallery(run: Run, count: int) -> Html:
    if jax.process_count() > 1:
        return _none(
            "This run has several processes: write the report again after the run has ended."
        )
    try:
        model = _newest_model(run.workdir)
        if model is None:
            return _none("There is no checkpoint yet.")
    except Exception as error:
        _warn("The report shows no held-out examples", error)
        return _none(f"Not shown: {_words(error)}")
    panels = {name: _panels(model, name, count) for name in run.tasks if name in model.tasks}
    tasks = [
        task_section(parts.named(run, name), shown_panels) for name, shown_panels in panels.items()
    ]
    if not any(tasks):
        return Html("")
    lead = tag("p", f"By the checkpoint of step {model.step}.", class_="lead")
    return join(
        [
            lead,
            *tasks,
            credit_line(panel for shown_panels in panels.values() for panel in shown_panels),
        ]
    )


def _panels(model: TrainedModel, task: str, count: int) -> list[Panel]:
    """Return the panels of a task's held-out data, or why it has none."""
    try:
        kinds = (retrieved, classified, pictured)
        return [panel for kind in kinds for panel in kind(model, model.tasks[task], count)]
    except Exception as error:
        # The rest of the page is worth having whatever is wrong with the data or the device.
        _warn(f"The report shows no held-out examples of {task}", error)
        return [Panel("Held-out data", _none(f"Not shown: {_words(error)}"))]


def _newest_model(workdir: epath.Path) -> TrainedModel | None:
    """Return the newest checkpoint that can be read; the run may be removing or writing one just now."""
    steps = checkpoint.steps(workdir)

    def readable(step: int) -> TrainedModel | None:
        try:
            return TrainedModel(workdir, step)
        except Exception as error:
            if step == steps[-1]:
                raise
            _warn(f"Checkpoint {step} cannot be read; trying the one before it", error)
            return None

    return checkpoint.newest(workdir, readable, steps)


def _none(words: str) -> Html:
    return tag("p", words, class_="none")


def _words(error: Exception) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"


def _warn(words: str, error: Exception) -> None:
    trace = None if isinstance(error, UserError | OSError) else error
    logging.getLogger(__name__).warning("%s: %s", words, _words(error), exc_info=trace)


def _check_config(workdir: epath.Path) -> None:
    """Raise `UserError` if the run's config cannot be built here: its report would lack the held-out examples."""
    config = read_run(workdir).config
    try:
        if config:
            make_experiment(config, str(workdir / "assets"))
    except UserError as error:
        raise UserError(
            f"{error} '{workdir / REPORT}' is not written. Give each --extra=DIR that the run had; "
            "--examples=0 writes the report without held-out examples."
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.command("report", __doc__)
    flags.add_workdir(parser)
    parser.add_argument(
        "--examples", type=int, default=EXAMPLES, metavar="N",
        help="held-out examples of each panel; 0 for none, which loads no model",
    )  # fmt: skip
    arguments, overrides = flags.parse(parser, argv)
    if overrides:
        raise UserError("A report shows a run as it is; remove --config.KEY=VALUE.")
    use_cache()
    if arguments.examples:
        _check_config(flags.run_folder(arguments.workdir))
    path = write_report(epath.Path(arguments.workdir), arguments.examples)
    print(f"Wrote {path} ({human_bytes(path.stat().length)}).")
    return 0


if __name__ == "__main__":
    errors.run(main)
