"""Pictures of cells: what was asked for is there, nothing overlaps, equal diagrams give equal bytes."""

import io
import random
from itertools import combinations

import pytest

from lmnas.core.contracts import Diagram
from lmnas.report.diagram import ARROW, _lay_out, draw


def recurrent(inputs, name="cell"):
    """A cell whose node i + 1 reads `inputs[i]` and whose output reads all nodes but the first."""
    n = len(inputs)
    nodes = [("x", "x[t]", "input"), ("h", "h[t-1]", "input"), *((str(i), f"{i}: tanh", "op") for i in range(n + 1))]
    edges = [("x", "0", ""), ("h", "0", ""), *((str(j), str(i), "") for i, j in enumerate(inputs, 1))]
    edges += [(str(i), "out", "") for i in range(1, n + 1)]
    return Diagram(name, (*nodes, ("out", "h[t]", "output")), tuple(edges))


def graph(n, seed):
    """A random graph with labels on some of its connections."""
    rng = random.Random(seed)
    nodes = [("x", "x", "input"), *((str(i), f"op {i}", "op") for i in range(n)), ("out", "h", "output")]
    keys = [key for key, _, _ in nodes]
    edges = [(keys[rng.randrange(i)], keys[i], rng.choice(["", "w"])) for i in range(1, n + 2) for _ in range(2)]
    return Diagram("graph", tuple(nodes), tuple(edges))


DIAGRAMS = {
    "darts-v2": recurrent([0, 1, 1, 1, 2, 5, 3, 5]),
    "chain": recurrent(range(12)),
    "star": recurrent([0] * 12),
    "graph-12": graph(12, 0),
    "graph-25": graph(25, 1),
    "alone": Diagram("", (("x", "x", "input"),), ()),
}


def svg(diagram):
    buffer = io.BytesIO()
    draw(diagram, buffer)
    return buffer.getvalue().decode()


@pytest.mark.parametrize("diagram", DIAGRAMS.values(), ids=DIAGRAMS)
def test_every_label_is_drawn_and_bytes_repeat(diagram):
    text = svg(diagram)
    assert all(f">{label}</text>" in text for _, label, _ in diagram.nodes)
    assert text == svg(diagram)
    assert "<dc:date>" not in text


@pytest.mark.parametrize("diagram", DIAGRAMS.values(), ids=DIAGRAMS)
def test_nothing_overlaps(diagram):
    """Boxes and lanes of a column stand apart, columns too, and connections bend only between columns."""
    layout = _lay_out(diagram)
    for first, second in combinations(layout.y, 2):
        if layout.columns[first] == layout.columns[second]:
            apart = (layout.heights.get(first, 0) + layout.heights.get(second, 0)) / 2
            assert abs(layout.y[first] - layout.y[second]) > apart
    columns = sorted(set(layout.columns.values()))
    for source, target in layout.links:
        left, right = (columns.index(layout.columns[end]) for end in (source, target))
        assert right == left + 1
        assert layout.columns[target][0] > layout.columns[source][1] + ARROW[0]


def test_png(tmp_path):
    draw(DIAGRAMS["darts-v2"], tmp_path / "cell.png", "png")
    assert (tmp_path / "cell.png").read_bytes().startswith(b"\x89PNG")


def test_names_are_neither_markup_nor_formulas():
    text = svg(Diagram("a <b> & $x$", (("x", "<i> $y$", "input"),), ()))
    assert "a &lt;b&gt; &amp; $x$" in text
    assert "&lt;i&gt; $y$" in text


def test_refusals():
    nodes = (("a", "a", "op"), ("b", "b", "op"))
    with pytest.raises(ValueError, match="cycle"):
        svg(Diagram("loop", nodes, (("a", "b", ""), ("b", "a", ""))))
    with pytest.raises(ValueError, match="no node 'c'"):
        svg(Diagram("loose", nodes, (("a", "c", ""),)))
    with pytest.raises(ValueError, match="no nodes"):
        svg(Diagram("empty", (), ()))
