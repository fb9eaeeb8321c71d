"""What a run will need, before it starts: which kernel pays, whether its trainings fit into memory.

`plan` is asked before there is a run directory and again when a run is opened; the run keeps the first answer
(`lmnas.runs.kernel_choice`).
"""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lmnas.core import registry
from lmnas.core.contracts import Batch, Choice, Model, SharingStrategy, Space, Task, relaxed
from lmnas.core.errors import UserError
from lmnas.core.seeds import rng
from lmnas.nn.cost import (
    PLAIN_FLOPS,
    Forecast,
    available,
    example_choice,
    forward_flops,
    on_meta,
    step_forecast,
    training_bytes,
)
from lmnas.nn.kernels import DEFAULT_CHUNK, Decided, decide, unavailable
from lmnas.nn.training.settings import Training
from lmnas.runs.build import build_model, open_device, open_space, open_strategy, open_task, space_for
from lmnas.runs.checks import given_genotype
from lmnas.runs.executors.base import default_threads
from lmnas.runs.kernel_choice import Pin, read_pin
from lmnas.runs.recipe import Recipe, load_recipe, resolved

SMALL_CHUNK = DEFAULT_CHUNK // 8
"""Logits held at once where memory is short."""
BACKWARD = 2.0
"""Operations of backward, in forwards."""


def plan(recipe: Recipe, run: Path | None = None, asked: str | None = None) -> Pin:
    """The kernel and the size of the loss' chunks that a run at `run` takes or keeps.

    Args:
        run: its directory, which need not exist.
        asked: the kernel asked for; default: the recipe's.

    Raises:
        UserError: the fused kernel is asked for and cannot be had; or a training does not fit into memory.
    """
    asked = recipe.execution.kernel if asked is None else asked
    before = read_pin(run) if run is not None else None
    device = open_device(recipe.execution.device)
    kernel, why = _kernel(recipe, device, before, asked)
    chunk = fitting_chunk(recipe, device, kernel, DEFAULT_CHUNK if before is None else before.chunk)
    return Pin(kernel, why, chunk)


def _kernel(recipe: Recipe, device: torch.device, before: Pin | None, asked: str) -> tuple[Decided, str]:
    if before is not None and asked in ("auto", before.kernel):
        return before.kernel, before.why
    parts = [(section, getattr(recipe, section)["name"]) for section in ("space", "task")]
    if not any(registry.component(section, name).kernels for section, name in parts):
        neither = " nor ".join(f"{section} {name!r}" for section, name in parts)
        if asked == "fused":
            raise UserError(f"kernel 'fused': neither {neither} has one; 'auto' takes the plain kernel")
        return "reference", f"neither {neither} has another"
    if asked == "fused":
        problem = unavailable()
        if problem:
            raise UserError(f"kernel 'fused': {problem}; 'auto' falls back to the reference")
        return "fused", "asked for"
    if asked == "reference":
        return "reference", "asked for"
    if device.type != "cpu":
        return "reference", f"device {device.type}"
    return decide(lambda: seconds_of_work(recipe))


# ------------------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class _Example:
    """A model of a training, on `meta`, with its largest batch and what it runs."""

    where: str
    training: Training
    model: Model
    batch: Batch
    choice: Choice


def _examples(recipe: Recipe, task: Task, space: Space) -> Iterator[_Example]:
    """Of the final training and, where the estimator trains, of the search."""
    genotype = given_genotype(recipe, space) or space.sample(rng(recipe.seed, "preflight"))
    body_space = space_for(recipe, genotype)

    def stand_alone(where: str, training: Training) -> _Example:
        batch = task.largest_batch(training.batch_settings(task))
        return _Example(
            where, training, on_meta(lambda: build_model(task, genotype, training, space=body_space)), batch, None
        )

    yield stand_alone("train.training", recipe.train.training)
    settings = registry.settings_of("estimator", recipe.estimator, "estimator")
    training = settings.get("training")
    if recipe.genotype is not None or training is None:
        return
    where = "estimator.training"
    if "shared-weights" not in registry.component("estimator", recipe.estimator["name"]).provides:
        yield stand_alone(where, training)
        return
    model_settings = training.model_settings(task)
    shared = relaxed(space, where)
    model = on_meta(lambda: task.model(shared.supernet(model_settings.width), model_settings))
    mixture = "mixture" in registry.component("strategy", recipe.strategy["name"]).needs
    choice = example_choice(space, mixture, rng(recipe.seed, "preflight"))
    sizes: list[dict[str, Any]] = [{}]
    if settings.get("valid_batch_size"):
        sizes.append({"batch_size": settings["valid_batch_size"]})
    for changed in sizes:
        batches = replace(training, batches={**training.batches, **changed}).batch_settings(task)
        yield _Example(where, training, model, task.largest_batch(batches), choice)


def seconds_of_work(recipe: Recipe) -> float:
    """Seconds that the plain kernel takes for a whole run, from its products alone, at `PLAIN_FLOPS`.

        tokens x operations per token x (forward and backward), for
        search    seeds x epochs (the weights' step, and what the strategy learns beside it; rewards are forwards), or
                  candidates x epochs of stand-alone training
        select    candidates kept x seeds x epochs
        train     (searched and random models) x seeds x epochs

    Baselines of other spaces run other code and are left out.
    """
    return _seconds_of_work(_key(recipe))


