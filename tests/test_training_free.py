"""A training-free search end to end, and models built in the recipe's own space."""

import json

import tiny
from command_line import answer, write_recipe

from lmnas.core.genotype import load_genotype
from lmnas.runs.build import build_model, open_task, space_for
from lmnas.runs.recipe import load_recipe
from lmnas.spaces.recurrent.graph_body import GraphBody


def graph_recipe(path, text, **estimator):
    return write_recipe(
        path,
        text,
        space={"name": "recurrent-graph", "inner_layers": [6]},
        estimator={"name": "hidden-covariance", "training": tiny.training(), **estimator},
        search={"seeds": 1, "candidates": 6, "batch": 3},
        select={"keep": 2, "epochs": 1, "seeds": 1},
        train={"seeds": 1, "training": tiny.training()},
        baselines={"gru": {"source": "nas-bench-nlp-gru"}},
    )


def test_search_by_hidden_covariance(tmp_path, cache):
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(150))
    path = graph_recipe(tmp_path / "recipe.yaml", text)
    found = answer("search", path, "--run", tmp_path / "run")
    assert found["genotype"]["space"] == "recurrent-graph"
    assert {score["model"] for score in found["scores"]} == {"searched", "gru"}
    again = answer("search", path, "--run", tmp_path / "run")
    assert again["scores"] == found["scores"]
    # the trained model has the layers of the recipe's space
    recipe = load_recipe(str(path))
    genotype = load_genotype(tmp_path / "run" / "genotype.json")
    model = build_model(open_task(recipe), genotype, recipe.train.training, space=space_for(recipe, genotype))
    assert isinstance(model.body, GraphBody) and model.body.widths == [6, 4]
    fitted = json.loads((tmp_path / "run" / "results.json").read_text())
    counted = next(s for s in fitted["scores"] if s["model"] == "searched")["n_parameters"]
    assert counted == sum(parameter.numel() for parameter in model.parameters())
    # a cell that the recipe's space does not hold is built in one that covers it
    gru = load_genotype("nas-bench-nlp-gru")
    assert space_for(recipe, gru).inner_layers == ()
