"""The command line: what it prints, what it leaves, and what its exit code says."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tiny
import yaml
from command_line import answer, call, write_recipe

import lmnas
from lmnas.core import registry
from lmnas.core.errors import Interrupted
from lmnas.core.genotype import load_genotype, shipped_names
from lmnas.runs.directory import Run
from lmnas.runs.experiment import Experiment
from lmnas.runs.progress import Display
from lmnas.runs.recipe import load_recipe, recipe_names

QUICK = {
    "reinforce": {"strategy.rewards_per_round": 4, "strategy.rewards_per_update": 2},
    "bayes": {"space.batch_norm": "none"},
}
"""Settings without which a strategy takes more than a second on a tiny text, or refuses its space."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    """A finished run: (its directory, the command's arguments, its answer)."""
    folder = tmp_path_factory.mktemp("cli")
    text = folder / "my.txt"
    text.write_text(tiny.text(150))
    recipe = write_recipe(folder / "tiny.yaml", "pydoc")
    arguments = ["search", recipe, "--run", folder / "run", "--data", text, "--train.seeds", "3", "--level=0.1"]
    return folder / "run", arguments, answer(*arguments)


def test_search_answers_with_the_results(finished):
    run, _, document = finished
    assert document["objective"] == {"name": "perplexity", "unit": "per word", "direction": "minimize"}
    assert document["data"].keys() >= {"name", "fingerprint", "tokens", "vocabulary"}
    assert document["data"]["name"] == "my.txt"
    assert document["data"]["tokens"] == {"train": 840, "valid": 105, "test": 105}  # 150 lines of 6 words and <eos>
    assert document["data"]["vocabulary"] == len(tiny.WORDS) + 2  # <eos> and <unk>
    assert document["environment"].keys() >= {"lmnas", "python", "torch", "platform", "device", "threads"}
    wanted = {"model", "genotype_id", "split", "value", "seed", "n_parameters", "n_predictions", "stage"}
    assert all(score.keys() >= wanted for score in document["scores"])
    found = {(s["model"], s["stage"], s["split"], s["seed"]) for s in document["scores"]}
    expected = {
        (model, stage, split, seed)
        for model in ("searched", "random", "lstm")
        for stage, split in (("train", "valid"), ("test", "test"))
        for seed in range(3)
    }
    assert found == expected and len(document["scores"]) == len(expected)
    # test_batch_size 2: 105 tokens are two streams of 52, each predicting all its tokens but the first
    assert {s["n_predictions"] for s in document["scores"] if s["split"] == "test"} == {102}
    assert document["verdict"]["level"] == 0.1
    assert {row["model"] for row in document["verdict"]["models"]} == {"searched", "random", "lstm"}
    assert document["verdict"]["sentence"]
    stored = json.loads((run / "results.json").read_text())
    assert stored == {key: value for key, value in document.items() if key not in ("run", "report")}


def test_the_run_directory_holds_everything(finished):
    run, _, document = finished
    names = {path.name for path in run.iterdir()}
    assert names >= {
        *("recipe.yaml", "environment.json", "study.db", "incidents.jsonl", "genotype.json", "model.safetensors"),
        *("results.json", "report.html", "vocabulary.json"),
    }
    winner = {s["genotype_id"] for s in document["scores"] if s["model"] == "searched"}
    assert winner == {load_genotype(run / "genotype.json").id}
    assert document["report"] == str(run / "report.html") and document["run"] == str(run)


def test_overrides_reach_the_stored_recipe(finished):
    recipe = load_recipe(str(finished[0] / "recipe.yaml"))
    assert recipe.train.seeds == 3 and recipe.level == 0.1 and recipe.task["data"].endswith("my.txt")


def test_text_answer_ends_with_table_sentence_and_report(finished):
    run, arguments, document = finished
    code, out, err = call(*arguments)
    lines = out.splitlines()
    assert code == 0
    assert lines[-1] == f"report: {run / 'report.html'}" and lines[-2] == document["verdict"]["sentence"]
    assert all(any(line.startswith(name) for line in lines) for name in ("searched", "random", "lstm"))
    assert "report: done" in err


def test_running_again_does_no_work(finished, monkeypatch):
    run, arguments, document = finished
    before = {path: path.read_bytes() for path in run.rglob("*") if path.name in ("result.json", "model.safetensors")}
    monkeypatch.setitem(registry.COMPONENTS, "job", {})
    again = answer(*arguments)
    assert {path: path.read_bytes() for path in before} == before
    for key in ("scores", "verdict", "candidates", "costs", "genotype"):
        assert again[key] == document[key]


def test_saved_model_loads_back_to_its_score(finished):
    run, _, document = finished
    reloaded = answer("test", run)["reloaded"]
    assert reloaded["difference"] <= 1e-6
    tests = [s["value"] for s in document["scores"] if s["model"] == "searched" and s["stage"] == "test"]
    assert reloaded["value"] == pytest.approx(reloaded["recorded"], abs=1e-6) and reloaded["recorded"] in tests


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 99])
def test_a_damaged_saved_model_is_named(finished, damage):
    path = finished[0] / "model.safetensors"
    good = path.read_bytes()
    try:
        path.write_bytes(damage(good))
        code, out, err = call("test", finished[0])
    finally:
        path.write_bytes(good)
    assert code == 2 and not out
    assert f"model {path}: cannot be loaded" in err.splitlines()[-1]


