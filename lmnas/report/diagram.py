"""Pictures of cells: a layered graph, inputs on the left, output on the right.

The layout follows Sugiyama et al., 1981: every box goes into the column of its longest path from an input; a connection
that skips columns is led through a lane in each of them; the order within columns is chosen for few crossings; heights
are pulled towards the neighbours'. Lanes and the labels of connections hold their place in a column as boxes do, so
nothing overlaps. Long connections out of one box share their lanes, and so do those into an output.
"""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from typing import IO, Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon
from matplotlib.path import Path
from matplotlib.textpath import text_to_path
from scipy.optimize import isotonic_regression

from lmnas.core.contracts import Diagram
from lmnas.report.plots import FAINT, FONT_SIZE, INK, INPUT_FILL, OUTPUT_FILL, PAPER, save

Vertex = str | tuple[str, int]
"""A box (or a connection's label) by key, or a lane: (key of the end that its connections share, column)."""
Link = tuple[Vertex, Vertex]
"""A piece of a connection between neighbouring columns."""

# All lengths in inches.
LINE_HEIGHT = 0.17
COLUMN_GAP = 0.42
ROW_GAP = 0.2
LANE_GAP = 0.13
MARGIN = 0.1
TITLE_HEIGHT = 0.3
ARROW = (0.085, 0.04)

FILL = {"input": INPUT_FILL, "op": PAPER, "output": OUTPUT_FILL}
LABEL = "label"  # kind of the vertex that a connection's label becomes
SWEEPS = 24
PULL = (4.0, 0.2, 1.0)  # of a connection between two lanes, a lane and a box, two boxes: lanes should run straight


def draw(
    diagram: Diagram, path_or_buffer: str | PathLike[str] | IO[bytes], format: Literal["svg", "png"] = "svg"
) -> None:
    """Draw a cell; a newline in a label starts a second line. Equal diagrams give equal bytes.

    Raises:
        ValueError: the diagram has no nodes, or its connections form a cycle or name a node that is not there.
    """
    layout = _lay_out(diagram)
    left, right, bottom, top = layout.extent
    right = max(right, left + _width(diagram.title, bold=True))
    x_range = (left - MARGIN, right + MARGIN)
    y_range = (bottom - MARGIN, top + MARGIN + (TITLE_HEIGHT if diagram.title else 0.0))
    figure = Figure(figsize=(x_range[1] - x_range[0], y_range[1] - y_range[0]))
    axes = figure.add_axes((0, 0, 1, 1), xlim=x_range, ylim=y_range)
    axes.set_axis_off()
    axes.text(left, top + 0.15, diagram.title, size=FONT_SIZE, weight="bold", color=INK, parse_math=False)
    _draw_connections(axes, layout)
    _draw_nodes(axes, layout)
    save(figure, path_or_buffer, format)


def _draw_connections(axes: Axes, layout: "_Layout") -> None:
    def line(points: Sequence[tuple[float, float]], codes: Sequence[Any] | None = None) -> None:
        axes.add_patch(PathPatch(Path(points, codes), facecolor="none", edgecolor=FAINT, linewidth=1.0, zorder=1))

    for source, target in layout.links:
        y1, y2 = layout.y[source], layout.y[target]
        start, end = layout.spans[source][1], layout.spans[target][0]
        if target in layout.nodes and layout.nodes[target][1] != LABEL:
            tip, back = end, end - ARROW[0]
            corners = [(tip, y2), (back, y2 - ARROW[1]), (back, y2 + ARROW[1])]
            axes.add_patch(Polygon(corners, facecolor=FAINT, linewidth=0, zorder=1))
            end = back
        # Level to the column's edge, bending only between columns, level again to the end.
        edge1, edge2 = layout.columns[source][1], min(layout.columns[target][0] - ARROW[0], end)
        middle = (edge1 + edge2) / 2
        points = [(start, y1), (edge1, y1), (middle, y1), (middle, y2), (edge2, y2), (end, y2)]
        line(points, [Path.MOVETO, Path.LINETO, *[Path.CURVE4] * 3, Path.LINETO])
    for vertex in layout.y:
        if vertex not in layout.nodes:  # a lane crosses its column
            line([(x, layout.y[vertex]) for x in layout.spans[vertex]])


def _draw_nodes(axes: Axes, layout: "_Layout") -> None:
    for key, (label, kind) in layout.nodes.items():
        (left, right), y, height = layout.spans[key], layout.y[key], layout.heights[key]
        if kind != LABEL:
            corner, style = (left, y - height / 2), "round,pad=0,rounding_size=0.07"
            box = FancyBboxPatch(corner, right - left, height, boxstyle=style, linewidth=1.0, zorder=2)
            box.set(facecolor=FILL.get(kind, PAPER), edgecolor=INK)
            axes.add_patch(box)
        lines = label.split("\n")
        for i, text in enumerate(lines):
            baseline = y + LINE_HEIGHT * ((len(lines) - 1) / 2 - i) - 0.045
            weight = "bold" if i == 0 and len(lines) > 1 else "normal"
            shown = axes.text((left + right) / 2, baseline, text, size=FONT_SIZE, weight=weight, color=INK)
            shown.set(ha="center", parse_math=False, zorder=3)


