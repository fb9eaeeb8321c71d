"""Panels by name: every registered one draws its entry, and an unknown entry is data."""

import json

import pytest
from searches import pruned

from lmnas.core import registry
from lmnas.core.errors import UserError
from lmnas.report.blocks import Context, Data, Figure, Panel, Table, known, rendered
from lmnas.report.panels.classification import LARGEST_TABLE

BINS = [[0, None, None], [40, 0.6, 0.5], [60, 0.9, 0.95]]
COUNTS = [[30, 7, 0], [3, 25, 1], [0, 0, 34]]


ENTRIES = {"confusion": COUNTS, "calibration": {"error": 0.07, "bins": BINS}, "updates": pruned()["updates"]}
"""An entry for each panel; a new panel needs one."""


@pytest.mark.parametrize("name", registry.names("panel"))
def test_every_panel_makes_blocks_and_repeats(name):
    context = Context({**pruned(), "classes": ["a", "b", "c"]}, 3, "sentences")
    panel = registry.component("panel", name)(ENTRIES[name], context)
    assert isinstance(panel, Panel) and panel.blocks
    assert panel == registry.component("panel", name)(ENTRIES[name], context)


def test_a_confusion_table_is_drawn_and_listed():
    """7 of 37 of the first class and 4 of 29 of the second are wrong."""
    context = Context({"classes": ["cat", "dog", "ship"]}, 0, "clips")
    picture, mistakes, classes = rendered({"classes": ["cat", "dog", "ship"], "confusion": COUNTS}, context)
    assert isinstance(picture, Figure) and ">cat</text>" in picture.svg
    assert mistakes.columns == ["class", "taken for", "clips"]
    assert mistakes.rows == [["cat", "dog", "7"], ["dog", "cat", "3"], ["dog", "ship", "1"]]
    assert classes.folded and classes.rows == [
        ["cat", "37", "18.9 %"],
        ["dog", "29", "13.8 %"],
        ["ship", "34", "0.0 %"],
    ]


def test_a_table_too_large_to_read_is_not_drawn():
    k = LARGEST_TABLE + 1
    counts = [[int(i == j) for j in range(k)] for i in range(k)]
    (classes,) = rendered({"confusion": counts}, Context({}, 0, "clips"))  # no mistakes to list, and no names
    assert isinstance(classes, Table) and classes.rows[-1] == ["30", "1", "0.0 %"]


def test_calibration_names_what_it_counts():
    (figure,) = rendered({"calibration": {"error": 0.07, "bins": BINS}}, Context({}, 0, "clips"))
    assert figure.caption == "Confidence against accuracy; expected calibration error 7.00 % over 3 bins"
    assert ">clips</text>" in figure.svg
    assert rendered({"calibration": {}}, Context({}, 0, "clips")) == []


def test_an_entry_without_a_panel_is_data():
    """Folded in a report; left out where only known entries are asked for. Another package's panel may be missing."""
    with pytest.raises(UserError, match="is unknown"):
        registry.component("panel", "bleu")
    entries = {"bleu": {"4": 0.3}, "nothing": None, "zero": 0}
    blocks = rendered(entries, Context(entries, 0, "sentences"))
    assert blocks == [Data("bleu", json.dumps({"4": 0.3}, indent=2)), Data("zero", "0")]
    assert known(entries, Context(entries, 0, "sentences")) == []


def test_a_panel_of_another_package(monkeypatch):
    monkeypatch.setitem(registry.COMPONENTS["panel"], "gone", "no_such_package:draw")
    assert rendered({"gone": [1]}, Context({}, 0, "tokens")) == [Data("gone", "[\n  1\n]")]


def test_a_sparse_prior_is_drawn():
    """Variances by update and which switches live."""
    context = Context(pruned(), 3, "tokens")
    variances, switches = known({"updates": pruned()["updates"]}, context)
    about = "search 3, lambda 0.005, table 'nodes'"
    assert variances.caption == f"Prior variances, 1 of 4 switches alive at the end; {about}"
    assert switches.caption == f"Switches that live (marked), and r^2 H / lambda of all; {about}"
    for text in ("tanh", "relu", "threshold", "update"):
        assert f">{text}</text>" in variances.svg
    assert "mathdefault" not in variances.svg
    for text in ("0 to 1", "0 to 2", "gamma"):
        assert f">{text}</text>" in switches.svg
    assert known({"updates": []}, context) == []
