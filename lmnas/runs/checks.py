"""What only the data, the machine or a built model can tell is wrong with a recipe, found before any work starts."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lmnas.core import registry
from lmnas.core.capabilities import refuse_unfit
from lmnas.core.contracts import Space, Task, relaxed
from lmnas.core.errors import UserError
from lmnas.core.genotype import Genotype, load_genotype
from lmnas.core.seeds import rng
from lmnas.nn.train import n_parameters
from lmnas.runs.build import (
    count_parameters,
    covering_space,
    open_device,
    open_space,
    open_strategy,
    open_task,
    space_for,
)
from lmnas.runs.recipe import Recipe


def preflight(recipe: Recipe) -> None:
    """Refuse what only the data, the machine or a built model can tell, before any work and before a run directory.

    Raises:
        UserError
    """
    if open_device(recipe.execution.device).type == "meta":
        raise UserError("execution.device 'meta': tensors there hold no numbers; `auto` takes what there is")
    task, space = open_task(recipe, fresh=True), open_space(recipe)
    given = given_genotype(recipe, space)
    training = recipe.train.training
    _check_streams(task, "train.training", training.batch_settings(task), ["train"])
    example = given or space.sample(rng(recipe.seed, "preflight"))
    body_space = space_for(recipe, example)
    _check_size("train.training", lambda: count_parameters(task, example, training, body_space))
    for name, baseline in recipe.baselines.items():
        if baseline.source != "random":
            body = covering_space(load_genotype(baseline.source))
            refuse_unfit(f"baselines.{name}: task {task.name!r}", task.takes, body.name, body.makes)
    if given is not None:
        return
    open_strategy(recipe, space, task, 0)
    estimator = registry.component("estimator", recipe.estimator["name"])
    settings = registry.settings_of("estimator", recipe.estimator, "estimator")
    if "training" not in settings:
        return
    training = settings["training"]
    _check_streams(task, "estimator.training", training.batch_settings(task), ["train"])
    if "shared-weights" in estimator.provides:
        valid = {"batch_size": settings["valid_batch_size"]} if settings.get("valid_batch_size") else {}
        batches = replace(training, batches={**training.batches, **valid}).batch_settings(task)
        _check_streams(task, "estimator.training", batches, ["valid"])
        model = training.model_settings(task)
        shared = relaxed(space, f"estimator {recipe.estimator['name']!r}")
        _check_size("estimator.training", lambda: n_parameters(task.model(shared.supernet(model.width), model)))
    else:
        _check_size("estimator.training", lambda: count_parameters(task, example, training, body_space))


def given_genotype(recipe: Recipe, space: Space) -> Genotype | None:
    """The genotype to train instead of searching, checked."""
    if recipe.genotype is None:
        return None
    genotype = load_genotype(recipe.genotype)
    if genotype.space != space.name:
        raise UserError(
            f"genotype {recipe.genotype!r} is of space {genotype.space!r}; this recipe's space is {space.name!r}"
        )
    covering_space(genotype)
    return genotype


def _check_streams(task: Task, where: str, batches: Any, splits: list[str]) -> None:
    for split in splits:
        try:
            task.stream(split, batches, 0)
        except UserError as error:
            raise UserError(f"{where}.batches: {error}") from None


def _check_size(where: str, count: Callable[[], int]) -> None:
    """Refuse a model whose weights alone exceed this machine's memory; nothing is allocated."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with torch.device("meta"):
            size = 4 * count()
    except (RuntimeError, TypeError) as error:
        if "overflow" not in str(error).lower():  # torch counts bytes in 64 bits
            raise
        raise UserError(f"{where}.model: no machine holds a model that large") from None
    if size > memory:
        raise UserError(
            f"{where}.model: its weights take {size / 2**30:,.0f} GiB; this machine has {memory / 2**30:,.0f} GiB"
        )
