"""A summary of where the time of the tests went: those above a budget, the slowest files, and packages.

It only prints: no test fails by its time. The seconds of a test are those of its setup, call and teardown; a fixture
that several tests share counts for the first one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import pytest

BUDGET = 5.0  # seconds of a test
_FILES = 10  # slowest files that are listed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--budget",
        type=float,
        default=BUDGET,
        metavar="SECONDS",
        help="list tests that take longer",
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    seconds = seconds_of_tests(r for reports in terminalreporter.stats.values() for r in reports)
    budget = config.getoption("--budget", BUDGET)
    if sum(seconds.values()) <= budget:
        return
    terminalreporter.section("seconds")
    for line in summary(seconds, budget):
        terminalreporter.write_line(line)


def seconds_of_tests(reports: Iterable[Any]) -> dict[str, float]:
    """Return the seconds of each test, by node id; reports that have none, as of collection, are skipped."""
    seconds: dict[str, float] = defaultdict(float)
    for report in reports:
        if getattr(report, "when", None) in ("setup", "call", "teardown"):
            seconds[report.nodeid] += report.duration
    return dict(seconds)


def summary(seconds: Mapping[str, float], budget: float) -> Iterator[str]:
    """Yield the lines of the summary: tests above the budget by file, the slowest files, and packages."""
    files, packages = _sums(seconds, file_of), _sums(seconds, package_of)
    above = {name: s for name, s in _sorted(seconds) if s > budget}
    by_file = _sums(above, file_of)
    yield f"Tests above the budget of {budget:g} s: {len(above)} of {len(seconds)}"
    for file, _ in _sorted(by_file):
        yield f"  {file}"
        yield from (
            f"  {s:8.1f}  {name.partition('::')[2]}"
            for name, s in above.items()
            if file_of(name) == file
        )
    yield f"Slowest files: {min(_FILES, len(files))} of {len(files)}"
    yield from (f"  {s:8.1f}  {file}" for file, s in _sorted(files)[:_FILES])
    yield f"Packages: {sum(seconds.values()):.1f} s in all"
    yield from (f"  {s:8.1f}  {package}" for package, s in _sorted(packages))


def file_of(test: str) -> str:
    """Return the file of a test's node id."""
    return test.partition("::")[0]


def package_of(test: str) -> str:
    """Return the folder below `tests/` that a test's file lies in; `tests` for one beside them."""
    parts = PurePosixPath(file_of(test)).parts
    return parts[1] if len(parts) > 2 else parts[0] if len(parts) > 1 else "."


def _sums(seconds: Mapping[str, float], key: Any) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for name, each in seconds.items():
        sums[key(name)] += each
    return sums


def _sorted(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    """Return the items, the most seconds first; of equal ones by name."""
    return sorted(seconds.items(), key=lambda item: (-item[1], item[0]))
