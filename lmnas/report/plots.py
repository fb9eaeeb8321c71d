"""Curves of a run as SVG text, and how every figure of a report is styled and saved.

Matplotlib by its object interface alone: no global state, no display. The same records give the same bytes.
"""

import io
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import IO, Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from scipy import stats

from lmnas.core.contracts import Objective
from lmnas.report.verdict import RANDOM, SEARCHED

# A page may exchange these for its own light and dark colours; those of models and operations suit both.
INK = "#1b2733"
FAINT = "#66737f"
GRID = "#d9dee3"
PAPER = "#fefefe"
INPUT_FILL = "#cfe3f7"
OUTPUT_FILL = "#d3edda"

MODEL_COLOURS = {SEARCHED: "#2f7fd1", RANDOM: "#d9822b"}
OTHER_COLOURS = ("#3d9a6d", "#a05ec9", "#c2527a", "#8a8f2d", "#4aa3b0", "#7d6b5d")
OP_COLOURS = (*MODEL_COLOURS.values(), *OTHER_COLOURS)

TABLE_COLOUR = MODEL_COLOURS[SEARCHED]

FONT_SIZE = 9
STYLE: Any = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": FONT_SIZE,
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.titlesize": FONT_SIZE,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "legend.frameon": False,
    "legend.fontsize": FONT_SIZE,
    "lines.linewidth": 1.0,
    "svg.fonttype": "none",  # text stays text: small, selectable, in the reader's own font
    "svg.hashsalt": "lmnas",
}
LOG_ABOVE = 5.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""


@dataclass(frozen=True)
class Curve:
    """The events of one job: of `stage`, for `model` (or the source of a candidate), started with `seed`."""

    stage: str
    model: str
    seed: int
    events: Sequence[Mapping[str, Any]]

    def points(self, key: str) -> tuple[list[int], list[float]]:
        """Epochs and values of `key`, an epoch's statistic where it is no field of the epoch itself."""
        epochs, values = [], []
        for event in self.epochs:
            value = event.get(key, (event.get("statistics") or {}).get(key))
            if isinstance(value, (int, float)) and math.isfinite(value):
                epochs.append(event["epoch"])
                values.append(value)
        return epochs, values

    def last_statistics(self) -> dict[str, Any]:
        """Every statistic of the search as the last epoch that has it left it."""
        last: dict[str, Any] = {}
        for event in self.epochs:
            last |= {name: value for name, value in (event.get("statistics") or {}).items() if value not in (None, [])}
        return last

    @property
    def epochs(self) -> list[Mapping[str, Any]]:
        return [event for event in self.events if event.get("event") == "epoch" and "epoch" in event]


def save(
    figure: Figure, path_or_buffer: str | PathLike[str] | IO[bytes], format: Literal["svg", "png"] = "svg"
) -> None:
    """Write a figure without date, version or random ids; SVG has a transparent ground."""
    names = ("Date", "Creator", "Format", "Type") if format == "svg" else ("Software",)
    nothing = dict.fromkeys(names)
    with matplotlib.rc_context(STYLE):
        figure.savefig(path_or_buffer, format=format, dpi=150, metadata=nothing, transparent=format == "svg")


def learning_curves(curves: Sequence[Curve], objective: Objective) -> str | None:
    """One stage's training loss and validation metric by epoch; a thin line per seed, a colour per model.

    A dot marks where weight averaging starts, a cross where training diverged and was set back.

    Returns:
        SVG text; None while there is no finished epoch.
    """
    panels = [("train_loss", "training loss (nats)"), ("valid", f"validation {objective.name}")]
    panels = [(key, title) for key, title in panels if any(curve.points(key)[0] for curve in curves)]
    if not panels:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = stacked([title for _, title in panels])
        colours = _model_colours(curve.model for curve in curves)
        ordered = sorted(curves, key=lambda curve: list(colours).index(curve.model))
        for panel, (key, _) in zip(axes, panels, strict=True):
            labelled: set[str] = set()
            for curve in ordered:
                label = None if curve.model in labelled else curve.model
                labelled.add(curve.model)
                _line(panel, *curve.points(key), colours[curve.model], label)
                _mark_events(panel, curve, key, colours[curve.model])
            _scale(panel)
        legend(figure, axes[0])
    return svg_text(figure)


def search_curves(curves: Sequence[Curve]) -> list[tuple[str, str]]:
    """Curves of the strategy's choice: entropy, reward and the mean weight of every operation, by epoch.

    Returns:
        (caption, SVG text) pairs; empty where the records hold no statistics.
    """
    figures = []
    entropy = [("entropy", "entropy (nats)")]
    reward = [("reward", "mean reward"), ("baseline", "its moving average")]
    for caption, lines in (("How undecided the search is", entropy), ("What the proposals earned", reward)):
        present = [(key, label) for key, label in lines if any(curve.points(key)[0] for curve in curves)]
        if present:
            with matplotlib.rc_context(STYLE):
                figure, (panel,) = stacked([present[0][1]])
                for colour, (key, label) in zip(OP_COLOURS, present, strict=False):
                    for i, curve in enumerate(curves):
                        _line(panel, *curve.points(key), colour, None if i else label)
                if len(present) > 1:
                    legend(figure, panel)
            figures.append((caption, svg_text(figure)))
    for table in dict.fromkeys(name for curve in curves for name in _mixtures(curve)):
        with matplotlib.rc_context(STYLE):
            figure, (panel,) = stacked(["mean weight over edges"])
            for i, curve in enumerate(curves):
                epochs, ops, weights = _mixtures(curve).get(table, ([], [], []))
                for k, op in enumerate(ops):
                    colour = OP_COLOURS[k % len(OP_COLOURS)]
                    _line(panel, epochs, [row[k] for row in weights], colour, None if i else op)
            panel.set_ylim(bottom=0)
            legend(figure, panel)
        figures.append((f"Weights of the operations, table {table!r}", svg_text(figure)))
    return figures


