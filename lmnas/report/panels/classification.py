"""Panels of a classifier: its confusion table, and its confidence against its accuracy."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure as Drawing

from lmnas.report.blocks import Block, Context, Figure, Panel, Table
from lmnas.report.plots import FAINT, FONT_SIZE, INK, STYLE, TABLE_COLOUR, stacked, svg_text

CONFUSED = 8
"""Pairs of classes listed as the most frequent mistakes."""
LARGEST_TABLE = 30
"""Classes that a confusion table is drawn of; a larger one cannot be read."""


def confusion(counts: Sequence[Sequence[int]], context: Context) -> Panel:
    """The table of true classes against predicted ones, the most frequent mistakes, the error by class.

    Args:
        counts: (K, K), rows are the true classes; `classes` beside it are their names.
    """
    names = context.beside.get("classes") or [str(k) for k in range(len(counts))]
    blocks: list[Block] = []
    if len(counts) <= LARGEST_TABLE:
        blocks.append(Figure(_confusion_table(names, counts), "True classes against predicted", wide=True))
    found = sorted(
        ((count, true, taken) for true, row in enumerate(counts) for taken, count in enumerate(row) if true != taken),
        key=lambda entry: (-entry[0], entry[1:]),
    )
    rows = [[names[true], names[taken], str(count)] for count, true, taken in found[:CONFUSED] if count]
    if rows:
        columns = ["class", "taken for", context.items]
        blocks.append(Table(columns, rows, numbers=(2,), title="Most frequent mistakes"))
    wrong = [
        [name, f"{sum(row):,}", _share(sum(row) - row[i], sum(row))]
        for i, (name, row) in enumerate(zip(names, counts, strict=True))
    ]
    blocks.append(Table(["class", context.items, "error"], wrong, title="By class", folded=True))
    return Panel(blocks, used=("classes",))


def calibration(measured: Mapping[str, Any], context: Context) -> Panel:
    """Accuracy by confidence, from `bins` of (predictions, mean confidence, accuracy) and the expected `error`."""
    bins = measured.get("bins")
    if not bins:
        return Panel([])
    caption = (
        f"Confidence against accuracy; expected calibration error {100 * measured['error']:.2f} % over {len(bins)} bins"
    )
    return Panel([Figure(_reliability(bins, context.items), caption)])


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _confusion_table(names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """SVG of a (K, K) table: rows are the true classes and are shaded by their share, the counts written in."""
    table = np.asarray(counts, dtype=float)
    k = len(table)
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    with matplotlib.rc_context(STYLE):
        side = max(3.8, 0.9 + 0.36 * k)
        figure = Drawing(figsize=(side, side), layout="constrained")
        panel = figure.subplots()
        # the root brings the few mistakes out beside the diagonal
        shades = LinearSegmentedColormap.from_list(
            "shades", [(*to_rgb(TABLE_COLOUR), 0.0), (*to_rgb(TABLE_COLOUR), 0.9)]
        )
        panel.pcolormesh(np.arange(k + 1), np.arange(k + 1), np.sqrt(share), cmap=shades, vmin=0, vmax=1)
        for true, taken in zip(*np.nonzero(table), strict=True):
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
    return svg_text(figure)


def _reliability(bins: Sequence[Sequence[Any]], items: str) -> str:
    """SVG of accuracy by confidence, a bar for each bin, and of the predictions that fall into it; on the diagonal
    confidence is right."""
    edges = np.linspace(0, 1, len(bins) + 1)
    middle, width = (edges[:-1] + edges[1:]) / 2, 1 / len(bins)
    with matplotlib.rc_context(STYLE):
        figure, (above, below) = stacked(["accuracy", items], "confidence")
        accuracy = [0.0 if accurate is None else accurate for _, _, accurate in bins]
        above.bar(middle, accuracy, 0.9 * width, color=TABLE_COLOUR, alpha=0.6)
        above.plot([0, 1], [0, 1], color=FAINT, linestyle="--")
        known = [(sure, accurate) for _, sure, accurate in bins if sure is not None]
        above.plot(*zip(*known, strict=True), "o", color=INK, markersize=3)
        above.set_ylim(0, 1)
        below.bar(middle, [count for count, _, _ in bins], 0.9 * width, color=FAINT, alpha=0.6)
        below.set_xlim(0, 1)
    return svg_text(figure)
