"""docs/adding.md shown true: its files and its registry lines, put through the contract tests and a small search."""

import copy
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import test_contracts as contracts
import tiny
import torch
from command_line import answer

import lmnas
from lmnas.cli.main import main
from lmnas.core import registry
from lmnas.core.contracts import Proposal
from lmnas.core.errors import UserError
from lmnas.core.job import Job
from lmnas.core.length import Length
from lmnas.core.updates import never, silent
from lmnas.nn.train import initialise
from lmnas.runs.directory import Run
from lmnas.runs.executors.base import Call, Setup, open_executor
from lmnas.runs.recipe import load_recipe
from lmnas.runs.record import Record

PAGE = (Path(__file__).parents[1] / "docs" / "adding.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^File `(\w+\.py)`:\n\n```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
LINES = re.search(r"^One line each.*?^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1]


@pytest.fixture(scope="module")
def registered(tmp_path_factory, cache):
    """The page's files on the import path and its lines run; a small text. Undone afterwards."""
    folder = tmp_path_factory.mktemp("adding")
    for name, source in FILES.items():
        (folder / name).write_text(source)
    (folder / "text.txt").write_text(tiny.text(150))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(registry, "COMPONENTS", copy.deepcopy(registry.COMPONENTS))
        patch.setenv(registry.ENVIRONMENT, "")
        exec(LINES, {"lmnas": lmnas})
        yield folder
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_the_page_has_the_files_and_one_line_for_each():
    own = {"elman", "tiny_gpt", "climber", "relay", "bits", "reversing", "threads"}
    assert FILES.keys() == {f"{name}.py" for name in own}
    assert len(LINES.splitlines()) == len(FILES)


@pytest.mark.parametrize(
    "contract",
    [
        contracts.test_genotypes_are_values_of_the_space,
        contracts.test_covering_builds_the_same_from_the_genotype_alone,
        contracts.test_diagrams_are_whole,
        contracts.test_a_body_gives_the_features_that_it_says,
        contracts.test_a_causal_body_reads_no_later_input,
        contracts.test_a_stateful_body_carries_its_state,
        contracts.test_weights_and_masks_come_from_the_generator_alone,
    ],
)
@pytest.mark.parametrize("name, settings", [("elman", {}), ("elman", {"allow_skip": False}), ("tiny-gpt", {})])
def test_the_spaces_keep_the_contract(registered, contract, name, settings):
    contract(name, settings)


@pytest.mark.parametrize(
    "contract",
    [
        contracts.test_its_needs_are_met_by_some_estimator,
        contracts.test_proposals_repeat_with_the_seed,
        contracts.test_other_seeds_propose_otherwise,
        contracts.test_its_state_survives_a_checkpoint,
        contracts.test_loading_a_state_does_not_tie_two_strategies,
    ],
)
@pytest.mark.parametrize("name", ["climber", "relay"])
def test_the_strategies_keep_the_contract(registered, contract, name):
    contract(name)


@pytest.mark.parametrize("name", ["bits-per-word", "reversing"])
def test_the_tasks_keep_the_contract(registered, tmp_path, name):
    text = registered / "text.txt"
    contracts.test_its_data_are_described(name, text)
    contracts.test_a_stream_continues_from_its_state(name, text, "train")
    contracts.test_its_model_learns_from_a_batch(name, text)
    contracts.test_evaluation_repeats_and_leaves_the_model_alone(name, text)
    contracts.test_it_hands_over_what_a_user_needs(name, text, tmp_path)


def test_padding_is_in_no_loss(registered):
    """More padding, or a word in a batch of its own, changes neither loss nor count."""
    import reversing

    space = registry.create("space", {"name": "tiny-gpt"})
    body = space.build(space.sample(random.Random(0)), 8)
    task = registry.create("task", {"name": "reversing"})
    model = initialise(task.model(body, reversing.ModelSettings(width=8)), 0)
    together = reversing.padded(["abc", "d", "efgh"])
    alone = [reversing.padded([word]) for word in ("abc", "d", "efgh")]
    assert together.n_targets == 8 and [batch.n_targets for batch in alone] == [3, 1, 4]
    expected = sum(model(batch, {}).value.item() * batch.n_targets for batch in alone) / 8
    assert model(together, {}).value.item() == pytest.approx(expected, rel=1e-5)


def test_the_executor_gives_what_this_process_gives(registered):
    """Results, dependent calls, errors and a stop, as `inline` has them."""
    squares = [Call(str(n), "calls:square", {"number": n}) for n in range(5)]
    for name in ("inline", "threads"):
        with open_executor(name, 2, Setup(), silent, never) as executor:
            assert dict(executor.run(squares)) == {str(n): n * n for n in range(5)}
            found = []

            def coming(found=found):
                yield squares[3]
                while not found:
                    yield None
                yield Call("next", "calls:square", {"number": found[0]})

            for _, result in executor.run(coming()):
                found.append(result)
            assert found == [9, 81]
            with pytest.raises(UserError, match="no such word"):
                list(executor.run([Call("wrong", "calls:fail", {"kind": "user"})]))


def test_a_contract_can_fail(registered, monkeypatch):
    import climber

    monkeypatch.setattr(climber.Climber, "load_state_dict", lambda self, state: None)
    with pytest.raises(AssertionError):
        contracts.test_its_state_survives_a_checkpoint("climber")


def test_they_run_in_a_search(registered, tmp_path, capsys):
    document = tiny.recipe(
        registered / "text.txt", search={"seeds": 1, "candidates": 3}, estimator={"name": "standalone"}
    )
    document["estimator"]["training"] = tiny.training()
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(json.dumps(document))  # JSON is YAML
    names = ["--space", "elman", "--strategy", "climber", "--task", "bits-per-word"]
    arguments = [*names, "--task.data", registered / "text.txt", "--train.seeds", "1", "--run", tmp_path / "run"]
    assert main(["search", *map(str, [recipe, *arguments]), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["objective"] == {"name": "bits", "unit": "per word", "direction": "minimize"}
    assert results["genotype"]["space"] == "elman" and results["diagram"]["title"] == "elman"
    searched = {s["stage"]: s["value"] for s in results["scores"] if s["model"] == "searched"}
    assert 3 < searched["test"] < 5  # a uniform guess among 19 words is 4.2 bits
    assert len([row for row in results["candidates"] if row["stage"] == "search"]) == 3


def searched(recipe, run):
    """The results of a search, and what depends on no clock."""
    (run.parent / "toy.json").write_text(json.dumps(recipe))  # JSON is YAML
    results = answer("search", run.parent / "toy.json", "--run", run)
    scores = [(s["model"], s["split"], s["seed"], s["value"]) for s in results["scores"]]
    return results, (scores, results["genotype"]["id"], [row["value"] for row in results["candidates"]])


def toy(registered, **changes):
    return tiny.recipe(
        registered / "text.txt",
        search={"seeds": 1, "candidates": 3},
        estimator={"name": "standalone", "training": tiny.training()},
        **changes,
    )


def test_a_transformer_is_searched_as_a_language_model(registered, tmp_path):
    results, _ = searched(toy(registered, space={"name": "tiny-gpt"}), tmp_path / "run")
    assert results["genotype"]["space"] == "tiny-gpt" and results["noun"] == "decoder"
    assert {s["model"] for s in results["scores"]} == {"searched", "random", "lstm"}
    searched_, lstm = (next(s for s in results["scores"] if s["model"] == m) for m in ("searched", "lstm"))
    assert abs(searched_["n_parameters"] - lstm["n_parameters"]) < 0.5 * lstm["n_parameters"]
    assert all(s["value"] < 30 for s in results["scores"])


def test_a_task_of_pairs_is_searched(registered, tmp_path):
    training = {"epochs": 2, "model": {"width": 8}, "batches": {"batch_size": 8}}
    training["optimizer"] = {"learning_rate": 0.5, "averaging": "none"}
    document = toy(registered, task={"name": "reversing"}, space={"name": "elman"})
    document["estimator"]["training"] = document["train"]["training"] = training
    results, _ = searched(document, tmp_path / "run")
    words = registry.create("task", {"name": "reversing"}).words["test"]
    tested = [s for s in results["scores"] if s["split"] == "test"]
    assert tested and {s["n_predictions"] for s in tested} == {sum(map(len, words))}
    assert all(s["value"] < 10 for s in tested)  # a guess among the symbols


def test_threads_change_no_number(registered, tmp_path):
    found = {}
    for name in ("inline", "threads"):
        execution = {"device": "cpu", "threads": 1, "workers": 2, "executor": name, "kernel": "reference"}
        (tmp_path / name).mkdir()
        _, found[name] = searched(toy(registered, execution=execution), tmp_path / name / "run")
    assert found["threads"] == found["inline"]


def test_children_continue_their_parents_training(registered, tmp_path):
    """A child is trained to twice its parent's steps, to the same bits as one trained so far at once."""
    document = toy(registered, space={"name": "elman"}, strategy={"name": "relay", "population": 2, "steps": 4})
    searched(document, tmp_path / "run")
    with Run(tmp_path / "run") as run:
        task, space = registry.create("task", run.recipe.task), registry.create("space", run.recipe.space)
        trials = Record(run, "search", task.objective, space).trials()
    first, second, child = trials
    parent = (first, second)[child["parent"]]
    assert child["genotype"] == parent["genotype"] and parent["value"] == min(first["value"], second["value"])
    assert child["budget"] == {"amount": 8, "unit": "steps"} and (parent["steps"], child["steps"]) == (4, 8)
    estimator = registry.create("estimator", run.recipe.estimator, space, task, run.recipe.seed, torch.device("cpu"))
    at_once = Proposal(child["genotype"], Length(8, "steps"))
    assert estimator.estimate(at_once, run.recipe.seed, Job(tmp_path / "at-once")).value == child["value"]


def test_black_box_strategies_are_refused_on_shared_weights(registered):
    with pytest.raises(
        UserError, match=r"trains shared weights on the strategy's choices, and strategy 'climber' makes"
    ):
        load_recipe(tiny.recipe("pydoc", strategy={"name": "climber"}))
    with pytest.raises(UserError, match=r"climber\.fresh: input should be a valid number|strategy\.fresh"):
        load_recipe(tiny.recipe("pydoc", strategy={"name": "climber", "fresh": "often"}))


def test_other_processes_know_them(registered):
    code = "from lmnas.core import registry; print(registry.component('strategy', 'climber').__doc__, end='')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=registered)
    assert run.stdout == "Mutates the best, or draws afresh."


@pytest.mark.parametrize(
    "entry, message",
    [
        ("elman:Elman", "expected kind:name=module:Class, got 'elman:Elman'"),
        ("speces:elman=elman:Elman", "expected kind:name=module:Class"),
        ("space:gone=no_such_module:Gone", "space 'gone': no_such_module:Gone cannot be imported"),
        ("space:gone=json:Gone", "space 'gone': json:Gone cannot be imported"),
    ],
)
def test_a_wrong_entry_is_one_line(monkeypatch, capsys, entry, message):
    monkeypatch.setattr(registry, "COMPONENTS", copy.deepcopy(registry.COMPONENTS))
    monkeypatch.setenv(registry.ENVIRONMENT, entry)
    assert main(["list", "spaces"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("speces", "elman", "elman:Elman"), "kind 'speces' is unknown"),
        (("space", "elman", "elman"), "expected a target like 'module:Class', got 'elman'"),
    ],
)
def test_a_wrong_line_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        registry.register(*arguments)
