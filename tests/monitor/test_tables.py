"""Tables and numbers for people."""

import math
from io import StringIO
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.text import Text

from mmjax.monitor import progress
from mmjax.monitor.tables import without_control_codes


class Terminal(StringIO):
    """A stream that claims to be a terminal; its width comes from COLUMNS."""

    def isatty(self) -> bool:
        return True


def _print(*args: Any, stream: StringIO | None = None, table: Any = progress.table) -> list[str]:
    stream = stream or StringIO()
    table(*args, stream=stream)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (progress.human_bytes, 0, "0 B"),
        (progress.human_bytes, 512, "512 B"),
        (progress.human_bytes, 1536, "1.5 KiB"),
        (progress.human_bytes, 1024 * 1024 - 1, "1.0 MiB"),
        (progress.human_bytes, 139 * 2**30, "139 GiB"),
        (progress.human_count, 950, "950"),
        (progress.human_count, 3.25, "3.2"),
        (progress.human_count, 999.96, "1.0k"),
        (progress.human_count, 12345, "12.3k"),
        (progress.human_count, 1_200_000, "1.2M"),
        (progress.human_count, 7e9, "7.0B"),
        (progress.human_count, math.nan, "?"),
        (progress.human_flops, 7e9, "7.0 G"),
        (progress.human_seconds, 0.0123, "12ms"),
        (progress.human_seconds, 0.9996, "1.0s"),
        (progress.human_seconds, 3.21, "3.2s"),
        (progress.human_seconds, 59.97, "1m00s"),
        (progress.human_seconds, 100, "1m40s"),
        (progress.human_seconds, 3599.8, "1h00m"),
        (progress.human_seconds, 3720, "1h02m"),
        (progress.human_seconds, 86399, "1d00h"),
        (progress.human_seconds, 190_000, "2d05h"),
        (progress.human_seconds, -1, "?"),
        (progress.human_seconds, math.inf, "?"),
        (progress.percent, 0.1234, "12.3 %"),
        (progress.percent, 0.0052, "0.52 %"),
        (progress.percent, 0.0, "0.0 %"),
        (progress.percent, 1.0, "100.0 %"),
        (progress.percent, math.nan, "nan %"),
        (progress.loss_text, 4.1234, "4.12"),
        (progress.loss_text, 0.08312, "0.0831"),
        (progress.loss_text, 0.0, "0.00"),
        (progress.loss_text, 123456.0, "1.2e+05"),
        (progress.loss_text, 1e-7, "1.0e-07"),
        (progress.loss_text, math.nan, "nan"),
        (progress.loss_text, None, "-"),
    ],
)
def test_numbers_for_people(function: Any, value: float, text: str) -> None:
    assert function(value) == text


def test_a_plain_table() -> None:
    rows = [("image_text", 1234567, "12.3 %", True), ("mim", 12, "0.52 %", None)]
    assert _print("Things", ("name", "count", "share", "done"), rows) == [
        "Things",
        "name            count   share  done",
        "-----------------------------------",
        "image_text  1,234,567  12.3 %  yes",
        "mim                12  0.52 %",
        "",
    ]


_NUMBERS = st.one_of(
    st.integers(-(10**15), 10**15),
    st.floats(allow_nan=True),
    st.floats(0, 1e17).map(progress.human_bytes),
    st.floats(0, 1e8).map(progress.human_seconds),
    st.floats(0, 1).map(progress.percent),
)
_WORDS = st.text(st.characters(exclude_categories=["C", "Z", "M"]), min_size=1, max_size=50)


@st.composite
def _tables(draw: st.DrawFn) -> tuple[list[str], list[list[Any]], list[bool]]:
    numeric = draw(st.lists(st.booleans(), min_size=1, max_size=9))
    kinds = [_NUMBERS if flag else _WORDS.map(lambda word: "x" + word) for flag in numeric]
    rows = draw(st.lists(st.tuples(*kinds).map(list), min_size=1, max_size=5))
    return [f"head{i}" for i in range(len(numeric))], rows, numeric


