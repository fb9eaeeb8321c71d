"""Building what a recipe names: task, space, strategy, estimator, and models around a body."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lmnas.core import registry
from lmnas.core.contracts import Estimator, Model, Space, Strategy, Task
from lmnas.core.errors import UserError
from lmnas.core.genotype import Genotype
from lmnas.core.job import Job
from lmnas.nn.train import n_parameters
from lmnas.nn.training.settings import Training
from lmnas.runs.recipe import Recipe


@dataclass(frozen=True)
class Opened:
    """A recipe with its task (data read) and space, and the device that its jobs run on."""

    recipe: Recipe
    task: Task
    space: Space
    device: torch.device


def open_recipe(recipe: Recipe, device: str | None = None) -> Opened:
    """Open everything that a recipe names.

    Raises:
        UserError: no such device or data, or a space with invalid settings.
    """
    found = open_device(recipe.execution.device if device is None else device)
    return Opened(recipe, open_task(recipe), open_space(recipe), found)


def open_task(recipe: Recipe) -> Task:
    """The recipe's task; its data is read anew."""
    return registry.create("task", recipe.task)


def open_space(recipe: Recipe) -> Space:
    return registry.create("space", recipe.space)


def covering_space(genotype: Genotype) -> Space:
    """A space that can build and draw `genotype`; it is checked.

    Raises:
        UserError: unknown space, or not a genotype of it.
    """
    space = registry.component("space", genotype.space).covering(genotype)
    space.check(genotype)
    return space


def space_for(recipe: Recipe, genotype: Genotype) -> Space:
    """Space in which a model of a recipe is built: the recipe's own, whose settings may shape the body (its layers), if
    it holds `genotype`; else one that covers it.

    Raises:
        UserError: unknown space, or not a genotype of it.
    """
    if genotype.space == recipe.space["name"]:
        space = open_space(recipe)
        with contextlib.suppress(UserError):
            space.check(genotype)
            return space
    return covering_space(genotype)


def open_strategy(recipe: Recipe, space: Space, task: Task, search: int) -> Strategy:
    return registry.create("strategy", recipe.strategy, space, task.objective, recipe.seed + search)


def open_estimator(recipe: Recipe, space: Space, task: Task, search: int, device: torch.device) -> Estimator:
    return registry.create("estimator", recipe.estimator, space, task, recipe.seed + search, device)


def open_device(name: str) -> torch.device:
    """Open a device by its name.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"execution.device {name!r}: not usable here ({first}); `auto` takes what there is") from None
    return device


def build_model(
    task: Task,
    genotype: Genotype,
    training: Training,
    where: str = "training.model",
    space: Space | None = None,
) -> Model:
    """A model around the body that `space` builds; default: a space that covers the genotype."""
    settings = training.model_settings(task, where)
    return task.model((space or covering_space(genotype)).build(genotype, settings.width), settings)


def count_parameters(task: Task, genotype: Genotype, training: Training, space: Space | None = None) -> int:
    """Parameters of a model, none of them allocated."""
    with torch.device("meta"):
        return n_parameters(build_model(task, genotype, training, space=space))


def matching_width(task: Task, genotype: Genotype, training: Training, target: int, space: Space | None = None) -> int:
    """The legal width whose number of parameters comes nearest to `target` (it grows with the width)."""
    unit = (space or covering_space(genotype)).width_multiple(genotype)

    def count(units: int) -> int:
        width = units * unit
        return count_parameters(task, genotype, replace(training, model={**training.model, "width": width}), space)

    low, high = 1, 2
    while count(high) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < target else (low, middle)
    return unit * min((low, high), key=lambda units: (abs(count(units) - target), units))


def load_model(recipe: Recipe, task: Task, spec: Mapping[str, Any], weights: Path) -> Model:
    """A trained model from its weights and the spec of the job that fitted it (genotype, model).

    Raises:
        UserError: the file is missing, broken or of another model.
    """
    training = replace(recipe.train.training, model={**recipe.train.training.model, **spec["model"]})
    genotype = Genotype.from_dict(spec["genotype"])
    net = build_model(task, genotype, training, space=space_for(recipe, genotype))
    try:
        net.load_state_dict(load_file(weights))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model {weights}: cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    return net


def evaluate_saved(opened: Opened, spec: Mapping[str, Any], weights: Path, job: Job | None = None) -> dict[str, Any]:
    """The test score of saved weights, with what the task details of it; `spec` is the fit job's."""
    recipe, task = opened.recipe, opened.task
    net = load_model(recipe, task, spec, weights).to(opened.device)
    tick = None if job is None else (lambda done: job.progress(done, 1.0, "testing"))
    score = task.evaluate(net, "test", recipe.train.training.batch_settings(task), tick=tick)
    found = {"value": score.value, "n_predictions": score.n_predictions, "split": score.split}
    return {**found, "details": dict(score.details)} if score.details else found
