"""The verdict's table, as lines for the terminal and as rows for a page."""

from collections.abc import Mapping
from typing import Any

from lmnas.core.contracts import Objective
from lmnas.core.text import columns
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
        f"{items(objective)}/s",
        "seconds",
    ]


def items(objective: Objective) -> str:
    """Unit of throughput: the things that predictions are made for, in the plural."""
    return objective.items or "tokens"


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


def plain_text(verdict: Verdict, objective: Objective) -> str:
    """The table in aligned columns."""
    return columns(header(verdict, objective), rows(verdict))


def format_count(value: float | None) -> str:
    """A whole number with its thousands apart; small ones keep a digit after the point."""
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) and abs(value) < 100 else f"{round(value):,}"
