"""docs/adding.md shown true: its files and its registry lines, put through the contract tests and a small search."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import test_contracts as contracts
import tiny

import lmnas
from lmnas.cli.main import main
from lmnas.core import registry
from lmnas.core.errors import UserError
from lmnas.runs.recipe import load_recipe

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
    assert FILES.keys() == {"elman.py", "climber.py", "bits.py"}
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
@pytest.mark.parametrize("settings", [{}, {"allow_skip": False}])
def test_the_space_keeps_the_contract(registered, contract, settings):
    contract("elman", settings)


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
def test_the_strategy_keeps_the_contract(registered, contract):
    contract("climber")


def test_the_task_keeps_the_contract(registered, tmp_path):
    text = registered / "text.txt"
    contracts.test_its_data_are_described("bits-per-word", text)
    contracts.test_a_stream_continues_from_its_state("bits-per-word", text, "train")
    contracts.test_its_model_learns_from_a_batch("bits-per-word", text)
    contracts.test_evaluation_repeats_and_leaves_the_model_alone("bits-per-word", text)
    contracts.test_it_hands_over_what_a_user_needs("bits-per-word", text, tmp_path)


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