@pytest.mark.parametrize("content", ["{", None])
def test_a_damaged_description_of_the_model_is_named_and_written_anew(finished, content):
    path = finished[0] / "model.json"
    good = path.read_text()
    path.unlink() if content is None else path.write_text(content)
    code, _, err = call("test", finished[0])
    assert code == 2 and f"{path}: cannot be read" in err.splitlines()[-1]
    assert call("train", finished[0])[0] == 0
    assert path.read_text() == good


def test_stages_one_by_one_equal_one_search(finished, tmp_path):
    document = finished[2]
    with Run(tmp_path / "run", load_recipe(str(finished[0] / "recipe.yaml"))) as run, Display(quiet=True) as display:
        Experiment(run, display).run_stages(("search",))
    answers = {stage: answer(stage, tmp_path / "run") for stage in ("select", "train", "test", "report")}
    assert answers["select"]["scores"] == [] and answers["select"]["verdict"] is None
    assert {score["stage"] for score in answers["train"]["scores"]} == {"train"}

    def values(results):
        return {(s["model"], s["genotype_id"], s["stage"], s["seed"]): s["value"] for s in results["scores"]}

    assert values(answers["test"]) == values(answers["report"]) == values(document)


def test_a_users_folder(tmp_path, cache):
    for number, split in enumerate(("train", "valid", "test")):
        (tmp_path / f"{split}.txt").write_text(tiny.text(100 if split == "train" else 20, seed=number))
    recipe = write_recipe(tmp_path / "tiny.yaml", "pydoc", baselines={})
    arguments = ["--data", tmp_path, "--train.seeds", 1, "--run", tmp_path / "run", "--search.candidates", "1"]
    document = answer("search", recipe, *arguments)
    assert document["data"]["tokens"] == {"train": 700, "valid": 140, "test": 140}
    assert {score["model"] for score in document["scores"]} == {"searched"}


def test_a_given_genotype_is_trained_and_not_searched(tmp_path, cache):
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(150))
    recipe = write_recipe(tmp_path / "tiny.yaml", text, baselines={})
    document = answer("search", recipe, "--run", tmp_path / "run", "--genotype", "darts-v2", "--train.seeds", 1)
    assert {score["genotype_id"] for score in document["scores"]} == {load_genotype("darts-v2").id}
    assert sorted(path.name for path in (tmp_path / "run" / "jobs").iterdir()) == [
        "test-searched-0",
        "train-searched-0",
    ]


