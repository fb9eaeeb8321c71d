"""Every strategy on every space of image networks: one line of the recipe changes."""

import pytest
import tiny
import torch

from lmnas.core import registry
from lmnas.core.events import read_events
from lmnas.runs import select
from lmnas.runs.directory import Run
from lmnas.runs.experiment import Experiment
from lmnas.runs.progress import Display
from lmnas.runs.recipe import load_recipe

CPU = torch.device("cpu")
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


def error_by_hand(task, supernet, genotype):
    """Percent of the validation images, all in one batch, that one path of the supernet takes for another class."""
    images, labels = task.images.split("valid", None)
    mean, std = (part.view(3, 1, 1) for part in task.images.statistics)
    with torch.no_grad():
        found = supernet.logits((images / 255 - mean) / std, {}, genotype).argmax(1)
    return 100 * sum(map(int.__ne__, found.tolist(), labels.tolist())) / len(labels)


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
        (found,) = select.found(experiment.driver)
        if row["is_proxy"]:
            estimator = registry.create(
                "estimator", recipe.estimator, experiment.driver.space, experiment.driver.task, 0, CPU
            )
            estimator.load(tmp_path / "run" / "jobs" / "search-0")
            assert row["value"] == error_by_hand(experiment.driver.task, estimator.model, found)
        else:
            epochs = read_events(tmp_path / "run" / "jobs" / "search-0-trial-0" / "events.jsonl")
            assert row["value"] == min(event["valid"] for event in epochs if event["event"] == "epoch")
    assert row["is_proxy"] == (document["estimator"]["name"] == "shared")
    assert found.space == space and found.id == row["genotype_id"]
    experiment.driver.space.check(found)
