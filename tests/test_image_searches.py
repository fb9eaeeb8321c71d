"""Every strategy on every space of image networks: one line of the recipe changes."""

import pytest
import tiny

from lmnas.runs.directory import Run
from lmnas.runs.experiment import Experiment
from lmnas.runs.progress import Display
from lmnas.runs.recipe import load_recipe

SPACES = {
    "darts-conv": {"cells": 3, "n_nodes": 2},
    "enas-micro": {"cells": 4, "n_nodes": 2},
    "enas-macro": {"layers": 3},
}
SEARCHES = {
    "random with sharing": {"strategy": {"name": "random"}},
    "random, each trained alone": {"strategy": {"name": "random"}, "estimator": "standalone"},
    "ENAS": {"strategy": {"name": "reinforce", "hidden": 8, "rewards_per_round": 4, "rewards_per_update": 2}},
    "DARTS, first order": {"strategy": {"name": "gradient", "order": 1}},
    "DARTS, second order": {"strategy": {"name": "gradient", "order": 2}},
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("space", SPACES)
def test_it_proposes_networks_of_the_space(space, search, tmp_path, cache):
    document = tiny.image_recipe(
        tiny.pictures(tmp_path / "pictures", n_train=8, n_valid=3),
        space={"name": space, **SPACES[space]},
        strategy=SEARCHES[search]["strategy"],
        search={"seeds": 1, "candidates": 1, "batch": 1},
    )
    document["estimator"]["name"] = SEARCHES[search].get("estimator", "shared")
    recipe = load_recipe(document)
    with Run(tmp_path / "run", recipe) as run, Display(quiet=True) as display:
        experiment = Experiment(run, display)
        (row,) = experiment.run_stages(("search",))["candidates"]
        (found,) = experiment._found()
    assert 0 <= row["value"] <= 100 and row["is_proxy"] == (document["estimator"]["name"] == "shared")
    assert found.space == space and found.id == row["genotype_id"]
    experiment.space.check(found)
