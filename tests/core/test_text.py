"""Tables and durations by hand."""

import pytest

from lmnas.core.text import columns, seconds_text


@pytest.mark.parametrize(
    "seconds, expected",
    [
        (0, "0.0 s"),
        (4.25, "4.2 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (75, "1 min 15 s"),
        (3599.6, "1 h 0 min"),
        (3725, "1 h 2 min"),
        (360_000, "100 h 0 min"),
    ],
)
def test_seconds(seconds, expected):
    assert seconds_text(seconds) == expected


def test_columns_are_aligned():
    assert columns(["name", "value"], [["a", "1.5"], ["[bold]b :smile:", "-20"]]) == (
        "name             value\na                  1.5\n[bold]b :smile:    -20"
    )


def test_a_row_is_one_line_however_long():
    lines = columns(["name", "value"], [["word " * 100 + "end", "1"]]).splitlines()
    assert len(lines) == 2 and lines[1].endswith("end      1")


def test_a_narrow_terminal_breaks_between_words_alone():
    rows = [["a rather long description", "unbreakable-word"], ["short", "1"]]
    narrow = columns(["description", "value"], rows, width=32)
    assert len(narrow.splitlines()) > 3
    assert max(map(len, narrow.splitlines())) <= 32
    words = " ".join(narrow.split())
    assert all(word in words.split() for row in rows for cell in row for word in cell.split())
    # narrower than the longest words: the line is as long as they are
    assert "unbreakable-word" in columns(["description", "value"], rows, width=5)
