"""Recipes: complete, resolvable, and overridden by dotted names."""

import dataclasses
import functools

import pytest
import tiny
import yaml

from lmnas.core import registry
from lmnas.core.errors import UserError
from lmnas.core.genotype import load_genotype
from lmnas.core.settings import settings_model
from lmnas.runs.recipe import (
    RECIPES,
    SECTIONS,
    as_document,
    differences,
    load_recipe,
    override,
    recipe_names,
    resolved,
    trainings,
)


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load_without_data_and_resolve_to_themselves(name, monkeypatch, tmp_path):
    opened = []
    for task in (registry.component("task", known) for known in registry.names("task")):
        # with the signature, which says what settings there are
        noted = functools.wraps(task.__init__)(lambda self, **settings: opened.append(settings))
        monkeypatch.setattr(task, "__init__", noted)
    recipe = load_recipe(name)
    assert not opened, "loading a recipe must not open its data"
    assert recipe.name == name and recipe.description
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(resolved(recipe)))
    again = load_recipe(str(path))
    assert differences(resolved(again), resolved(recipe)) == []
    for baseline in recipe.baselines.values():
        assert baseline.source == "random" or load_genotype(baseline.source)
    assert recipe.genotype is None or load_genotype(recipe.genotype).space == recipe.space["name"]


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_name_paper_expectation_and_length(name):
    header = [line for line in (RECIPES / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    text = " ".join(header).lower()
    assert "paper" in text and "expected" in text and ("minute" in text or "hour" in text or "cost" in text)


def test_resolved_recipes_hold_every_setting():
    document = resolved(load_recipe(tiny.recipe("pydoc")))
    assert set(document) == {f.name for f in dataclasses.fields(load_recipe(tiny.recipe("pydoc")))}
    assert document["space"]["activations"] == ["tanh", "relu", "sigmoid", "identity"]
    assert document["strategy"] == {"name": "random", "distinct": True}
    assert document["task"]["level"] == "word"
    assert document["train"]["training"]["optimizer"]["clip"] == 0.25
    for section in SECTIONS:
        known = settings_model(registry.component(section, document[section]["name"])).model_fields
        assert set(document[section]) == {"name", *known}


def load(**overrides):
    return load_recipe(tiny.recipe("pydoc"), {key.replace("__", "."): value for key, value in overrides.items()})


def test_a_given_genotype_needs_no_relaxation():
    """Recipes of 0.1.0 train an LSTM under the settings of any search."""
    with pytest.raises(UserError, match="needs a space with a relaxation"):
        load(space="lstm")
    assert load(space="lstm", genotype="lstm-1").genotype == "lstm-1"


def test_dotted_overrides():
    recipe = load(train__training__epochs=7, train__training__model__width=12, seed=3, baselines__more__source="lstm-3")
    assert recipe.train.training.epochs == 7 and recipe.train.training.model == {"width": 12}
    assert recipe.seed == 3 and recipe.baselines["more"].source == "lstm-3" and "lstm" in recipe.baselines


def test_a_mapping_is_not_changed():
    document = tiny.recipe("pydoc")
    load_recipe(document, {"train.seeds": 9, "strategy": "gradient"})
    assert document == tiny.recipe("pydoc")


def test_a_component_by_name_drops_the_settings_of_the_old_one_but_keeps_the_training():
    document = {
        "strategy": {"name": "gradient", "order": 2},
        "estimator": {"name": "shared", "training": {"epochs": 3}},
    }
    for dotted in ("strategy", "strategy.name"):
        changed = {**document, "strategy": dict(document["strategy"])}
        override(changed, dotted, "random")
        assert changed["strategy"] == {"name": "random"}
    for dotted in ("estimator", "estimator.name"):
        changed = {"estimator": {**document["estimator"], "valid_batch_size": 3}}
        override(changed, dotted, "standalone")
        assert changed["estimator"] == {"name": "standalone", "training": {"epochs": 3}}


def test_the_same_name_keeps_the_settings():
    document = {"strategy": {"name": "gradient", "order": 2}}
    override(document, "strategy", "gradient")
    override(document, "strategy.name", "gradient")
    assert document == {"strategy": {"name": "gradient", "order": 2}}


def test_overrides_may_come_in_any_order():
    for order in (["strategy", "strategy.order"], ["strategy.order", "strategy"]):
        values = {"strategy": "gradient", "strategy.order": 2}
        recipe = load_recipe(tiny.recipe("pydoc"), {name: values[name] for name in order})
        assert recipe.strategy == {"name": "gradient", "order": 2}


def test_numbers_that_yaml_reads_as_text_are_numbers():
    # YAML 1.1 wants a dot in 1e-3
    recipe = load_recipe(tiny.recipe("pydoc"), {"train.training.optimizer.learning_rate": "1e-3"})
    assert recipe.train.training.optimizer.learning_rate == 1e-3


def test_trainings_names_both_places():
    assert [where for where, _ in trainings(load())] == ["train.training", "estimator.training"]


def test_differences_name_the_component_first():
    first = resolved(load())
    second = resolved(load(strategy="gradient", seed=4))
    assert [place for place, _, _ in differences(first, second)][:2] == ["seed", "strategy.name"]
    assert differences(first, as_document(first)) == []


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"train.training.model.width": None}, "train.training.model.width: input should be a valid integer, got None"),
        ({"execution": {"workers": 2, "gpu": 1}}, "execution.gpu: unknown setting"),
        ({"baselines.lstm.model": {"widht": 3}}, "baselines.lstm.model.widht: unknown setting. Did you mean 'width'?"),
        ({"name": "x" * 500 + "\n"}, "name: expected a name that can be part of a file name"),
        ({"train.training.optimizer.momentun": 0.9}, "Did you mean 'momentum'?"),
    ],
)
def test_refusals_name_the_place(overrides, message):
    with pytest.raises(UserError) as refusal:
        load_recipe(tiny.recipe("pydoc"), overrides)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_given_genotype_asks_nothing_of_strategy_and_estimator():
    """The default estimator trains shared weights, which a space without a relaxation has not."""
    document = tiny.recipe("pydoc", space={"name": "lstm"})
    with pytest.raises(UserError, match="'shared' needs a space with a relaxation; space 'lstm' has none"):
        load_recipe(document)
    assert load_recipe({**document, "genotype": "lstm-1"}).genotype == "lstm-1"
