"""Panel of a search with a sparse prior: its variances over the updates, and which switches live at the end."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from lmnas.report.blocks import Block, Context, Figure, Panel
from lmnas.report.plots import FAINT, INK, OP_COLOURS, PAPER, STYLE, legend, stacked, svg_text, tick


def updates(found: Sequence[Mapping[str, Any]], context: Context) -> Panel:
    """Two pictures a table; `operations`, `edges`, `lambda` and `threshold` stand beside the updates."""
    noted = context.beside
    blocks: list[Block] = []
    for table, ops in (noted.get("operations") or {}).items():
        rows = [update["tables"][table] for update in found]
        last = {key: np.array(rows[-1][key], dtype=float) for key in ("gamma", "w2h", "alive")}
        n_alive, n = int(last["alive"].sum()), last["alive"].size
        about = f"search {context.seed}, lambda {noted['lambda']:g}, table {table!r}"
        gammas = np.array([np.ones_like(last["gamma"]), *(row["gamma"] for row in rows)])
        svg = _variances(gammas, last["alive"], ops, noted["threshold"])
        blocks.append(Figure(svg, f"Prior variances, {n_alive} of {n} switches alive at the end; {about}"))
        svg = _heat_maps(noted, table, last)
        blocks.append(Figure(svg, f"Switches that live (marked), and r^2 H / lambda of all; {about}"))
    return Panel(blocks)


def _variances(gammas: np.ndarray, alive: np.ndarray, ops: Sequence[str], threshold: float) -> str:
    """A line for each of the (E, K) switches through its (U,) variances; dead ones are grey."""
    with matplotlib.rc_context(STYLE):
        figure, (panel,) = stacked(["prior variance of each switch"], "update")
        for i, k in np.ndindex(*alive.shape):
            lives = bool(alive[i, k])
            colour = OP_COLOURS[k % len(OP_COLOURS)] if lives else FAINT
            panel.plot(gammas[:, i, k], color=colour, alpha=0.9 if lives else 0.25, linewidth=1.0 if lives else 0.5)
        for k, op in enumerate(ops):
            panel.plot([], [], color=OP_COLOURS[k % len(OP_COLOURS)], label=op)
        panel.axhline(threshold, color=INK, linestyle=":", label="threshold")
        panel.plot([], [], color=FAINT, linewidth=0.5, label="pruned")
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(FuncFormatter(tick))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        legend(figure, panel)
    return svg_text(figure)


def _heat_maps(noted: Mapping[str, Any], table: str, last: Mapping[str, Any]) -> str:
    """Edges down, operations across: prior variance and w^2 h, logarithmic, a dot on what lives."""
    edges, ops = noted["edges"][table], noted["operations"][table]
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Drawing(figsize=(3.8, 1.6 + 0.14 * len(edges)), layout="constrained")
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
    return svg_text(figure)
