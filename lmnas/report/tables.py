"""The verdict's table, as lines for the terminal and as rows for a page."""

from collections.abc import Mapping
from typing import Any

from lmnas.core.contracts import Objective
from lmnas.report.verdict import format_value

Verdict = Mapping[str, Any]


def header(verdict: Verdict, objective: Objective) -> list[str]:
    """Column titles; the first column is text, the others are numbers."""
    interval = f"{100 * (1 - verdict['level']):g} % interval"
    return [
        "model",
        f"test {objective.name}, mean",
        interval,
        "n",
        "parameters",
        f"{objective.items or 'tokens'}/s",
        "seconds",
    ]


def rows(verdict: Verdict) -> list[list[str]]:
    """One row of text per model; `-` where nothing is known."""
    return [
        [
            model["model"],
            format_value(model["mean"]),
            "-" if model["low"] is None else f"{format_value(model['low'])} to {format_value(model['high'])}",
            str(model["n"]) + (f" ({model['diverged']} diverged)" if model["diverged"] else ""),
            format_count(model["n_parameters"]),
            format_count(model["tokens_per_second"]),
            format_count(model["seconds"]),
        ]
        for model in verdict["models"]
    ]


def plain_lines(verdict: Verdict, objective: Objective) -> list[str]:
    """The table in aligned columns."""
    table = [header(verdict, objective), *rows(verdict)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(map(_align, row, widths, range(len(row)))) for row in table]


def _align(cell: str, width: int, column: int) -> str:
    return cell.rjust(width) if column else cell.ljust(width)


def format_count(value: float | None) -> str:
    """A whole number with its thousands apart; small ones keep a digit after the point."""
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) and abs(value) < 100 else f"{round(value):,}"
