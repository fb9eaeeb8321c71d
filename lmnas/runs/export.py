"""The final stages: train the winner and the baselines, hand over the best model, test all of them."""

import json
import shutil
from dataclasses import replace
from typing import Any

from lmnas.core.errors import UserError
from lmnas.core.files import write_atomic, write_json
from lmnas.core.genotype import Genotype
from lmnas.core.names import JobName
from lmnas.runs.build import count_parameters, evaluate_saved, matching_width, space_for
from lmnas.runs.driver import SEARCHED, Driver, fit_job
from lmnas.runs.executors.base import on_threads
from lmnas.runs.job_kinds.test import Test
from lmnas.runs.select import winners
from lmnas.runs.work import intact


def train(driver: Driver) -> None:
    """Train winner and baselines from scratch, every one with the same seeds."""
    genotypes = winners(driver)
    overrides = model_overrides(driver, genotypes)
    document = {**genotypes[SEARCHED].to_dict(), "name": driver.recipe.name}
    write_json(driver.run.path / "genotype.json", document)
    settings = driver.recipe.train
    driver.do(
        [
            fit_job(JobName("train", name, seed), genotype, settings.training.epochs, overrides[name])
            for seed in driver.seeds(settings.seeds)
            for name, genotype in genotypes.items()
        ]
    )
    export(driver)


def model_overrides(driver: Driver, genotypes: dict[str, Genotype]) -> dict[str, dict[str, Any]]:
    """Settings of every model that differ from the recipe's: baselines match the searched model's parameters."""
    recipe, task = driver.recipe, driver.task
    training = recipe.train.training
    spaces = {name: space_for(recipe, genotype) for name, genotype in genotypes.items()}
    target = count_parameters(task, genotypes[SEARCHED], training, spaces[SEARCHED])
    overrides: dict[str, dict[str, Any]] = {SEARCHED: {}}
    for name, baseline in recipe.baselines.items():
        overrides[name] = dict(baseline.model)
        if baseline.match_parameters:
            changed = replace(training, model={**training.model, **baseline.model})
            overrides[name]["width"] = matching_width(task, genotypes[name], changed, target, spaces[name])
    return overrides


def export(driver: Driver) -> None:
    """The searched model of the best seed by validation, with what its user needs.

    Raises:
        UserError: no training of it came to an end.
    """
    fitted = [JobName("train", SEARCHED, seed) for seed in driver.seeds(driver.recipe.train.seeds)]
    values: dict[JobName, Any] = {name: driver.result(name).get("value") for name in fitted}
    good = [name for name in fitted if values[name] is not None]
    if not good:
        raise UserError(
            f"train: the searched model diverged with every seed ({driver.result(fitted[0]).get('failure')}); "
            "a smaller train.training.optimizer.learning_rate or clip may help"
        )
    best = min(good, key=lambda name: driver.task.objective.key(values[name]))
    run, source = driver.run.path, driver.run.job(str(best))
    write_atomic(run / "model.safetensors", intact(source, "model.safetensors").read_bytes())
    shutil.copyfile(source / "job.json", run / "model.json")
    driver.task.save_assets(run)


def test(driver: Driver) -> None:
    """The test split, once for every trained model."""
    seeds = driver.seeds(driver.recipe.train.seeds)
    fitted = [JobName("train", name, seed) for seed in seeds for name in winners(driver)]
    done = [name for name in fitted if driver.result(name)["status"] == "ok"]
    driver.do([(str(replace(name, stage="test")), Test(str(name)).spec()) for name in done])


def reload(driver: Driver) -> dict[str, Any]:
    """Load `model.safetensors` as its user would and test it again: {"value", "recorded", "difference"}."""
    run = driver.run.path
    path = run / "model.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); `lmnas train {run}` writes it anew") from None
    with on_threads(driver.threads):
        score = evaluate_saved(driver.started.opened, document, run / "model.safetensors")
    recorded = driver.result(JobName("test", SEARCHED, document["seed"]))["value"]
    return {"value": score["value"], "recorded": recorded, "difference": abs(score["value"] - recorded)}
