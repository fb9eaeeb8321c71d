"""Curves as SVG text, and the verdict's table in its three forms."""

from searches import epoch

from lmnas.core.contracts import Objective
from lmnas.report import plots, tables
from lmnas.report.plots import Curve
from lmnas.report.verdict import summarise

PERPLEXITY = Objective("perplexity", "per word", "minimize")


def test_learning_curves_show_every_model_once_and_repeat():
    events = [epoch(1, 900.0), {"event": "diverged", "step": 1, "cause": "nan"}, epoch(2, 120.0, averaging=True)]
    curves = [Curve("train", model, seed, events) for model in ("searched", "lstm", "gru") for seed in range(2)]
    svg = plots.learning_curves(curves, PERPLEXITY)
    assert svg == plots.learning_curves(curves, PERPLEXITY)
    for text in ("searched", "lstm", "gru", "validation perplexity", "training loss (nats)"):
        assert svg.count(f">{text}</text>") == 1
    assert plots.MODEL_COLOURS["searched"] in svg and plots.OTHER_COLOURS[1] in svg


def test_nothing_to_draw_is_none():
    assert plots.learning_curves([], PERPLEXITY) is None
    assert plots.learning_curves([Curve("train", "lstm", 0, [{"event": "started"}])], PERPLEXITY) is None
    assert plots.search_curves([Curve("search", "searched", 0, [epoch(1, statistics={"entropy": None})])]) == []
    assert plots.candidate_plot([], PERPLEXITY) is None


def test_values_that_are_not_finite_are_left_out():
    curve = Curve("train", "lstm", 0, [epoch(1, 5.0), epoch(2, float("nan")), epoch(3, None)])
    assert curve.points("valid") == ([1], [5.0])


def test_search_curves_average_a_table_over_its_edges():
    statistics = {"entropy": 1.0, "mixture": {"edges": [[0.5, 0.5], [0.1, 0.9]]}, "ops": {"edges": ["tanh", "relu"]}}
    curve = Curve("search", "searched", 0, [epoch(1, statistics=statistics), epoch(2, statistics=statistics)])
    captions = [caption for caption, _ in plots.search_curves([curve])]
    assert captions == ["How undecided the search is", "Weights of the operations, table 'edges'"]
    assert plots._mixtures(curve) == {"edges": ([1, 2], ["tanh", "relu"], [[0.3, 0.7], [0.3, 0.7]])}


def test_reward_and_baseline():
    curve = Curve("search", "searched", 0, [epoch(1, statistics={"entropy": 2.0, "reward": 0.5, "baseline": 0.4})])
    caption, svg = plots.search_curves([curve])[1]
    assert caption == "What the proposals earned"
    assert ">its moving average</text>" in svg


def test_candidates_pair_proxy_with_short_training():
    """Three candidates in the same order by both scores: tau is 1. A failed one has no dot."""
    rows = []
    for name, proxy, value in (("a", 1.0, 10.0), ("b", 2.0, 20.0), ("c", 3.0, 30.0), ("d", 4.0, None)):
        rows.append({"genotype_id": name, "source": "searched", "value": proxy, "is_proxy": True})
        rows.append({"genotype_id": name, "source": "searched", "value": value, "is_proxy": False})
    caption, svg = plots.candidate_plot(rows, PERPLEXITY)
    assert "3 candidates; Kendall's tau 1.00" in caption
    assert ">proxy score</text>" in svg


def verdict():
    values = {"searched": [112.1, 112.3, 112.5], "[bold]lstm": [120.0, None]}
    scores = [
        {"model": model, "genotype_id": model, "split": "test", "value": value, "seed": seed, "n_parameters": 22957000}
        | {"seconds": 61.25, "tokens_per_second": 181234.5}
        for model, row in values.items()
        for seed, value in enumerate(row)
    ]
    return summarise(scores, PERPLEXITY)


def test_rows():
    """112.3 +- 4.3027 * 0.2 / sqrt(3)."""
    assert tables.rows(verdict()) == [
        ["searched", "112.3", "111.8 to 112.8", "3", "22,957,000", "181,234", "61.2"],
        ["[bold]lstm", "120.0", "-", "1 (1 diverged)", "22,957,000", "181,234", "61.2"],
    ]


def test_plain_text_is_aligned():
    lines = tables.plain_text(verdict(), PERPLEXITY).splitlines()
    assert lines[0].startswith("model       test perplexity, mean   95 % interval")
    assert len(set(map(len, lines))) == 1