def candidate_plot(candidates: Sequence[Mapping[str, Any]], objective: Objective) -> tuple[str, str] | None:
    """Proxy score against validation after short training, a dot per candidate.

    Returns:
        (caption, SVG text); None with fewer than two candidates that have both.
    """
    pairs = _proxy_pairs(candidates)
    if len(pairs) < 2:
        return None
    with matplotlib.rc_context(STYLE):
        figure, (panel,) = stacked([f"validation {objective.name} after short training"], "proxy score")
        colours = _model_colours(source for source, _, _ in pairs)
        for source in dict.fromkeys(source for source, _, _ in pairs):
            points = [(proxy, value) for name, proxy, value in pairs if name == source]
            panel.plot(*zip(*points, strict=True), "o", color=colours[source], label=source, markersize=5, alpha=0.85)
        panel.xaxis.set_major_locator(MaxNLocator(5))
        legend(figure, panel)
    caption = f"Proxy score against short training, {len(pairs)} candidates"
    tau = stats.kendalltau([proxy for _, proxy, _ in pairs], [value for _, _, value in pairs]).statistic
    if len(pairs) > 2 and math.isfinite(tau):
        caption += f"; Kendall's tau {tau:.2f} (1: same order, 0: unrelated)"
    return caption, svg_text(figure)


# ----------------------------------------------------------------------------------------------------------- parts


def stacked(titles: Sequence[str], x_label: str = "epoch") -> tuple[Figure, list[Axes]]:
    """Panels above each other with one x-axis, narrow enough for a phone."""
    figure = Figure(figsize=(3.8, 0.8 + 1.8 * len(titles)), layout="constrained")
    axes = list(figure.subplots(len(titles), 1, sharex=True, squeeze=False)[:, 0])
    for panel, title in zip(axes, titles, strict=True):
        panel.set_title(title)
        panel.yaxis.set_major_formatter(FuncFormatter(tick))
    axes[-1].set_xlabel(x_label)
    axes[-1].xaxis.set_major_locator(MaxNLocator(6, integer=x_label == "epoch"))
    return figure, axes


def _line(panel: Axes, x: Sequence[float], y: Sequence[float], colour: str, label: str | None) -> None:
    # a single epoch would be an invisible line
    panel.plot(x, y, color=colour, label=label, alpha=0.85, marker="o" if len(x) == 1 else None, markersize=3)


def _mark_events(panel: Axes, curve: Curve, key: str, colour: str) -> None:
    averaging = {event["epoch"] for event in curve.epochs if event.get("averaging")}
    epochs, values = curve.points(key)
    known = dict(zip(epochs, values, strict=True))
    if averaging and min(averaging) in known:
        panel.plot(min(averaging), known[min(averaging)], "o", color=colour, markersize=4)
    last = None
    for event in curve.events:
        if event.get("event") == "diverged" and last is not None:
            panel.plot(*last, "x", color=colour, markersize=6, markeredgewidth=1.5)
        elif event.get("epoch") in known:
            last = (event["epoch"], known[event["epoch"]])


def _scale(panel: Axes) -> None:
    """A logarithmic axis where values span a wide range, as perplexity does in its first epochs."""
    values: Any = [value for line in panel.lines for value in np.asarray(line.get_ydata())]
    if values and min(values) > 0 and max(values) / min(values) > LOG_ABOVE:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        panel.yaxis.set_major_formatter(FuncFormatter(tick))
        panel.yaxis.set_minor_formatter(NullFormatter())


def tick(value: float, position: int | None = None) -> str:
    """Label of a tick, without exponent."""
    return f"{value:.10g}"


def legend(figure: Figure, panel: Axes) -> None:
    """One legend above the panels."""
    figure.legend(*panel.get_legend_handles_labels(), loc="outside upper left", ncols=3)


def _model_colours(models: Iterable[str]) -> dict[str, str]:
    colours = dict(MODEL_COLOURS)
    for model in sorted(set(models) - set(colours)):
        colours[model] = OTHER_COLOURS[(len(colours) - len(MODEL_COLOURS)) % len(OTHER_COLOURS)]
    return colours


def _mixtures(curve: Curve) -> dict[str, tuple[list[int], list[str], list[list[float]]]]:
    """Table -> (epochs, operations, weights of the operations averaged over the table's edges)."""
    tables: dict[str, tuple[list[int], list[str], list[list[float]]]] = {}
    for event in curve.epochs:
        noted = event.get("statistics") or {}
        for table, rows in (noted.get("mixture") or {}).items():
            names = (noted.get("ops") or {}).get(table) or [str(k) for k in range(len(rows[0]))]
            epochs, _, weights = tables.setdefault(table, ([], names, []))
            epochs.append(event["epoch"])
            weights.append([statistics.fmean(column) for column in zip(*rows, strict=True)])
    return tables


def _proxy_pairs(candidates: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """(source, proxy score, mean validation after short training) of every candidate that has both."""
    found: dict[tuple[str, str], dict[bool, list[float]]] = defaultdict(lambda: {True: [], False: []})
    for candidate in candidates:
        value = candidate.get("value")
        if value is not None and math.isfinite(value):
            key = (candidate.get("source", ""), candidate.get("genotype_id", ""))
            found[key][bool(candidate.get("is_proxy"))].append(value)
    return [
        (source, statistics.fmean(values[True]), statistics.fmean(values[False]))
        for (source, _), values in found.items()
        if values[True] and values[False]
    ]


def svg_text(figure: Figure) -> str:
    """The figure as SVG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    save(figure, buffer)
    return buffer.getvalue().decode()