def _width(line: str, bold: bool = False) -> float:
    """Width of a line of text, with a little room: an SVG's reader may use another font."""
    font = FontProperties(family="DejaVu Sans", size=FONT_SIZE, weight="bold" if bold else "normal")
    return 1.06 * text_to_path.get_text_width_height_descent(line, font, False)[0] / 72


def _size(label: str, kind: str) -> tuple[float, float]:
    lines = label.split("\n")
    width = max(_width(line, bold=len(lines) > 1) for line in lines)
    height = LINE_HEIGHT * len(lines)
    return (width + 0.08, height) if kind == LABEL else (max(width + 0.2, 0.4), height + 0.15)


# ---------------------------------------------------------------------------------------------------------- layout


@dataclass(frozen=True)
class _Layout:
    """Positions of the parts of a drawing.

    Attributes:
        nodes: key -> (label, kind), labels of connections among them.
        links: pieces of connections, each to be drawn once.
        heights: of the boxes; lanes have none.
        y: centre of every vertex.
        spans: x at which connections arrive at a vertex and leave it; a lane spans its column.
        columns: left and right edge of every vertex's column.
    """

    nodes: dict[str, tuple[str, str]]
    links: list[Link]
    heights: dict[Vertex, float]
    y: dict[Vertex, float]
    spans: dict[Vertex, tuple[float, float]]
    columns: dict[Vertex, tuple[float, float]]

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom, top."""
        low = min(y - self.heights.get(vertex, 0.0) / 2 for vertex, y in self.y.items())
        high = max(y + self.heights.get(vertex, 0.0) / 2 for vertex, y in self.y.items())
        return (
            min(left for left, _ in self.columns.values()),
            max(right for _, right in self.columns.values()),
            low,
            high,
        )


def _lay_out(diagram: Diagram) -> _Layout:
    nodes, edges = _label_vertices(diagram)
    if not nodes:
        raise ValueError(f"{diagram.title!r} has no nodes to draw")
    widths: dict[Vertex, float] = {key: _size(*node)[0] for key, node in nodes.items()}
    heights: dict[Vertex, float] = {key: _size(*node)[1] for key, node in nodes.items()}
    layers, links = _lanes(nodes, edges, _columns(nodes, edges))
    _order(layers, links)
    y = _heights(layers, links, heights)

    gaps = dict.fromkeys(y, COLUMN_GAP)
    for source, target in links:  # room for steep connections
        gaps[source] = max(gaps[source], COLUMN_GAP + 0.08 * abs(y[source] - y[target]))
    left = 0.0
    spans, columns = {}, {}
    for layer in layers:
        column_width = max(widths.get(vertex, 0.0) for vertex in layer)
        for vertex in layer:
            indent = (column_width - widths.get(vertex, column_width)) / 2
            spans[vertex] = (left + indent, left + column_width - indent)
            columns[vertex] = (left, left + column_width)
        left += column_width + max(gaps[vertex] for vertex in layer)
    return _Layout(nodes, links, heights, y, spans, columns)


def _label_vertices(diagram: Diagram) -> tuple[dict[str, tuple[str, str]], list[tuple[str, str]]]:
    """Nodes key -> (label, kind) and plain edges; a connection with a label passes through a vertex that shows it."""
    nodes = {key: (label, kind) for key, label, kind in diagram.nodes}
    edges = []
    for number, (source, target, label) in enumerate(diagram.edges):
        for end in (source, target):
            if end not in nodes:
                raise ValueError(f"edge {source!r} -> {target!r} of {diagram.title!r}: there is no node {end!r}")
        if label:
            middle = f"{LABEL} {number}"
            nodes[middle] = (label, LABEL)
            edges += [(source, middle), (middle, target)]
        else:
            edges.append((source, target))
    return nodes, edges


def _columns(nodes: Mapping[str, tuple[str, str]], edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Length of the longest path to every node; outputs in the last column."""
    columns = dict.fromkeys(nodes, 0)
    for _ in nodes:
        late = [(source, target) for source, target in edges if columns[target] <= columns[source]]
        for source, target in late:
            columns[target] = max(columns[target], columns[source] + 1)
    if any(columns[target] <= columns[source] for source, target in edges):
        raise ValueError(f"the connections form a cycle: {edges}")
    last = max(columns.values(), default=0)
    reading = {source for source, _ in edges}
    return {
        key: last if nodes[key][1] == "output" and key not in reading else column for key, column in columns.items()
    }


