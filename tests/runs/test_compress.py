"""`lmnas compress`: from a trained run to a smaller dense model, stopped and continued, and what it refuses."""

import copy
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml

import lmnas
from lmnas.cli.main import main
from lmnas.core import registry
from lmnas.core.errors import Interrupted, UserError
from lmnas.core.genotype import Genotype, load_genotype
from lmnas.core.job import Job
from lmnas.core.seeds import generator
from lmnas.nn.sparsity import training as sparse_training
from lmnas.nn.sparsity.training import Sparsity, layout, sparsify
from lmnas.nn.training.settings import Training
from lmnas.runs.build import covering_space
from lmnas.runs.job_kinds.compress import smaller_genotype
from lmnas.spaces.recurrent.layers import LayersBody
from lmnas.tasks.language_modeling import ModelSettings

WIDTH = 10
TRAINING = tiny.training(
    epochs=6,
    model={"width": WIDTH, "dropout_output": 0.1},
    batches={"batch_size": 8, "bptt": 10, "test_batch_size": 2, "eval_batch_size": 2},
    optimizer={"learning_rate": 5.0, "averaging": "none"},
)
GENOTYPES = {
    "lstm": {"space": "lstm", "choices": {"layers": 1}},
    "rnn": {"space": "recurrent-layers", "choices": {"cell": "rnn", "layers": 1}},
    "cell": None,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_text):
    """`trained(name)`: the directory of a finished run of a few seconds."""
    known = {}

    def get(name):
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            genotype = {"format": 1, **(GENOTYPES[name] or {"space": "recurrent-cell", "choices": {}})}
            space, source = {"name": genotype["space"]}, str(folder / "genotype.json")
            if name == "cell":
                space, source, genotype = {"name": "recurrent-cell", "n_nodes": 2}, None, {}
            (folder / "genotype.json").write_text(json.dumps(genotype))
            recipe = tiny.recipe(tiny_text, space=space, train={"seeds": 1, "training": TRAINING}, baselines={})
            if name == "cell":
                recipe["train"]["training"] = tiny.training()
            (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
            known[name] = folder / "run"
            given = ["--genotype", source] if source else []
            assert main(["search", str(folder / "recipe.yaml"), "--run", str(known[name]), *given]) == 0
        return known[name]

    return get


def compress(capsys, *arguments):
    """(exit code, JSON answer or the line of the error)."""
    capsys.readouterr()
    code = main(["compress", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if code == 0 else err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def done(trained, tmp_path_factory):
    """A compression and its answer."""
    out = tmp_path_factory.mktemp("compressed") / "small"
    arguments = [trained("lstm"), "--out", out, "--rounds", 2, "--round-epochs", 2, "--epochs", 2]
    return out, arguments


def test_a_run_becomes_a_smaller_one(done, trained, capsys, monkeypatch):
    out, arguments = done
    code, answer = compress(capsys, *arguments)
    assert code == 0, answer
    before, after = answer["before"], answer["after"]
    width = after["units"]["embedding"]
    assert 1 <= width < WIDTH == before["units"]["embedding"]
    words = len(json.loads((out / "vocabulary.json").read_text()))

    def count(width):  # embedding, output bias, two matrices and two biases of four gates
        return words * width + words + 2 * 4 * width * width + 2 * 4 * width

    assert (before["n_parameters"], after["n_parameters"]) == (count(WIDTH), count(width))
    assert len(answer["kept"]["embedding"]) == width
    assert answer["cut"]["valid"] == pytest.approx(answer["masked"]["valid"], rel=1e-5)
    assert after["valid"] <= answer["cut"]["valid"]
    assert [row["round"] for row in answer["rounds"]] == [1, 2]
    # what it began from is the run's model
    recorded = json.loads((trained("lstm") / "results.json").read_text())["scores"]
    assert {score["split"]: score["value"] for score in recorded} == {s: before[s] for s in ("valid", "test")}
    # the saved model is what was reported, opened as any run's
    opened = lmnas.load(out)
    model = opened.model()
    batches = opened.recipe.train.training.batch_settings(model.task)
    assert model.task.evaluate(model.module, "test", batches).value == pytest.approx(after["test"], rel=1e-6)
    assert model.genotype == opened.genotype == Genotype("lstm", {"layers": 1})
    assert sum(p.numel() for p in model.module.parameters()) == after["n_parameters"]
    assert "<svg" in (out / "strips.svg").read_text()
    # again: the same answer, no work
    monkeypatch.setitem(registry.COMPONENTS, "job", {})
    assert compress(capsys, *arguments) == (0, answer)
    # other settings would mix two compressions
    code, line = compress(capsys, *arguments, "--seed", 3)
    assert code == 2 and "seed is 0 there and 3 here" in line


@pytest.mark.parametrize("curvature", ["sampled", "recursion"])
def test_a_plain_network_with_either_curvature(curvature, trained, tmp_path, capsys):
    given = ["--rounds", 1, "--round-epochs", 1, "--epochs", 0, "--curvature", curvature]
    code, answer = compress(capsys, trained("rnn"), "--out", tmp_path / "small", *given)
    assert code == 0, answer
    assert answer["after"]["valid"] == pytest.approx(answer["cut"]["valid"])
    assert answer["after"]["units"]["embedding"] < WIDTH
    assert lmnas.load(tmp_path / "small").genotype.choices == {"cell": "rnn", "layers": 1}


def test_a_strength_that_kills_everything_says_so_and_another_one_may_follow(trained, tmp_path, capsys):
    given = [trained("lstm"), "--out", tmp_path / "small", "--rounds", 1, "--epochs", 0]
    code, line = compress(capsys, *given, "--strength", 1000)
    assert code == 2
    assert "strength 1000: no unit of family 'embedding' is left" in line and "try --strength" in line
    suggestion = float(line.rpartition("try --strength ")[2].split()[0])
    code, answer = compress(capsys, *given, "--strength", suggestion)
    assert code == 0 and answer["strength"] == suggestion


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere"], "run nowhere: no run there"),
        (["LSTM", "--strength", "-1"], "--strength: expected a positive number, got -1.0"),
        (["LSTM", "--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["LSTM", "--share", "0"], "--share: expected a number above 0, at most 1, got 0.0"),
        (["LSTM", "--threshold", "1"], "--threshold: expected a number from 0 to below 1, got 1.0"),
        (["LSTM", "--out", "LSTM"], "it is the run itself"),
        (["LSTM", "--out", "CELL"], "the folder holds a run of its own"),
        (["LSTM", "--out", "new", "--curvature", "recursion"], "expected a body of one plain recurrent layer"),
        (["CELL"], "has no strips of units to take out"),
    ],
)
def test_refused(arguments, message, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [str(trained(word.lower())) if word in ("LSTM", "CELL") else word for word in arguments]
    code, line = compress(capsys, *words)
    assert code == 2 and message in line
    assert not (tmp_path / "nowhere").exists()


def test_a_run_without_a_trained_model(trained, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_bytes((trained("lstm") / "recipe.yaml").read_bytes())
    code, line = compress(capsys, tmp_path)
    assert code == 2 and "it has no trained model" in line


# ----------------------------------------------------------------------------------------------------------- procedure


def language_model(task, cell, inner, steps=0):
    """Trained for so many steps."""
    model = task.model(LayersBody(cell, list(inner), 8), ModelSettings(width=8, dropout_output=0.2))
    model.initialise(generator(0, "init"))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    stream = task.stream("train", settings().batch_settings(task), 0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(stream.next(), {}).value.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def warm(tiny_task):
    """A model of two layers to continue from, a new copy at every call."""
    trained = language_model(tiny_task, "lstm", [6], steps=300)
    return lambda: copy.deepcopy(trained)


def settings():
    """Nearly as a recipe's, with a checkpoint every few steps."""
    from lmnas.runs.recipe import load_recipe

    document = tiny.recipe("pydoc", train={"seeds": 1, "training": {**TRAINING, "checkpoint_steps": 5}})
    return load_recipe(document).train.training


class Stops:
    """Asks for a stop every so many questions."""

    def __init__(self, every):
        self.every, self.asked = every, 0

    def __call__(self):
        self.asked += 1
        return self.asked % self.every == 0


@pytest.mark.parametrize("dynamic", [True, False])
def test_stopped_and_continued_equals_never_stopped(dynamic, warm, tiny_task, tmp_path):
    sparsity = Sparsity(rounds=2, dynamic=dynamic, curvature_batches=1, threshold=0.8)
    training: Training = settings()

    def life(directory, stop):
        model = warm()
        job = Job(directory, stop=stop)
        return sparsify(model, tiny_task, training, sparsity, 0, job, torch.device("cpu")), model

    expected, whole = life(tmp_path / "whole", lambda: False)
    stop, lives = Stops(13), 0
    while True:
        lives += 1
        try:
            found, model = life(tmp_path / "pieces", stop)
            break
        except Interrupted:
            continue
    assert lives > 3
    assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
    events = [(d / "events.jsonl").read_text().count("\n") for d in (tmp_path / "whole", tmp_path / "pieces")]
    assert events == [2, 2]


def test_dead_strips_are_exactly_zero_and_stay_so(warm, tiny_task, tmp_path):
    model = warm()
    sparsity = Sparsity(rounds=2, curvature_batches=1, threshold=0.8)
    found = sparsify(model, tiny_task, settings(), sparsity, 0, Job(tmp_path), torch.device("cpu"))
    norms = layout(model).norms(dict(model.named_parameters()))
    for family, kept in found["kept"].items():
        assert norms[family].nonzero()[:, 0].tolist() == kept
    assert sum(map(len, found["kept"].values())) < 8 + 6
    first, last = (row["units"] for row in found["rounds"])
    assert all(last[family] <= first[family] for family in first)


def test_nan_goes_back_and_on(tiny_task, tmp_path, monkeypatch):
    sparsity = Sparsity(strength=0.01, rounds=1, curvature_batches=1)
    shrink, calls = sparse_training.Layout.shrink, [0]

    def poison(self, weights, thresholds):
        shrink(self, weights, thresholds)
        calls[0] += 1
        if calls[0] == 12:
            weights["embedding"].data.fill_(math.nan)

    monkeypatch.setattr(sparse_training.Layout, "shrink", poison)
    model = language_model(tiny_task, "rnn", [])
    found = sparsify(model, tiny_task, settings(), sparsity, 0, Job(tmp_path), torch.device("cpu"))
    assert math.isfinite(found["rounds"][-1]["valid"])
    assert "diverged" in (tmp_path / "events.jsonl").read_text()


def test_smaller_genotypes():
    two = Genotype("lstm", {"layers": 2})
    assert smaller_genotype(two, {"embedding": 2, "layer 1": 2}) == (two, 2)
    changed, width = smaller_genotype(two, {"embedding": 2, "layer 1": 1})
    assert (changed.space, dict(changed.choices), width) == (
        "recurrent-layers",
        {"cell": "lstm", "layers": 2, "units_1": 1},
        2,
    )
    covering_space(changed)
    plain = Genotype("recurrent-layers", {"cell": "rnn", "layers": 3, "units_1": 16, "units_2": 32})
    changed, width = smaller_genotype(plain, {"embedding": 5, "layer 1": 5, "layer 2": 5})
    assert (dict(changed.choices), width) == ({"cell": "rnn", "layers": 3, "units_1": 5, "units_2": 5}, 5)
    covering_space(changed)


def test_a_space_that_cannot_say_what_is_left_is_refused():
    with pytest.raises(UserError, match="space 'recurrent-cell' cannot say what is left of an architecture with fewer"):
        smaller_genotype(load_genotype("darts-v2"), {"embedding": 4})


# ------------------------------------------------------------------------------------------------- the planted network


def planted():
    path = Path(__file__).parents[2] / "benchmarks" / "planted_rnn.py"
    spec = importlib.util.spec_from_file_location("planted_rnn", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["planted_rnn"] = module
    spec.loader.exec_module(module)
    return module


def test_planted_units_and_inputs_are_found():
    """Small, but the whole way: two of five units and two of three inputs made the data."""
    module = planted()
    world = module.World(units=5, inputs=3, true_units=2, true_inputs=2, steps=15, loops=8, loop_steps=60)
    data = module.Data(world, 0)
    strength = module.bic_strength(world, data, module.lasso(world, data, 0, 0.0))
    for dynamic in (True, False):
        found = module.agreement(world, module.bayes(world, data, 0, strength, dynamic).alive)
        assert (found["precision"], found["recall"]) == (1.0, 1.0), dynamic
    # the unpenalised fit uses everything
    assert module.agreement(world, module.lasso(world, data, 0, 0.0).alive)["precision"] < 0.5
