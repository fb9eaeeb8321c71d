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
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from scipy import stats

from lmnas.core.contracts import Objective

# A page may exchange these for its own light and dark colours; those of models and operations suit both.
INK = "#1b2733"
FAINT = "#66737f"
GRID = "#d9dee3"
PAPER = "#fefefe"
INPUT_FILL = "#cfe3f7"
OUTPUT_FILL = "#d3edda"

MODEL_COLOURS = {"searched": "#2f7fd1", "random": "#d9822b", "lstm": "#3d9a6d"}
OTHER_COLOURS = ("#a05ec9", "#c2527a", "#8a8f2d", "#4aa3b0", "#7d6b5d")
OP_COLOURS = (*MODEL_COLOURS.values(), *OTHER_COLOURS)

TABLE_COLOUR = MODEL_COLOURS["searched"]

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
        figure, axes = _panels([title for _, title in panels])
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
        _legend(figure, axes[0])
    return _svg(figure)


def search_curves(curves: Sequence[Curve]) -> list[tuple[str, str]]:
    """How the strategy's choice moved: entropy, reward and the mean weight of every operation, by epoch.

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
                figure, (panel,) = _panels([present[0][1]])
                for colour, (key, label) in zip(OP_COLOURS, present, strict=False):
                    for i, curve in enumerate(curves):
                        _line(panel, *curve.points(key), colour, None if i else label)
                if len(present) > 1:
                    _legend(figure, panel)
            figures.append((caption, _svg(figure)))
    for table in dict.fromkeys(name for curve in curves for name in _mixtures(curve)):
        with matplotlib.rc_context(STYLE):
            figure, (panel,) = _panels(["mean weight over edges"])
            for i, curve in enumerate(curves):
                epochs, ops, weights = _mixtures(curve).get(table, ([], [], []))
                for k, op in enumerate(ops):
                    colour = OP_COLOURS[k % len(OP_COLOURS)]
                    _line(panel, epochs, [row[k] for row in weights], colour, None if i else op)
            panel.set_ylim(bottom=0)
            _legend(figure, panel)
        figures.append((f"Weights of the operations, table {table!r}", _svg(figure)))
    for curve in curves:
        figures += pruning_figures(curve)
    return figures


def pruning_figures(curve: Curve) -> list[tuple[str, str]]:
    """What a sparse prior did in one search: its variances over the updates, and which switches live at the end.

    Returns:
        (caption, SVG text) pairs, two a table; empty where the records hold no updates of a prior.
    """
    noted: Mapping[str, Any] = next(
        (event["statistics"] for event in reversed(curve.epochs) if (event.get("statistics") or {}).get("updates")), {}
    )
    figures = []
    for table, ops in (noted.get("operations") or {}).items():
        updates = [update["tables"][table] for update in noted["updates"]]
        last = {key: np.array(updates[-1][key], dtype=float) for key in ("gamma", "w2h", "alive")}
        gammas = np.array([np.ones_like(last["gamma"]), *(update["gamma"] for update in updates)])
        n_alive, n = int(last["alive"].sum()), last["alive"].size
        about = f"search {curve.seed}, lambda {noted['lambda']:g}, table {table!r}"
        with matplotlib.rc_context(STYLE):
            figure, (panel,) = _panels(["prior variance of each switch"], "update")
            for i, k in np.ndindex(*last["alive"].shape):
                alive = bool(last["alive"][i, k])
                colour = OP_COLOURS[k % len(OP_COLOURS)] if alive else FAINT
                panel.plot(gammas[:, i, k], color=colour, alpha=0.9 if alive else 0.25, linewidth=1.0 if alive else 0.5)
            for k, op in enumerate(ops):
                panel.plot([], [], color=OP_COLOURS[k % len(OP_COLOURS)], label=op)
            panel.axhline(noted["threshold"], color=INK, linestyle=":", label="threshold")
            panel.plot([], [], color=FAINT, linewidth=0.5, label="pruned")
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter(FuncFormatter(_tick))
            panel.yaxis.set_minor_formatter(NullFormatter())
            panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            _legend(figure, panel)
        figures.append((f"Prior variances, {n_alive} of {n} switches alive at the end; {about}", _svg(figure)))
        figures.append(
            (f"Switches that live (marked), and r^2 H / lambda of all; {about}", _heat_maps(noted, table, last))
        )
    return figures


def _heat_maps(noted: Mapping[str, Any], table: str, last: Mapping[str, Any]) -> str:
    """Edges down, operations across: prior variance and w^2 h, logarithmic, a dot on what lives."""
    edges, ops = noted["edges"][table], noted["operations"][table]
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(3.8, 1.6 + 0.14 * len(edges)), layout="constrained")
        for panel, key, title in zip(
            figure.subplots(1, 2, sharey=True), ("gamma", "w2h"), ("gamma", "r^2 H / lambda"), strict=True
        ):
            values = np.log10(np.clip(last[key], 1e-6, None))
            mesh = panel.pcolormesh(
                values, cmap="viridis", vmin=-6, vmax=max(1.0, float(values.max())), edgecolors="none"
            )
            rows, columns = np.nonzero(last["alive"])
            panel.plot(columns + 0.5, rows + 0.5, "o", color=PAPER, markeredgecolor=INK, markersize=3.5)
            panel.set_title(title)
            panel.set_xticks(np.arange(len(ops)) + 0.5, ops, rotation=90)
            figure.colorbar(mesh, ax=panel, location="bottom", label="log10")
            panel.set_yticks(np.arange(len(edges)) + 0.5, [f"{source} to {node}" for node, source in edges], fontsize=6)
        panel.invert_yaxis()
    return _svg(figure)


def candidate_plot(candidates: Sequence[Mapping[str, Any]], objective: Objective) -> tuple[str, str] | None:
    """Whether the proxy told anything: its score against validation after short training, a dot per candidate.

    Returns:
        (caption, SVG text); None with fewer than two candidates that have both.
    """
    pairs = _proxy_pairs(candidates)
    if len(pairs) < 2:
        return None
    with matplotlib.rc_context(STYLE):
        figure, (panel,) = _panels([f"validation {objective.name} after short training"], "proxy score")
        colours = _model_colours(source for source, _, _ in pairs)
        for source in dict.fromkeys(source for source, _, _ in pairs):
            points = [(proxy, value) for name, proxy, value in pairs if name == source]
            panel.plot(*zip(*points, strict=True), "o", color=colours[source], label=source, markersize=5, alpha=0.85)
        panel.xaxis.set_major_locator(MaxNLocator(5))
        _legend(figure, panel)
    caption = f"Proxy score against short training, {len(pairs)} candidates"
    tau = stats.kendalltau([proxy for _, proxy, _ in pairs], [value for _, _, value in pairs]).statistic
    if len(pairs) > 2 and math.isfinite(tau):
        caption += f"; Kendall's tau {tau:.2f} (1: same order, 0: unrelated)"
    return caption, _svg(figure)


LARGEST_TABLE = 30
"""Classes that a confusion table is drawn of; a larger one cannot be read."""


def confusion_table(names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """SVG of a (K, K) table: rows are the true classes and are shaded by their share, the counts written in."""
    table = np.asarray(counts, dtype=float)
    k = len(table)
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    with matplotlib.rc_context(STYLE):
        side = max(3.8, 0.9 + 0.36 * k)
        figure = Figure(figsize=(side, side), layout="constrained")
        panel = figure.subplots()
        # the root brings the few mistakes out beside the diagonal
        shades = LinearSegmentedColormap.from_list(
            "shades", [(*to_rgb(TABLE_COLOUR), 0.0), (*to_rgb(TABLE_COLOUR), 0.9)]
        )
        panel.pcolormesh(np.arange(k + 1), np.arange(k + 1), np.sqrt(share), cmap=shades, vmin=0, vmax=1)
        for true in range(k):
            for taken in range(k):
                if table[true, taken]:
                    count = f"{int(table[true, taken])}"
                    panel.text(taken + 0.5, true + 0.5, count, ha="center", va="center", fontsize=FONT_SIZE - 2)
        panel.set_xticks(np.arange(k) + 0.5, names, rotation=90)
        panel.set_yticks(np.arange(k) + 0.5, names)
        panel.set_xlim(0, k)
        panel.set_ylim(k, 0)
        panel.set_xlabel("predicted")
        panel.set_ylabel("true")
        panel.grid(False)
        panel.tick_params(length=0)
    return _svg(figure)


def reliability(bins: Sequence[Sequence[Any]]) -> str:
    """SVG of accuracy by confidence, a bar for each bin of (images, mean confidence, accuracy), and of the images that
    fall into it; on the diagonal confidence is right."""
    edges = np.linspace(0, 1, len(bins) + 1)
    middle, width = (edges[:-1] + edges[1:]) / 2, 1 / len(bins)
    with matplotlib.rc_context(STYLE):
        figure, (above, below) = _panels(["accuracy", "images"], "confidence")
        accuracy = [0.0 if accurate is None else accurate for _, _, accurate in bins]
        above.bar(middle, accuracy, 0.9 * width, color=TABLE_COLOUR, alpha=0.6)
        above.plot([0, 1], [0, 1], color=FAINT, linestyle="--")
        known = [(sure, accurate) for _, sure, accurate in bins if sure is not None]
        above.plot(*zip(*known, strict=True), "o", color=INK, markersize=3)
        above.set_ylim(0, 1)
        below.bar(middle, [count for count, _, _ in bins], 0.9 * width, color=FAINT, alpha=0.6)
        below.set_xlim(0, 1)
    return _svg(figure)


# ----------------------------------------------------------------------------------------------------------- parts


def _panels(titles: Sequence[str], x_label: str = "epoch") -> tuple[Figure, list[Axes]]:
    """Panels above each other with one x-axis, narrow enough for a phone."""
    figure = Figure(figsize=(3.8, 0.8 + 1.8 * len(titles)), layout="constrained")
    axes = list(figure.subplots(len(titles), 1, sharex=True, squeeze=False)[:, 0])
    for panel, title in zip(axes, titles, strict=True):
        panel.set_title(title)
        panel.yaxis.set_major_formatter(FuncFormatter(_tick))
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
        panel.yaxis.set_major_formatter(FuncFormatter(_tick))
        panel.yaxis.set_minor_formatter(NullFormatter())


def _tick(value: float, position: int | None = None) -> str:
    return f"{value:.10g}"


def _legend(figure: Figure, panel: Axes) -> None:
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


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    save(figure, buffer)
    return buffer.getvalue().decode()
