"""The verdict against numbers worked by hand and a published example, and every case where there is no evidence."""

import math

import pytest

from lmnas.core import registry
from lmnas.core.contracts import Objective
from lmnas.report import verdict as verdicts
from lmnas.report.verdict import Wording, format_value

PERPLEXITY = Objective("perplexity", "per word", "minimize")
CELL = Wording("cell", {"lstm": "LSTM"})
IMAGES = Wording("cell", {"resnet": "ResNet"})
ACCURACY = Objective("accuracy", "of tokens", "maximize")


def summarise(records, objective, wording=CELL):
    return verdicts.summarise(records, objective, wording=wording)


def scores(**models):
    """Test scores of each model, one seed per value; a model's genotype is its name."""
    return [
        {
            "model": model,
            "genotype_id": f"id-{model}",
            "split": "test",
            "value": value,
            "seed": seed,
            "n_parameters": 1000,
            "n_predictions": 10,
            "stage": "test",
        }
        for model, values in models.items()
        for seed, value in enumerate(values)
    ]


def against(verdict, name):
    return next(row for row in verdict["comparisons"] if row["against"] == name)


def test_worked_by_hand():
    """Means 2 and 6, variances 1 and 4, n = 3: t = -4 / sqrt(5/3) = -3.098, df = (5/3)^2 / ((1/9 + 16/9) / 2) = 2.941.

    The p-value lies between those of the t-table at df 2 (0.0902) and df 3 (0.0534), near the latter: 0.0548.
    """
    verdict = summarise(scores(searched=[1, 2, 3], lstm=[4, 6, 8]), PERPLEXITY)
    row = against(verdict, "lstm")
    assert row["difference"] == -4
    assert row["p_value"] == pytest.approx(0.0548, abs=1e-4)
    assert row["conclusion"] == "no evidence"


def test_images_want_a_residual_network():
    """The hand-made baseline is named as what it is, and missed where it was not run."""
    error = Objective("error", "%", "minimize", worst=100.0, items="images")
    verdict = summarise(scores(searched=[5.0, 5.2], resnet=[8.0, 8.1]), error, IMAGES)
    assert "The searched cell beats the ResNet (test error 5.100 against 8.050" in verdict["sentence"]
    assert "random-search cell was not run" in verdict["sentence"] and "LSTM" not in verdict["sentence"]
    alone = summarise(scores(searched=[5.0]), error, IMAGES)["sentence"]
    assert "The ResNet was not run." in alone and "LSTM" not in alone


def test_the_noun_is_the_spaces():
    decoder = Wording("decoder", {})
    sentence = summarise(scores(searched=[1.0, 2.0], random=[3.0, 4.1]), PERPLEXITY, decoder)["sentence"]
    assert "the searched decoder beats the random-search decoder (test perplexity 1.500" in sentence
    assert "cell" not in sentence and "LSTM" not in sentence
    assert summarise([], PERPLEXITY, decoder)["sentence"].startswith("No verdict yet: the searched decoder has")


@pytest.mark.parametrize(
    "space, task, expected",
    [
        ("recurrent-cell", "language-modeling", CELL),
        ("recurrent-sparse", "language-modeling", CELL),
        ("lstm", "language-modeling", CELL),
        ("darts-conv", "image-classification", IMAGES),
        ("enas-macro", "image-classification", Wording("network", {"resnet": "ResNet"})),
    ],
)
def test_words_come_from_the_components(space, task, expected):
    assert Wording.of(registry.component("space", space), registry.component("task", task)) == expected


def test_a_space_that_is_not_installed_is_no_baseline(monkeypatch):
    monkeypatch.setitem(registry.COMPONENTS["space"], "gone", "no_such_package:Gone")
    spaces, tasks = (registry.component(*pair) for pair in (("space", "lstm"), ("task", "language-modeling")))
    assert Wording.of(spaces, tasks) == CELL