def _lanes(
    nodes: Mapping[str, tuple[str, str]], edges: Sequence[tuple[str, str]], columns: Mapping[str, int]
) -> tuple[list[list[Vertex]], list[Link]]:
    """The vertices of each column, and the pieces between neighbouring columns."""
    layers: list[list[Vertex]] = [[] for _ in range(max(columns.values(), default=0) + 1)]
    for key, column in columns.items():
        layers[column].append(key)
    links: dict[Link, None] = {}  # an ordered set: connections that share a lane share its pieces
    for source, target in edges:
        shared = target if nodes[target][1] == "output" else source
        lanes = [(shared, column) for column in range(columns[source] + 1, columns[target])]
        for lane in lanes:
            if lane not in layers[lane[1]]:
                layers[lane[1]].append(lane)
        route: list[Vertex] = [source, *lanes, target]
        links.update(dict.fromkeys(pairwise(route)))
    return layers, list(links)


def _order(layers: list[list[Vertex]], links: Sequence[Link]) -> None:
    """Reorder every column in place for few crossings: barycentre sweeps there and back, then swaps of neighbours."""
    before, after = _neighbours(links)
    best, fewest = [list(layer) for layer in layers], _crossings(layers, links)
    for sweep in range(SWEEPS):
        forward = sweep % 2 == 0
        sides = before if forward else after
        for layer in layers if forward else layers[::-1]:
            place = {vertex: float(i) for other in layers for i, vertex in enumerate(other)}
            wanted = {v: statistics.fmean(place[n] for n in sides[v]) if sides[v] else place[v] for v in layer}
            layer.sort(key=wanted.__getitem__)
        for layer in layers:
            _swap(layer, layers, before, after)
        if (crossings := _crossings(layers, links)) < fewest:
            best, fewest = [list(layer) for layer in layers], crossings
    layers[:] = best


def _swap(
    layer: list[Vertex],
    layers: Sequence[Sequence[Vertex]],
    before: Mapping[Vertex, Sequence[Vertex]],
    after: Mapping[Vertex, Sequence[Vertex]],
) -> None:
    place = {vertex: i for other in layers for i, vertex in enumerate(other)}

    def crossed(upper: Vertex, lower: Vertex) -> int:
        return sum(place[a] > place[b] for side in (before, after) for a in side[upper] for b in side[lower])

    for i in range(len(layer) - 1):
        if crossed(layer[i + 1], layer[i]) < crossed(layer[i], layer[i + 1]):
            layer[i], layer[i + 1] = layer[i + 1], layer[i]


def _neighbours(links: Sequence[Link]) -> tuple[dict[Vertex, list[Vertex]], dict[Vertex, list[Vertex]]]:
    before: dict[Vertex, list[Vertex]] = defaultdict(list)
    after: dict[Vertex, list[Vertex]] = defaultdict(list)
    for source, target in links:
        before[target].append(source)
        after[source].append(target)
    return before, after


def _crossings(layers: Sequence[Sequence[Vertex]], links: Sequence[Link]) -> int:
    place = {vertex: (column, i) for column, layer in enumerate(layers) for i, vertex in enumerate(layer)}
    ends = [(*place[source], place[target][1]) for source, target in links]
    return sum(c == d and (a - b) * (x - y) < 0 for i, (c, a, x) in enumerate(ends) for d, b, y in ends[:i])


def _heights(
    layers: Sequence[Sequence[Vertex]], links: Sequence[Link], sizes: Mapping[Vertex, float]
) -> dict[Vertex, float]:
    """Height of every vertex: the neighbours' mean, as near as order and distances allow (isotonic regression)."""
    before, after = _neighbours(links)
    offsets: dict[Vertex, float] = {}  # least distance from the top of the column
    for layer in layers:
        offsets[layer[0]] = 0.0
        for above, vertex in pairwise(layer):
            gap = ROW_GAP if above in sizes and vertex in sizes else LANE_GAP
            offsets[vertex] = offsets[above] + (sizes.get(above, 0.0) + sizes.get(vertex, 0.0)) / 2 + gap
    depths = {vertex: offsets[vertex] - offsets[layer[-1]] / 2 for layer in layers for vertex in layer}
    for sweep in range(4 * SWEEPS):
        for layer in layers if sweep % 2 == 0 else layers[::-1]:
            wanted, weights = [], []
            for vertex in layer:
                near = [*before[vertex], *after[vertex]] or [vertex]
                pulls = [PULL[(vertex in sizes) + (other in sizes)] for other in near]
                wanted.append(np.average([depths[other] for other in near], weights=pulls))
                weights.append(sum(pulls))
            base = np.array([offsets[vertex] for vertex in layer])
            fitted = isotonic_regression(np.array(wanted) - base, weights=weights).x + base
            depths.update(zip(layer, fitted.tolist(), strict=True))
    return {vertex: -depth for vertex, depth in depths.items()}
