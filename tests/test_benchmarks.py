"""The scripts of `benchmarks/` run; what they measure here means nothing."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from scripts import SCRIPTS, script

from lmnas.core import registry
from lmnas.core.contracts import Objective
from lmnas.nn.sparsity import priors as evidence


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu])])
def test_gpu(device, tmp_path):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(SCRIPTS / "gpu.py"), "--device", device, "--small"]
    subprocess.run([*command, "--rounds", "1", "--out", str(out)], check=True, timeout=300)
    document = json.loads(out.read_text())
    assert set(document["rows"]) == {
        "search-weight",
        "search-first-order",
        "search-second-order",
        "retrain",
        "enas-shared",
    }
    for row in document["rows"].values():
        assert {"eager", "lstm"} <= set(row["ways"])
        assert all(way["median"] > 0 and len(way["milliseconds"]) == 1 for way in row["ways"].values())


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_connections_are_found(seed):
    """Little noise, two nodes: reweighting leaves the planted support, the lasso alone keeps more beside it."""
    recovery = script("sparse_recovery")
    cell = recovery.plant(seed, n_nodes=2, width=4, time_steps=3, batch=8, noise=0.05)
    planted = cell.planted != 0
    n = cell.targets["train"].numel()
    none = evidence.independent(cell.switches).first_penalty()
    free = torch.ones_like(planted)
    start = recovery.minimise(cell, torch.full_like(cell.planted, 0.1), none, 0.0, free)
    scores, support = recovery.bayes(cell, start, 10 * cell.noise**2 / n)
    assert torch.equal(support, planted) and torch.equal(scores > 0, planted)
    lasso = recovery.minimise(
        cell, start, none, 0.02 * recovery.linearised(cell, 0 * start)[0].abs().max().item(), free
    )
    assert (lasso[planted] != 0).all() and (lasso[~planted] != 0).any()
    assert recovery.chosen(cell, [(start.abs(), free), (scores, support)])[1] is support


def test_slopes_and_curvature_of_the_script_are_those_of_autograd():
    recovery = script("sparse_recovery")
    cell = recovery.plant(2, n_nodes=2, width=3, time_steps=2, batch=2)
    w = 0.3 * torch.ones_like(cell.planted)
    gradient, matrix = recovery.linearised(cell, w)
    jacobian = torch.autograd.functional.jacobian(lambda v: cell.predict["train"](v).flatten(), w)
    torch.testing.assert_close(matrix, jacobian.t() @ jacobian / len(jacobian), rtol=1e-8, atol=1e-10)
    leaf = w.clone().requires_grad_()
    expected = torch.autograd.grad(recovery.loss(cell, leaf), leaf)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)


def test_planted_cells_have_no_dangling_switch():
    recovery = script("sparse_recovery")
    for seed in range(20):
        cell = recovery.plant(seed, width=2, batch=2)
        kept = (cell.planted != 0).tolist()
        assert evidence.sweep(cell.switches, kept) == kept and 1 <= sum(kept) <= 8


@pytest.mark.slow
def test_a_sweep_of_lambda(cache, tmp_path):
    """One that works and one so strong that nothing is left, which is a row with its reason; one figure."""
    (tmp_path / "text.txt").write_text(tiny.text(150))
    document = tiny.recipe(
        tmp_path / "text.txt",
        space={"name": "recurrent-cell", "n_nodes": 2, "batch_norm": "none"},
        strategy={"name": "bayes", "strength": 0.001, "learning_rate": 200.0, "curvature_batches": 1},
    )
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(document))
    sweep = script("bayes_lambda")
    arguments = [str(tmp_path / "tiny.yaml"), "--lambdas", "0.00001,10", "--out", str(tmp_path / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bayes_lambda.py", *arguments, "--set", "train.seeds=1"])
        sweep.main()
    first, last = json.loads((tmp_path / "out" / "lambda.json").read_text())
    assert first["lambda"] == 1e-5 and 0 < first["kept"] == first["alive"][0] <= 12 and first["mean"] > 1
    assert "every switch died" in last["failure"]
    assert (tmp_path / "out" / "lambda.png").stat().st_size > 1000


def test_the_front_of_size_and_value():
    sweep = script("bayes_lambda")
    rows = [
        {"n_parameters": n, "mean": mean}
        for n, mean in ((1, 50.0), (2, 60.0), (3, 40.0), (3, 45.0), (4, 40.0), (5, 39.0))
    ]
    kept = [(row["n_parameters"], row["mean"]) for row in sweep.front(rows, Objective("perplexity", "", "minimize"))]
    assert kept == [(1, 50.0), (3, 40.0), (5, 39.0)]


def test_what_searches_cost(cache, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(tiny.text(150))
    for name, estimator in (("one", "standalone"), ("two", "shared")):
        document = tiny.recipe(
            tmp_path / "text.txt", name=name, estimator={"name": estimator, "training": tiny.training()}
        )
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(document))
    arguments = [str(tmp_path / f"{name}.yaml") for name in ("one", "two")]
    clock = iter([100.0, 104.0, 200.0, 206.0])
    search_cost = script("search_cost")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["search_cost.py", *arguments, "--out", str(tmp_path / "out")])
        patch.setattr(search_cost, "time", SimpleNamespace(process_time=lambda: next(clock)))
        search_cost.main()
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["cpu_seconds"], first["ratio"], second["cpu_seconds"], second["ratio"]) == (4.0, 1.0, 6.0, 1.5)
    assert first["candidates"] == second["candidates"] == 2
    assert not list((tmp_path / "out").glob("*/jobs/train-*"))


# ------------------------------------------------------------------------------------------------------- same results


@pytest.mark.parametrize(
    "old, new, place",
    [
        ({"a": [1.0, {"b": "c"}]}, {"a": [1.0, {"b": "c", "further": 2}]}, None),
        ({"value": math.nan}, {"value": math.nan}, None),
        ({"seconds": 1.0, "failure": "diverged"}, {"seconds": 2.0, "failure": "it diverged"}, None),
        ({"a": {"value": 0.1}}, {"a": {"value": 0.1 + 2**-56}}, "a > value"),
        ({"a": [1, 2]}, {"a": [1]}, "a: 2 items became 1"),
        ({"a": 1}, {}, "a: missing"),
        ({"failure": None}, {"failure": "diverged"}, "failure"),
        ({"a": 0.0}, {"a": -0.0}, "a: 0.0 became -0.0"),
    ],
)
def test_what_counts_as_a_difference(old, new, place):
    found = script("same_results").difference(old, new)
    assert found is None if place is None else found.startswith(place)


def test_cases_of_the_comparison():
    """Every component of recipes is in some case, and no two cases have one name."""
    same = script("same_results")
    taken = same.cases()
    assert len({case.name for case in taken}) == len(taken)
    text = json.dumps([case.recipe for case in taken])
    for kind in ("space", "strategy", "estimator", "task"):
        # no task takes bodies that look both ways; they are scored
        assert [name for name in registry.names(kind) if f'"name": "{name}"' not in text] in ([], ["flexibert"])


@pytest.mark.slow
def test_two_checkouts_are_compared_bit_by_bit(tmp_path):
    """The same one twice, then one whose seeds are others; what the first gave is kept."""
    package = Path(registry.__file__).parents[1]
    for name in ("one", "other"):
        shutil.copytree(package, tmp_path / name / "lmnas", ignore=shutil.ignore_patterns("__pycache__"))

    def compared():
        command = [sys.executable, str(SCRIPTS / "same_results.py"), str(tmp_path / "one"), str(tmp_path / "other")]
        options = ["--keep", str(tmp_path / "kept"), "--only", "text/lstm/random/hidden", "--json"]
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
        return done.returncode, json.loads(done.stdout)

    assert compared() == (0, {"cases": 1, "equal": True, "difference": None})
    with open(tmp_path / "other" / "lmnas" / "core" / "seeds.py", "a") as file:
        file.write("\n\n_derive = derive\n\n\ndef derive(seed, *purpose):\n    return _derive(seed + 1, *purpose)\n")
    code, answer = compared()
    assert code == 1 and answer["cases"] == 1 and not answer["equal"]
    assert answer["difference"].startswith("text/lstm/random/hidden-covariance: ")


# --------------------------------------------------------------------------------------------------------- the house


@pytest.fixture
def house(tmp_path):
    """A house of two rooms with one of everything that is counted."""
    (tmp_path / "lmnas" / "low").mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_low.py").write_text("import lmnas\n")
    for name, source in {
        "__init__": "from lmnas.high import top\n",
        "high": "from lmnas.low import one\nimport lmnas.low.registry\n\n\ndef top():\n    return one\n",
        "low/__init__": "",
        "low/registry": 'COMPONENTS: dict[str, dict[str, str]] = {"space": {"odd": "lmnas.low.odd:Odd"}}\n',
        "low/odd": 'class Odd:\n    name = "odd"\n',
        "low/one": (
            "from lmnas.low.odd import Odd\nfrom lmnas.high import top  # type: ignore\n\n\n"
            "def switch(space: dict[str, Any], kind):\n"
            '    if space["kind"] == "a" or space.kind in kinds or kind == "b":\n'
            '        return hasattr(space, "stack") or getattr(space, kind)\n'
            '    return space == "odd"\n\n\n'
            "def long():\n" + "    pass\n" * 60
        ),
    }.items():
        (tmp_path / "lmnas" / f"{name}.py").write_text(source)
    return tmp_path


def test_what_the_house_script_counts(house):
    survey = script("house").survey(house)
    texts = {key: value if isinstance(value, int) else [text for *_, text in value] for key, value in survey.items()}
    assert texts == {
        "files of the package": 6,
        "lines of the package": 81,
        "files of tests": 1,
        "lines of tests": 1,
        "names under lmnas/": 2,
        "import arrows between them": 2,
        "circles among them": ["high low"],
        "circles among files": ["lmnas.high lmnas.low.one"],
        "switches on a kind": ["space['kind'] == 'a'", "space.kind in kinds", "kind == 'b'"],
        "names of strangers": ["import Odd", "'odd'"],
        "optional members by getattr, hasattr": ["hasattr(space, 'stack')"],
        "type: ignore": ["# type: ignore"],
        "dict[str, Any]": ["dict[str, Any]"],
        "functions over 60 lines": ["long: 61 lines"],
    }


def test_the_house_script_sets_two_checkouts_side_by_side(house, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["house.py", str(house), str(house)])
    script("house").main()
    assert "switches on a kind                               3         3\n" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["house.py", str(house), "--json"])
    script("house").main()
    (counted,) = json.loads(capsys.readouterr().out).values()
    assert counted["type: ignore"] == 1
