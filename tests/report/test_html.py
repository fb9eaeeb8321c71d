"""The report: complete, escaped, offline, and there from the first moment of a run."""

import json
import re
from html.parser import HTMLParser

import pytest
from searches import epoch, pruned

from lmnas.core.contracts import Objective
from lmnas.report.html import _read_curves, write_report
from lmnas.report.verdict import Wording, summarise

OBJECTIVE = {"name": "perplexity", "unit": "per word", "direction": "minimize"}
EVIL = "<script>alert('&')</script>"
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Checker(HTMLParser):
    """Balanced tags, unique ids, no scripts, no attribute that loads something."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "img", "iframe")
        for key, value in attrs:
            assert key not in ("src", "srcset") and not key.startswith("on")
            if key in ("href", "xlink:href"):
                assert value.startswith(("#", "data:image/png;"))
            if key == "id":
                self.ids.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check(path):
    page = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    assert "http" not in page
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", page))
    return checker.text


def write_events(run_dir, job, events, tail=""):
    folder = run_dir / "jobs" / job
    folder.mkdir(parents=True)
    lines = [json.dumps({"seq": i, **event}) + "\n" for i, event in enumerate(events, 1)]
    (folder / "events.jsonl").write_text("".join(lines) + tail)


@pytest.fixture
def run_dir(tmp_path):
    """A finished run with a hostile name, a torn event log, a failed candidate and a diverged seed."""
    mixture = {"entropy": 1.1, "mixture": {"cell": [[0.4, 0.6]]}, "ops": {"cell": ["tanh", "relu"]}}
    epochs = [{"event": "epoch", "epoch": e, "train_loss": 6 / e, "valid": 300.0 / e} for e in (1, 2, 3)]
    write_events(tmp_path, "search-0", [event | {"valid": None, "statistics": mixture} for event in epochs])
    write_events(tmp_path, "select-abc-0", epochs)
    write_events(tmp_path, "train-searched-0", epochs, tail='{"seq": 4, "ev')
    write_events(tmp_path, "train-lstm-0", epochs)
    scores = [
        {"model": model, "genotype_id": None, "split": "test", "value": value, "seed": seed, "n_parameters": 5}
        | {"n_predictions": 82429, "stage": "test"}
        for model, values in {"searched": [112.2, 112.4], "lstm": [120.1, None]}.items()
        for seed, value in enumerate(values)
    ]
    candidate = {"source": "searched", "search_seed": 0, "genotype_id": "abc", "split": "valid", "failure": None}
    results = {
        "format": 1,
        "name": EVIL,
        "objective": OBJECTIVE,
        "data": {"name": EVIL, "fingerprint": "f00d", "tokens": {"train": 929589}, "vocabulary": 10000},
        "environment": {"device": EVIL, "gpus": 0},
        "genotype": {"format": 1, "space": "recurrent-cell", "choices": {EVIL: 1}, "id": "abc"},
        "diagram": {
            "title": EVIL,
            "nodes": [["x", "x[t]", "input"], ["0", EVIL, "op"], ["o", "h[t]", "output"]],
            "edges": [["x", "0", ""], ["0", "o", EVIL]],
        },
        "candidates": [
            candidate | {"stage": "search", "value": 404.25, "is_proxy": True},
            candidate | {"stage": "select", "value": 150.5, "is_proxy": False},
            candidate | {"stage": "search", "value": None, "is_proxy": True, "failure": EVIL, "genotype_id": "def"},
        ],
        "scores": scores,
        "verdict": summarise(scores, Objective(**OBJECTIVE), wording=Wording("cell", {"lstm": "LSTM"})),
        "costs": {"search_seconds": 3725.0, "select_seconds": 65.0},
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "recipe.yaml").write_text(f"name: {EVIL}\n")
    return tmp_path


def test_finished_run(run_dir):
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    text = check(path)
    for wanted in (
        json.loads((run_dir / "results.json").read_text())["verdict"]["sentence"],
        "1 of 2 runs of the LSTM diverged",
        "Perplexity, per word; lower is better.",
        "training loss (nats)",
        "entropy (nats)",
        "404.2 proxy",
        "929,589",
        "1 h 2 min",
        f"failed: {EVIL}",
        f"name: {EVIL}",
        'load_genotype("genotype.json")',
    ):
        assert wanted in text
    assert text.index("beats the LSTM") < text.index("The cell")


def of_images(run_dir):
    """The run's records, as those of an image task."""
    results = json.loads((run_dir / "results.json").read_text())
    objective = {"name": "error", "unit": "%", "direction": "minimize", "worst": 100.0, "items": "images"}
    bins = [[0, None, None], [40, 0.6, 0.5], [60, 0.9, 0.95]]
    results |= {
        "objective": objective,
        "data": {"name": "mine", "images": {"train": 4321, "test": 100}, "classes": 3},
        "details": {
            "model": "searched",
            "seed": 1,
            "classes": ["cat", EVIL, "ship"],
            "confusion": [[30, 7, 0], [3, 25, 1], [0, 0, 34]],
            "calibration": {"error": 0.07, "bins": bins},
        },
        "verdict": summarise(results["scores"], Objective(**objective)),
    }
    (run_dir / "results.json").write_text(json.dumps(results))
    return results