def test_published_example():
    """Student's sleep data as in R's manual: `t.test(extra ~ group, data = sleep)` gives t = -1.8608, p = 0.07939."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    row = against(summarise(scores(searched=first, lstm=second), PERPLEXITY), "lstm")
    assert row["p_value"] == pytest.approx(0.07939, abs=5e-6)


def test_interval_is_students():
    """Mean 2, deviation 1, n = 3: 2 +- 4.3027 / sqrt(3)."""
    row = summarise(scores(searched=[1, 2, 3]), PERPLEXITY)["models"][0]
    assert (row["mean"], row["n"]) == (2, 3)
    assert (row["low"], row["high"]) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-4)


def test_sentence():
    verdict = summarise(
        scores(searched=[112.1, 112.3, 112.5], random=[111.9, 112.9, 113.9], lstm=[119.9, 120.1, 120.3]), PERPLEXITY
    )
    assert verdict["sentence"] == (
        "The searched cell beats the LSTM (test perplexity 112.3 against 120.1, p < 0.001); no evidence that it beats "
        "the random-search cell (112.3 against 112.9, p = 0.409). Welch's t-test, two-sided, level 0.05, "
        "n = 3 seeds each."
    )
    assert [row["model"] for row in verdict["models"]] == ["searched", "random", "lstm"]
    assert [row["conclusion"] for row in verdict["comparisons"]] == ["better", "no evidence"]


@pytest.mark.parametrize(("objective", "conclusion"), [(PERPLEXITY, "worse"), (ACCURACY, "better")])
def test_direction(objective, conclusion):
    verdict = summarise(scores(searched=[0.9, 0.91, 0.92], lstm=[0.5, 0.51, 0.52]), objective)
    assert against(verdict, "lstm")["conclusion"] == conclusion
    words = {"worse": "is worse than the LSTM", "better": "beats the LSTM"}[conclusion]
    assert words in verdict["sentence"]


def test_one_seed_each_allows_no_test():
    verdict = summarise(scores(searched=[1.0], lstm=[2.0], random=[3.0, 4.0]), PERPLEXITY)
    assert "one seed each allows no test" in verdict["sentence"]
    assert "a single seed on one side allows no test" in verdict["sentence"]
    assert "Welch" not in verdict["sentence"]
    assert verdict["models"][0]["low"] is None
    assert against(verdict, "lstm")["p_value"] is None


@pytest.mark.parametrize("baseline", [[5.1, 5.1, 5.1], [6.1, 6.1, 6.1]])
def test_no_spread_is_no_evidence(baseline):
    row = against(summarise(scores(searched=[5.1, 5.1, 5.1], lstm=baseline), PERPLEXITY), "lstm")
    assert (row["p_value"], row["conclusion"]) == (None, "no evidence")
    assert "do not vary" in row["reason"]


def test_spread_on_one_side_only():
    """t = 2 / sqrt(1/3) with 2 degrees of freedom: 3.4641; p = 1 - t / sqrt(2 + t^2) = 0.0742."""
    row = against(summarise(scores(searched=[4, 4, 4], lstm=[5, 6, 7]), PERPLEXITY), "lstm")
    assert row["p_value"] == pytest.approx(1 - 3.4641 / math.sqrt(2 + 12), abs=1e-4)


def test_missing_baselines_are_named():
    assert "The LSTM was not run." in summarise(scores(searched=[1, 2], random=[1, 3]), PERPLEXITY)["sentence"]
    sentence = summarise(scores(searched=[1, 2]), PERPLEXITY)["sentence"]
    assert "no baseline to compare with" in sentence
    assert summarise([], PERPLEXITY)["sentence"].startswith("No verdict yet")


def test_diverged_runs_are_left_out_counted_and_said():
    verdict = summarise(scores(searched=[1.0, 2.0, 3.0], lstm=[4.0, None, float("nan"), 6.0]), PERPLEXITY)
    row = verdict["models"][1]
    assert (row["mean"], row["n"], row["diverged"]) == (5.0, 2, 2)
    assert "2 of 4 runs of the LSTM diverged and are left out of the mean." in verdict["sentence"]
    assert "n = 3 (searched), 2 (lstm) seeds" in verdict["sentence"]


def test_everything_diverged():
    nan = float("nan")
    assert (
        summarise(scores(searched=[nan, nan], lstm=[1.0]), PERPLEXITY)["sentence"]
        == "No verdict: all 2 runs of the searched cell diverged."
    )
    verdict = summarise(scores(searched=[1.0, 2.0], lstm=[nan]), PERPLEXITY)
    assert verdict["comparisons"] == []
    assert "The only run of the LSTM diverged." in verdict["sentence"]


def test_same_architecture_won_twice():
    records = scores(searched=[1.0, 1.1, 1.2], random=[2.0, 2.1, 2.2])
    for record in records:
        record["genotype_id"] = "abc"
    verdict = summarise(records, PERPLEXITY)
    assert "are the same architecture" in verdict["sentence"]
    assert (verdict["comparisons"][0]["p_value"], verdict["comparisons"][0]["conclusion"]) == (None, "no evidence")


def test_only_the_test_split_counts():
    records = scores(searched=[1.0, 2.0])
    records[0]["split"] = "valid"
    assert summarise(records, PERPLEXITY)["models"][0]["n"] == 1


@pytest.mark.parametrize(
    ("value", "text"), [(112.345, "112.3"), (0.81234, "0.8123"), (12345.6, "12346"), (0, "0.000"), (None, "-")]
)
def test_values_keep_four_digits(value, text):
    assert format_value(value) == text
