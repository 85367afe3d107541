"""Columns of a log file, line by line."""

from __future__ import annotations

import pytest
from rich.cells import cell_len

from mmjax.monitor.progress_columns import Columns


def test_the_first_line_stands_below_title_and_heads() -> None:
    columns = Columns(["one", "image_text"], 600)
    assert columns.fits
    assert columns.line(7, ["4.00", "-"], "128", "1m").splitlines() == [
        "Loss of each task (smoothed), examples per second and time left",
        "  step",
        "of 600           one    image_text   ex/s    left",
        "     7          4.00             -    128      1m",
    ]
    assert columns.line(8, ["3.00", "2.00"], "", "") == "     8          3.00          2.00"


def test_heads_are_repeated_after_25_lines_without_the_title() -> None:
    columns = Columns(["one"], 60)
    heights = [len(columns.line(i, ["1"], "2", "3").splitlines()) for i in range(51)]
    assert [i for i, height in enumerate(heights) if height > 1] == [0, 25, 50]
    assert heights[0] == heights[25] + 1


@pytest.mark.parametrize(("count", "fits"), [(0, False), (1, True), (7, True), (8, False)])
def test_columns_fit_where_each_task_has_8_cells_of_80(count: int, fits: bool) -> None:
    """80 less 6, 7 and 8 for step, rate and time left: 59, of which 7 tasks have 8 each."""
    assert Columns([f"t{i}" for i in range(count)], 60).fits is fits


def test_long_names_are_broken_at_their_words_else_anywhere_and_stay_within_their_column() -> None:
    names = ["masked_image", "abcdefghij", "写真と文字と音声"]
    columns = Columns([*names, "d", "e", "f", "g"], 60)
    lines = columns.line(1, ["1"] * 7, "2", "3").splitlines()
    assert all(cell_len(line) <= 80 for line in lines)
    words = " ".join(lines[1:-1]).split()
    assert {"masked", "image", "abcdef", "ghij"} <= set(words)
    assert "".join(w for w in words if not w.isascii()) == "写真と文字と音声"