def test_what_a_classifier_predicts(run_dir):
    of_images(run_dir)
    text = check(write_report(run_dir))
    for wanted in (
        "by the model that is handed over (seed 1)",
        "True classes against predicted",
        "expected calibration error 7.00 % over 3 bins",
        "Most frequent mistakes",
        "images/s",
        "4,321",
        "18.9 %",  # 7 of 37 cats
    ):
        assert wanted in text, wanted
    mistakes = text[text.index("Most frequent mistakes") :]
    assert mistakes.index("7") < mistakes.index("3") and "tokens" not in text


def test_a_table_of_too_many_classes_is_listed_alone(run_dir):
    results = of_images(run_dir)
    k = 40
    table = [[2 if i == j else int(j == i + 1) for j in range(k)] for i in range(k)]
    results["details"] |= {"classes": [f"c{i}" for i in range(k)], "confusion": table}
    (run_dir / "results.json").write_text(json.dumps(results))
    text = check(write_report(run_dir))
    assert "True classes against predicted" not in text and re.search(r"c0\s*c1\s*1", text)


def test_details_without_a_panel_are_shown_as_data(run_dir):
    results = json.loads((run_dir / "results.json").read_text())
    results["details"] = {"model": "searched", "seed": 4, "bleu": {EVIL: 31.5}, "confusion": []}
    (run_dir / "results.json").write_text(json.dumps(results))
    text = check(write_report(run_dir))
    assert "by the model that is handed over (seed 4)" in text and "bleu" in text and "31.5" in text
    assert "confusion" not in text


def test_the_noun_is_the_records(run_dir):
    results = json.loads((run_dir / "results.json").read_text()) | {"noun": "decoder"}
    (run_dir / "results.json").write_text(json.dumps(results))
    text = check(write_report(run_dir))
    assert "The decoder" in text and "The cell" not in text


def test_a_search_is_drawn_from_the_last_epoch_with_updates(run_dir):
    events = [epoch(1, statistics=pruned()), epoch(2, statistics={"updates": []})]
    write_events(run_dir, "search-7", events)
    text = check(write_report(run_dir))
    assert "Prior variances, 1 of 4 switches alive at the end; search 7, lambda 0.005, table 'nodes'" in text


@pytest.mark.parametrize(
    "name, expected",
    [
        ("search-2", ("search", "searched", 2)),
        ("search-0-trial-5", ("search", "searched", 0)),
        ("select-abc-3", ("select", "random", 3)),
        ("select-unknown-3", ("select", "searched", 3)),
        ("train-my-lstm-2-1", ("train", "my-lstm-2", 1)),
        ("search-0-other-5", None),
        ("test-lstm-0", None),
    ],
)
def test_curves_are_those_of_the_jobs_name(tmp_path, name, expected):
    write_events(tmp_path, name, [{"event": "epoch", "epoch": 1}])
    results = {"candidates": [{"genotype_id": "abc", "source": "random"}]}
    found = [(curve.stage, curve.model, curve.seed) for curve in _read_curves(tmp_path / "jobs", results)]
    assert found == ([expected] if expected else [])


def test_names_cannot_become_markup(run_dir):
    page = write_report(run_dir).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_same_records_same_bytes(run_dir):
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first
    assert [path.name for path in run_dir.iterdir() if "report" in path.name] == ["report.html"]


def test_empty_run(tmp_path):
    text = check(write_report(tmp_path))
    assert "Just started. Still to come: search, selection, training, test, verdict." in text
    assert "The search has not chosen one yet." in text


@pytest.mark.parametrize(
    "missing", ["objective", "data", "environment", "genotype", "diagram", "candidates", "scores", "verdict", "costs"]
)
@pytest.mark.parametrize("empty", [True, False], ids=["empty", "absent"])
def test_any_part_may_be_missing(run_dir, missing, empty):
    results = json.loads((run_dir / "results.json").read_text())
    results.pop(missing)
    if empty:
        results[missing] = None
    (run_dir / "results.json").write_text(json.dumps(results))
    check(write_report(run_dir))


def test_unfinished_run_says_what_is_to_come(run_dir):
    results = json.loads((run_dir / "results.json").read_text())
    (run_dir / "results.json").write_text(json.dumps(results | {"verdict": None, "scores": []}))
    text = check(write_report(run_dir))
    assert "This run is not finished: it has reached the training stage. Still to come: test, verdict." in text


def test_broken_results_are_named(run_dir):
    (run_dir / "results.json").write_text('{"format": 1, "na')
    assert "results.json cannot be read" in check(write_report(run_dir))


def test_thousands_of_candidates_are_cut_to_the_best(run_dir):
    row = {"stage": "search", "source": "random", "split": "valid", "is_proxy": True, "failure": None}
    candidates = [row | {"genotype_id": f"g{i}", "value": 1000.0 - i} for i in range(1000)]
    results = json.loads((run_dir / "results.json").read_text()) | {"candidates": candidates}
    (run_dir / "results.json").write_text(json.dumps(results))
    text = check(write_report(run_dir))
    assert "and 970 more" in text
    assert "g999" in text
    assert "g5\n" not in text
