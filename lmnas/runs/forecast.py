"""Forecast of a run before it starts: jobs, seconds, and the memory of each of its trainings.

Everything is read from workloads, which the run states for its final training and an estimator for its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from lmnas.core import registry
from lmnas.core.contracts import Model, Strategy, Workload
from lmnas.core.errors import UserError
from lmnas.core.genotype import Genotype
from lmnas.core.seeds import rng
from lmnas.nn.cost import (
    PLAIN_FLOPS,
    TRAINING_PASSES,
    StepBytes,
    available,
    forward_flops,
    on_meta,
    step_forecast,
    training_bytes,
)
from lmnas.nn.kernels import DEFAULT_CHUNK
from lmnas.runs.build import Opened, build_model, open_estimator, open_strategy, space_for
from lmnas.runs.executors.base import default_threads
from lmnas.runs.recipe import Recipe

SMALL_CHUNK = DEFAULT_CHUNK // 8
"""Logits held at once where memory is short."""


@dataclass(frozen=True)
class Forecast:
    """Expected jobs, time and memory of a run.

    Attributes:
        jobs: number of jobs.
        seconds: of the plain kernel, from its products alone.
        bytes: of each training at its peak, by its place in the recipe.
    """

    jobs: int
    seconds: float
    bytes: dict[str, int]


def workloads(opened: Opened, given: Genotype | None) -> tuple[Workload, ...]:
    """The final training's, then those of a search (none where the genotype is given)."""
    recipe, task, space = opened.recipe, opened.task, opened.space
    training = recipe.train.training
    genotype = given or space.sample(rng(recipe.seed, "preflight"))
    batches, body_space = training.batch_settings(task), space_for(recipe, genotype)
    final = Workload(
        "train.training",
        training,
        lambda: build_model(task, genotype, training, space=body_space),
        None,
        (batches,),
        (("train", batches),),
        lambda steps, targets: training.passes(steps, targets) * TRAINING_PASSES,
        keeps_best=True,
        averaged=training.optimizer.averaging != "none",
    )
    if given is not None:
        return (final,)
    strategy: Strategy = open_strategy(recipe, space, task, 0)
    estimator = open_estimator(recipe, space, task, 0, opened.device)
    return (final, *estimator.workload(strategy))


# ------------------------------------------------------------------------------------------------------------- jobs


def n_jobs(recipe: Recipe) -> int:
    """Number of jobs of a whole run in which nothing fails."""
    pools = 1 + sum(baseline.source == "random" for baseline in recipe.baselines.values())
    models = 1 + len(recipe.baselines)
    total = 2 * models * recipe.train.seeds
    if recipe.genotype is None:
        estimator = registry.component("estimator", recipe.estimator["name"])
        batches = ceil(recipe.search.candidates / recipe.search.batch)
        estimates = batches if estimator.is_cheap else recipe.search.candidates
        total += recipe.search.seeds * (estimates + ("shared-weights" in estimator.provides))
    kept = _kept(recipe)
    return total + (pools * kept * recipe.select.seeds if kept > 1 else 0)


def _kept(recipe: Recipe) -> int:
    """Candidates of one pool that are trained shortly."""
    if recipe.genotype is not None:
        return 0
    return min(recipe.select.keep, recipe.search.candidates) * recipe.search.seeds


# ------------------------------------------------------------------------------------------------------------- time


def seconds_of_work(opened: Opened, work: Sequence[Workload]) -> float:
    """Seconds that the plain kernel takes for a whole run, from its products alone, at `PLAIN_FLOPS`.

        tokens x operations per token x passes, for
        search    what the estimator's workloads say, in each search or for each candidate
        select    candidates kept x seeds x epochs
        train     (searched and random models) x seeds x epochs

    Baselines of other spaces run other code and are left out.
    """
    recipe = opened.recipe
    epochs = {each.where: _epoch_flops(opened, each) for each in reversed(work)}
    epoch, length = epochs["train.training"]
    pools = 1 + sum(baseline.source == "random" for baseline in recipe.baselines.values())
    total = pools * recipe.train.seeds * length * epoch
    total += pools * _kept(recipe) * recipe.select.seeds * recipe.select.epochs * TRAINING_PASSES * epoch
    for each in work[1:]:
        epoch, length = epochs[each.where]
        times = recipe.search.candidates if each.per_candidate else 1
        total += recipe.search.seeds * times * length * epoch
    return total / PLAIN_FLOPS


def _epoch_flops(opened: Opened, work: Workload) -> tuple[float, float]:
    """(operations of one forward pass over the training split, number of such passes)."""
    batches = work.batches[0]
    largest = opened.task.largest_batch(batches)
    per_target = forward_flops(on_meta(work.model), largest, work.choice) / largest.n_targets
    stream = opened.task.stream("train", batches, opened.recipe.seed)
    n_targets = stream.next().n_targets
    return stream.steps_per_epoch * n_targets * per_target, work.passes(stream.steps_per_epoch, n_targets)


# ----------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Need:
    """Memory of one training: one step, and what is held between steps."""

    workload: Workload
    step: StepBytes

    def bytes(self, chunk: int) -> int:
        """Bytes at the peak, with `chunk` logits held at once."""
        work = self.workload
        return training_bytes(self.step.with_chunk(chunk), averaged=work.averaged, best=work.keeps_best)


def _weightless(work: Workload) -> Model:
    """The workload's model on `meta`.

    Raises:
        UserError: its size exceeds what torch can count.
    """
    try:
        return on_meta(work.model)
    except (RuntimeError, TypeError) as error:
        if "overflow" not in str(error).lower():  # torch counts bytes in 64 bits
            raise
        raise UserError(f"{work.where}.model: no machine holds a model that large") from None


def needs(opened: Opened, work: Sequence[Workload], kernel: str) -> list[Need]:
    """The memory of every training; the baselines left out."""
    found = []
    for each in work:
        model, optimizer = _weightless(each), each.training.optimizer
        for batches in each.batches:
            batch = opened.task.largest_batch(batches)
            step = step_forecast(
                model, batch, each.choice, kernel, optimizer_copies=optimizer.copies, copies=each.copies
            )
            found.append(Need(each, step))
    return found


def peaks(found: Sequence[Need], chunk: int) -> dict[str, int]:
    """Bytes that each training takes at its peak, by its place in the recipe."""
    peaks: dict[str, int] = {}
    for need in found:
        where = need.workload.where
        peaks[where] = max(need.bytes(chunk), peaks.get(where, 0))
    return peaks


def fitting_chunk(opened: Opened, found: Sequence[Need], chunk: int) -> int:
    """`chunk`, or a smaller one where memory is short.

    Raises:
        UserError: a training does not fit even so.
    """
    execution = opened.recipe.execution
    workers = execution.workers
    there = available(opened.device, workers, execution.threads or default_threads(workers))
    for candidate in dict.fromkeys((chunk, min(chunk, SMALL_CHUNK))):
        needed = peaks(found, candidate)
        if max(needed.values()) <= there:
            return candidate
    where = max(needed, key=lambda place: needed[place])
    each = f" for each of {workers} workers" if workers > 1 else ""
    lower = f"{where}.batches.batch_size, {where}.model.width" + (" or execution.workers" if workers > 1 else "")
    raise UserError(
        f"{where}: needs about {needed[where] / 2**30:,.2f} GiB of memory at its peak, "
        f"{max(there, 0) / 2**30:,.2f} GiB are available{each}; lower {lower}"
    )