@pytest.mark.parametrize("strategy", registry.names("strategy"))
@pytest.mark.parametrize("estimator", registry.names("estimator"))
def test_every_strategy_with_every_estimator(strategy, estimator, tmp_path, cache):
    """One name changes; it runs, or is refused with both names."""
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(150))
    recipe = write_recipe(tmp_path / "tiny.yaml", text)
    needs = registry.component("strategy", strategy).needs
    provides = registry.component("estimator", estimator).provides
    if not needs <= provides:
        code, _, err = call("search", recipe, "--strategy", strategy, "--estimator", estimator)
        assert code == 2
        assert f"strategy {strategy!r} needs" in err and f"estimator {estimator!r} does not provide" in err
        return
    if estimator == "table":  # of graphs: tests/estimators/test_table.py
        run = ["--run", tmp_path / "run"]
        code, _, err = call("search", recipe, "--strategy", strategy, "--estimator", estimator, *run)
        assert code == 2 and "estimator 'table' takes graph bodies; space 'recurrent-cell' makes" in err
        return
    settings = {"strategy": strategy, "estimator": estimator, **QUICK.get(strategy, {})}
    with Run(tmp_path / "run", load_recipe(str(recipe), settings)) as run, Display(quiet=True) as display:
        results = Experiment(run, display).run_stages(("search",))
    assert results["candidates"] and all(row["value"] is not None for row in results["candidates"])


def test_interrupted_says_how_to_continue(finished, monkeypatch):
    def stop(*arguments):
        raise Interrupted

    monkeypatch.setattr(Experiment, "run_stages", stop)
    code, out, err = call(*finished[1])
    assert code == 130 and not out
    assert f"the same command continues (lmnas search {finished[1][1]} --run {finished[0]})" in err
    code, _, err = call("train", finished[0])
    assert code == 130 and f"lmnas train {finished[0]}" in err


# ------------------------------------------------------------------------------------------------------ list and show


def test_list():
    document = answer("list")
    assert document.keys() == {"spaces", "strategies", "estimators", "tasks", "recipes", "genotypes"}
    assert set(document["spaces"]) == set(registry.names("space"))
    assert set(document["recipes"]) == set(recipe_names()) and set(document["genotypes"]) == set(shipped_names())
    assert all(text for entries in document.values() for text in entries.values())
    for kind, entries in document.items():
        assert answer("list", kind) == {kind: entries}
        lines = call("list", kind)[1].splitlines()
        assert lines[0] == kind and [line.split()[0] for line in lines[1:]] == list(entries)


@pytest.mark.parametrize(
    "name, width, n_parameters",
    [
        # (2H)^2 + 8 * 2H * H in the cell, V * H embedding, V biases
        ("darts-v2", 850, 22_960_000),
        # the authors count no bias: (2H)^2 + 11 * 2H * H + V * H
        ("enas", 748, 22_027_104),
        ("enas-lm", 800, 20_800_000),
        ("enas-lm", 850, 22_950_000),
    ],
)
def test_show_counts_as_the_authors_do(name, width, n_parameters, tmp_path):
    document = answer("show", name, "--width", width, "--vocabulary", 10000, "--out", tmp_path)
    assert document["n_parameters"] == n_parameters
    assert document["genotype_id"] == load_genotype(name).id


def test_show_draws_and_describes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call("show", "darts-v2", "--width", 8, "--vocabulary", 20)
    assert code == 0
    assert "8 words" not in out and "parameters: 1,460 as a language model of width 8 and 20 words" in out
    assert ElementTree.parse("darts-v2.svg").getroot().tag.endswith("svg")
    assert Path("darts-v2.png").read_bytes().startswith(b"\x89PNG")


def test_show_reads_a_found_genotype(finished, tmp_path):
    found = answer("show", finished[0] / "genotype.json", "--out", tmp_path / "pictures")
    assert found["genotype_id"] == finished[2]["genotype"]["id"]
    assert all(Path(path).is_file() for path in found["pictures"].values())


