"""The scripts of `benchmarks/` run; what they measure here means nothing."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml

from lmnas.core.contracts import Objective
from lmnas.nn.sparsity import priors as evidence

SCRIPTS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu])])
def test_gpu(device, tmp_path):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(SCRIPTS / "gpu.py"), "--device", device, "--small", "--no-compiled"]
    subprocess.run([*command, "--rounds", "1", "--out", str(out)], check=True, timeout=300)
    document = json.loads(out.read_text())
    assert set(document["rows"]) == {
        "search-weight",
        "search-first-order",
        "search-second-order",
        "retrain",
        "retrain-3-seeds",
        "enas-shared",
    }
    for row in document["rows"].values():
        assert {"eager", "lstm"} <= set(row["ways"])
        assert all(way["median"] > 0 and len(way["milliseconds"]) == 1 for way in row["ways"].values())


def script(name):
    """A file of `benchmarks/` as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["search_cost.py", *arguments, "--out", str(tmp_path / "out")])
        script("search_cost").main()
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["ratio"] == 1 and second["ratio"] == pytest.approx(
        second["cpu_seconds"] / first["cpu_seconds"], rel=0.5
    )
    assert first["candidates"] == second["candidates"] == 2
    assert not list((tmp_path / "out").glob("*/jobs/train-*"))