@given(_tables(), st.sampled_from([60, 80, 120]))
@settings(max_examples=150, deadline=None)
def test_tables_fit_and_numbers_stay_whole(table: Any, width: int) -> None:
    columns, rows, numeric = table
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        patch.setenv("TERM", "xterm-256color")
        for stream, room in ((StringIO(), 80), (Terminal(), width)):
            lines = _print("Title", columns, rows, stream=stream)
            plain = [without_control_codes(line) for line in lines]
            assert max(map(cell_len, plain)) <= room
            for row in rows:
                for value, is_number in zip(row, numeric, strict=True):
                    if is_number:
                        shown = f"{value:,}" if isinstance(value, int) else value
                        shown = f"{value:.4g}" if isinstance(value, float) else shown
                        assert any(shown in line for line in plain), (shown, plain)


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE", "CLICOLOR_FORCE"])
def test_a_log_file_gets_no_control_codes(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    text = "\n".join(_print("T\x1b[31m", ("a", "[red]b"), [("\x1b[1mbold\x07", 3)]))
    assert text == "T\na     [red]b\n------------\nbold       3\n"


def test_a_terminal_gets_bold_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    lines = _print("Things", ("name",), [("a",)], stream=Terminal())
    assert lines[0] == "\x1b[1mThings\x1b[0m"
    assert "─" in Text.from_ansi(lines[2]).plain


def test_programs() -> None:
    rows = [
        {"name": "image_text", "kind": "train", "shape": "128 x (64x64x3+32)"}
        | {"bytes": 812345678, "flops": 1.23e10, "compile_seconds": 12.3, "cached": False}
        | {"tokens": 12_288},
        {"name": "mim", "kind": "predict/one+other", "shape": None, "bytes": None, "flops": None}
        | {"compile_seconds": 0.4, "cached": True},
    ]
    assert _print(rows, table=progress.program_table) == [
        "Programs (2)",
        "task        for      shape               positions   memory   FLOPs  compile",
        "----------------------------------------------------------------------------",
        "image_text  train    128 x (64x64x3+32)      12.3k  775 MiB  12.3 G  12.3s",
        "mim         predict                              -        -       -  cached",
        "",
    ]


def test_results() -> None:
    common = {"task": "image_text", "split": "unseen drawings", "count": 1234}
    records = [
        common | {"name": "image to text recall@1", "value": 0.0523, "chance": 0.0008},
        common | {"name": "groups", "value": 0.412, "chance": 0.1, "majority": 0.231},
        common | {"task": "mim", "name": "loss", "unit": "loss", "value": 0.812, "chance": 1.02},
    ]
    assert _print(records, table=progress.results_table) == [
        "Results",
        "measure                   split             value  chance  majority  examples",
        "-----------------------------------------------------------------------------",
        "image_text",
        "  image to text recall@1  unseen drawings   5.2 %  0.08 %               1,234",
        "  groups                  unseen drawings  41.2 %  10.0 %    23.1 %     1,234",
        "mim",
        "  loss (lower is better)  unseen drawings    0.81    1.02               1,234",
        "",
    ]
    assert "majority" not in _print(records[::2], table=progress.results_table)[1]


def test_only_fractions_are_percentages() -> None:
    common = {"task": "t", "split": "s", "name": "n", "count": 3, "value": 0.25, "chance": 2.5}
    units: list[dict[str, Any]] = [{"unit": ""}, {"unit": "fraction"}, {}, {"unit": "dB"}]
    lines = _print([common | unit for unit in units], table=progress.results_table)[4:-1]
    assert [line.split()[2:-1] for line in lines] == [
        ["0.25", "2.50"],
        ["25.0", "%", "250.0", "%"],
        ["25.0", "%", "250.0", "%"],  # of a run that wrote no unit of fractions
        ["0.25", "dB", "2.50", "dB"],
    ]


def test_parameters() -> None:
    rows = [
        {"part": "stems", "total": 100_000, "active_per_token": 50_000},
        {"part": "trunk", "total": 900_000},
    ]
    assert _print(rows, table=progress.parameter_table) == [
        "Parameters",
        "part       total  active per token    share",
        "-------------------------------------------",
        "stems    100,000            50,000   10.0 %",
        "trunk    900,000                     90.0 %",
        "all    1,000,000            50,000  100.0 %",
        "",
    ]


def test_numbers_too_wide_for_a_table_become_lists() -> None:
    heads = [f"column_number_{i}" for i in range(7)]
    lines = _print("Wide", heads, [[10**15 + i for i in range(7)]] * 2)
    assert lines[0] == "Wide"
    assert lines[1] == "  column_number_0  1,000,000,000,000,000"
    assert lines.count("  column_number_6  1,000,000,000,000,006") == 2