def test_as_a_program(tmp_path):
    """The installed program: its exit code, and standard output that holds the JSON object alone."""
    good = subprocess.run([sys.executable, "-m", "lmnas", "list", "--json"], capture_output=True, text=True)
    assert good.returncode == 0 and not good.stderr
    assert "quickstart" in json.loads(good.stdout)["recipes"]
    bad = subprocess.run([sys.executable, "-m", "lmnas", "test", str(tmp_path)], capture_output=True, text=True)
    assert bad.returncode == 2 and not bad.stdout
    assert bad.stderr.startswith("lmnas: run ") and bad.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------- images


@pytest.fixture(scope="module")
def finished_images(tmp_path_factory, cache):
    """A finished run on pictures: (its directory, its answer, what it said, the pictures)."""
    folder = tmp_path_factory.mktemp("images")
    pictures = tiny.pictures(folder / "pictures", n_train=12)
    recipe = folder / "images.yaml"
    recipe.write_text(yaml.safe_dump(tiny.image_recipe("shapes", train={**tiny.image_recipe()["train"], "seeds": 2})))
    code, out, err = call("search", recipe, "--run", folder / "run", "--data", pictures, "--json")
    assert code == 0
    return folder / "run", json.loads(out), err, pictures


def test_images_through_every_stage(finished_images):
    run, document, said, _ = finished_images
    assert document["objective"] == {
        "name": "error",
        "unit": "%",
        "direction": "minimize",
        "worst": 100.0,
        "items": "images",
    }
    assert document["data"]["name"] == "pictures"
    assert document["data"]["images"] == {"train": 33, "valid": 3, "test": 9}
    assert document["environment"]["kernel"] == "reference" and "slower" not in said
    scores = [score for score in document["scores"] if score["split"] == "test"]
    assert {score["model"] for score in scores} == {"searched", "random", "resnet"}
    # every error is a whole number of nine images
    assert all(score["n_predictions"] == 9 and abs(score["value"] * 9 / 100 % 1 - 0.5) > 0.49 for score in scores)
    assert "the ResNet" in document["verdict"]["sentence"] and "LSTM" not in document["verdict"]["sentence"]
    assets = json.loads((run / "images.json").read_text())
    assert assets["classes"] == ["blue", "green", "red"] and assets["size"] == [8, 8]
    # the table is that of the model that is handed over
    details = document["details"]
    table = details["confusion"]
    wrong = sum(map(sum, table)) - sum(table[i][i] for i in range(3))
    exported = next(s for s in scores if s["model"] == "searched" and s["seed"] == details["seed"])
    assert [sum(row) for row in table] == [3, 3, 3] and exported["value"] == pytest.approx(100 * wrong / 9)
    page = (run / "report.html").read_text()
    shown = page.replace("tokens: null", "")  # a length of training that the recipe does not use
    assert "What it predicts" in page and "images/s" in page and "tokens" not in shown


def test_an_image_model_is_tested_again_and_scores_a_folder(finished_images):
    run, _, _, pictures = finished_images
    tested = answer("test", run)
    assert tested["reloaded"]["difference"] == 0
    opened = lmnas.load(run)
    value = opened.model().score(str(pictures / "test"))
    assert value == tested["reloaded"]["value"]


def test_show_counts_an_image_classifier(tmp_path):
    """ResNet-20 with 16 channels: 269,072 in the body (tested there by formula), and 64 x 10 + 10."""
    document = answer("show", "resnet-20", "--out", tmp_path)
    assert (document["n_parameters_body"], document["n_parameters"]) == (269_072, 269_722)
    assert document["width"] == 16 and document["vocabulary"] is None
    assert answer("show", "resnet-20", "--width", 4, "--out", tmp_path)["n_parameters"] < 20_000