@functools.lru_cache(maxsize=4)
def _seconds_of_work(key: str) -> float:
    recipe, task, space = _opened(key)
    passes: dict[str, float] = {}
    lengths: dict[str, float] = {}
    for example in _examples(recipe, task, space):
        stream = task.stream("train", example.training.batch_settings(task), recipe.seed)
        tokens = example.batch.n_targets
        per_token = forward_flops(example.model, example.batch, example.choice) / tokens
        targets = stream.next().n_targets
        epoch = stream.steps_per_epoch * targets * per_token
        lengths.setdefault(example.where, example.training.passes(stream.steps_per_epoch, targets))
        passes.setdefault(example.where, epoch)
    epoch = passes["train.training"] * (1 + BACKWARD)
    pools = 1 + sum(baseline.source == "random" for baseline in recipe.baselines.values())
    total = pools * recipe.train.seeds * lengths["train.training"] * epoch
    if recipe.genotype is None:
        where = "estimator.training"
        kept = min(recipe.select.keep, recipe.search.candidates) * recipe.search.seeds
        total += pools * kept * recipe.select.seeds * recipe.select.epochs * epoch
        total += recipe.search.seeds * _search_flops(
            recipe, task, space, passes.get(where, 0.0), lengths.get(where, 0.0)
        )
    return total / PLAIN_FLOPS


def _search_flops(recipe: Recipe, task: Task, space: Space, epoch: float, epochs: float) -> float:
    """Of one search of so many `epochs`; `epoch` is one pass over its text, forward."""
    settings = registry.settings_of("estimator", recipe.estimator, "estimator")
    if not epoch:
        return 0.0
    training: Training = settings["training"]
    if "shared-weights" not in registry.component("estimator", recipe.estimator["name"]).provides:
        return recipe.search.candidates * epochs * epoch * (1 + BACKWARD)
    strategy = open_strategy(recipe, space, task, 0)
    assert isinstance(strategy, SharingStrategy)
    learned = strategy.learn_passes if "mixture" in strategy.needs else 0
    steps = task.stream("train", training.batch_settings(task), recipe.seed).steps_per_epoch
    rewards = strategy.rewards_per_round * epoch / steps
    return epochs * (epoch * (1 + BACKWARD) * (1 + learned) + rewards)


# ----------------------------------------------------------------------------------------------------- memory


def _key(recipe: Recipe) -> str:
    return json.dumps({**resolved(recipe), "execution": {}}, sort_keys=True)


def _opened(key: str) -> tuple[Recipe, Task, Space]:
    recipe = load_recipe(json.loads(key))
    return recipe, open_task(recipe), open_space(recipe)


@functools.lru_cache(maxsize=8)
def _forecasts(key: str, kernel: Decided) -> tuple[tuple[str, Forecast, bool, bool], ...]:
    """(place, one step, whether weights are averaged, whether the best are kept) of every training."""
    recipe, task, space = _opened(key)
    copies, by_gradient = 0, False
    if recipe.genotype is None:
        strategy = open_strategy(recipe, space, task, 0)
        if isinstance(strategy, SharingStrategy):
            copies, by_gradient = strategy.weight_copies, "mixture" in strategy.needs
    found = []
    for example in _examples(recipe, task, space):
        optimizer = example.training.optimizer
        alone = example.choice is None
        velocity = int(optimizer.heavy_ball)
        step = step_forecast(
            example.model,
            example.batch,
            example.choice,
            kernel,
            optimizer_copies=optimizer.copies,
            # a strategy that learns by gradient is given the velocity as values of its own
            copies=0 if alone else copies + velocity * by_gradient,
        )
        found.append((example.where, step, alone and optimizer.averaging != "none", alone))
    return tuple(found)


def forecasts(recipe: Recipe, kernel: Decided, chunk: int) -> dict[str, int]:
    """Bytes that each training of a recipe takes at its peak, by its place in the recipe; the baselines left out."""
    found: dict[str, int] = {}
    for where, step, averaged, best in _forecasts(_key(recipe), kernel):
        total = training_bytes(step.with_chunk(chunk), averaged=averaged, best=best)
        found[where] = max(total, found.get(where, 0))
    return found


def fitting_chunk(recipe: Recipe, device: torch.device, kernel: Decided, chunk: int) -> int:
    """`chunk`, or a smaller one where memory is short.

    Raises:
        UserError: a training does not fit even so.
    """
    workers = recipe.execution.workers
    there = available(device, workers, recipe.execution.threads or default_threads(workers))
    for candidate in dict.fromkeys((chunk, min(chunk, SMALL_CHUNK))):
        needed = forecasts(recipe, kernel, candidate)
        if max(needed.values()) <= there:
            return candidate
    where = max(needed, key=lambda place: needed[place])
    each = f" for each of {workers} workers" if workers > 1 else ""
    lower = f"{where}.batches.batch_size, {where}.model.width" + (" or execution.workers" if workers > 1 else "")
    raise UserError(
        f"{where}: needs about {needed[where] / 2**30:.2f} GiB of memory at its peak, "
        f"{max(there, 0) / 2**30:.2f} GiB are available{each}; lower {lower}"
    )
