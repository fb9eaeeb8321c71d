"""`lmnas bench curvature`: what it reports about estimates whose quality is known, and the command itself."""

import json

import pytest
import torch

from lmnas.cli.bench import curvature
from lmnas.cli.main import main
from lmnas.nn.curvature import METHODS, diagonal
from lmnas.nn.curvature.models import Method
from lmnas.nn.kernels import using
from lmnas.tasks.language_modeling import LanguageModeling

SMALL = ["bench", "curvature", "--small", "--rounds", "1", "--threads", "1", "--kernel", "reference"]


@pytest.fixture(autouse=True)
def kernel():
    with using():
        yield


def test_agreement_by_hand():
    """Ranks (1, 2, 3, 4) against (2, 1, 3, 4): ρ = 1 - 6 · 2 / (4 · 15) = 0.8; ratios 2, 0.5, 1, 1."""
    exact = [-1.0, 2.0, 3.0, 4.0]
    found = curvature.agreement([[exact, [2.0, 1.0, 3.0, 4.0]], [exact, exact]])
    assert found["rank_correlations"] == pytest.approx([0.8, 1.0])
    assert found["rank_correlation_median"] == pytest.approx(0.9)
    assert found["ratio_quartiles"] == pytest.approx([0.875, 1.0, 1.0])  # of -2, 0.5 and six ones
    assert found["exact_below_zero"] == 0.25


def test_training_lowers_the_loss_and_moves_the_switches():
    sizes = curvature.Sizes.small()
    task = LanguageModeling(data="pydoc", max_vocabulary=sizes.vocabulary)
    losses = []
    for steps in (0, 60):
        model, batches, mixture = curvature.network(task, sizes, steps, 0)
        assert len(batches) == curvature.N_BATCHES and all(batch.state is not None for batch in batches)
        with torch.no_grad():
            losses.append(sum(model(batch, {}, mixture, False)[0].item() for batch in batches))
        # n_nodes 2, four operations: a node's shares sum to one where all switches are one
        sums = mixture["nodes"].sum(1)
        assert torch.allclose(sums, torch.tensor([1.0, 0.5, 0.5], dtype=sums.dtype)) == (steps == 0)
    assert losses[1] < losses[0] - 0.5


def test_untied_is_exact_for_one_step():
    sizes = curvature.Sizes(2, 4, 3, 1, 40, 5)
    task = LanguageModeling(data="pydoc", max_vocabulary=sizes.vocabulary)
    model, batches, mixture = curvature.network(task, sizes, 5, 0)
    exact = diagonal("exact", model, batches, mixture, 0)["nodes"]
    assert torch.allclose(curvature.untied(model, batches, mixture), exact, rtol=1e-10) and exact.abs().max() > 0


def test_answer_text_and_picture(tmp_path, capsys, monkeypatch):
    """A method that gives the exact values twice is in full agreement, at a ratio of two."""

    def double(*arguments):
        return {name: 2 * table for name, table in METHODS["exact"].run(*arguments).items()}

    monkeypatch.setitem(METHODS, "double", Method(double, "twice", False))
    arguments = [*SMALL, "--seeds", "2", "--methods", "double,recursion"]
    assert main([*arguments, "--json", "--out", str(tmp_path)]) == 0
    document = json.loads(capsys.readouterr().out)
    rows = {row["method"]: row for row in document["rows"]}
    assert list(rows) == ["exact", "double", "recursion", "untied"]
    for state in ("untrained", "trained"):
        assert rows["double"][state]["rank_correlations"] == pytest.approx([1.0, 1.0])
        assert rows["double"][state]["ratio_quartiles"] == pytest.approx([2.0, 2.0, 2.0])
        assert len(rows["recursion"][state]["rank_correlations"]) == 2
    for name in ("exact", "double", "recursion"):
        assert rows[name]["passes"]["reference"] > 0 and rows[name]["timings"] == 1
    assert len(document["points"]["double"]) == 2 and len(document["points"]["double"][0][0]) == 12
    assert (tmp_path / "curvature.png").read_bytes().startswith(b"\x89PNG")
    assert document["pictures"] == [str(tmp_path / "curvature.png")]
    lines = curvature.text(document).splitlines()
    assert lines[0].split()[:3] == ["method", "untrained", "trained"]
    assert lines[2].split()[:4] == ["double", "1.000", "1.000", "1.000"] and "2.00 to 2.00" in lines[2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods", "recurson"], "--methods: method 'recurson' is unknown. Did you mean 'recursion'?"),
        (["--methods", ","], "--methods: expected names separated by commas"),
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
    ],
)
def test_refusals(arguments, message, capsys):
    assert main(["bench", "curvature", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and message in err and err.count("\n") == 1
