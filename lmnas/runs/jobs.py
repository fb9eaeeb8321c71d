"""What a worker does: six kinds of jobs, each a pure function of the run's recipe and a few plain arguments.

prepare   train the shared weights of one search                    -> its directory's prepared.safetensors
estimate  score genotypes with that search's estimator              -> values
fit       train one stand-alone model from scratch                  -> model.safetensors and its validation score
test      evaluate a fitted model on the test split                 -> value
compress  take units out of a trained model (lmnas.nn.sparsity)        -> model.safetensors, smaller, and its genotype
finetune  train the smaller model a little                          -> as fit
"""

import contextlib
import fcntl
import functools
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lmnas.core import registry
from lmnas.core.contracts import Estimator, Model, Proposal, Score, Space, Strategy, Task
from lmnas.core.errors import Diverged, Unscored, UserError
from lmnas.core.files import digest
from lmnas.core.genotype import Genotype
from lmnas.core.job import PREPARED, Job, read_result, read_spec
from lmnas.nn.sparsity.training import OUTER, Sparsity, layout, sparsify
from lmnas.nn.train import Training, fit, initialise, n_parameters, save_weights
from lmnas.runs.kernel_choice import read_pin
from lmnas.runs.recipe import Recipe, load_recipe

Report = Callable[[dict[str, Any]], None]
DENSE = "dense.safetensors"
"""The weights that a compression began from, in its directory."""


def open_task(recipe: Recipe, *, fresh: bool = False) -> Task:
    """One corpus serves all jobs of a process; `fresh` looks at its files again."""
    if fresh:
        _open_task.cache_clear()
    return _open_task(json.dumps(recipe.task, sort_keys=True))


@functools.lru_cache(maxsize=1)
def _open_task(section: str) -> Task:
    return registry.create("task", json.loads(section))


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
    """Where a model of a recipe is built: in the recipe's own space, whose settings may shape the body (its layers), if
    that holds `genotype`; else in one that covers it.

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
    """Raises UserError where there is no such device."""
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
    """The width whose number of parameters comes nearest to `target` (it grows with the width)."""

    def count(width: int) -> int:
        return count_parameters(task, genotype, replace(training, model={**training.model, "width": width}), space)

    low, high = 1, 2
    while count(high) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < target else (low, middle)
    return min((low, high), key=lambda width: (abs(count(width) - target), width))


# --------------------------------------------------------------------------------------------------------- the kinds


def _prepare(run: Path, recipe: Recipe, job: Job, device: torch.device, *, search: int) -> dict[str, Any]:
    space, task = open_space(recipe), open_task(recipe)
    estimator = open_estimator(recipe, space, task, search, device)
    estimator.prepare(open_strategy(recipe, space, task, search), job)
    return {"seconds": job.seconds}


def _estimate(
    run: Path,
    recipe: Recipe,
    job: Job,
    device: torch.device,
    *,
    search: int,
    genotypes: list[Any],
    prepared: str | None,
    terms: list[dict[str, Any]] | None = None,
    parents: list[str | None] | None = None,
) -> dict[str, Any]:
    task = open_task(recipe)
    estimator = open_estimator(recipe, open_space(recipe), task, search, device)
    if prepared is not None:
        estimator.load(intact(run, prepared, PREPARED).parent)
    values = []
    for number, document in enumerate(genotypes):
        proposal = Proposal.from_terms(Genotype.from_dict(document), terms[number] if terms else {})
        parent = parents[number] if parents else None
        try:
            score = estimator.estimate(
                proposal, recipe.seed + search, job, None if parent is None else run / "jobs" / parent
            )
            values.append(_estimated(score))
        except Diverged as failure:
            status = "unscored" if isinstance(failure, Unscored) else "diverged"
            values.append({"value": None, "failure": str(failure), "status": status})
        job.progress(number + 1, len(genotypes), "scoring candidates")
    return {"values": values, "seconds": job.seconds}


def _estimated(score: Score) -> dict[str, Any]:
    found = {"value": score.value, "n_predictions": score.n_predictions, "split": score.split}
    further = {"further": dict(score.further)} if score.further else {}
    return {**found, **further, **{key: n for key, n in asdict(score.cost).items() if n and key != "seconds"}}


def _fit(
    run: Path, recipe: Recipe, job: Job, device: torch.device, *, genotype: Any, seed: int, epochs: int, model: Any
) -> dict[str, Any]:
    task = open_task(recipe)
    training = replace(recipe.train.training, epochs=epochs, model={**recipe.train.training.model, **model})
    value = Genotype.from_dict(genotype)
    net = initialise(build_model(task, value, training, space=space_for(recipe, value)), seed).to(device)
    return fit(net, task, training, seed, job, device)


def _test(run: Path, recipe: Recipe, job: Job, device: torch.device, *, fitted: str) -> dict[str, Any]:
    spec = read_spec(run / "jobs" / fitted)
    assert spec is not None, fitted
    score = evaluate_saved(run, recipe, spec, intact(run, fitted, "model.safetensors"), device, job)
    return {**score, "seconds": job.seconds}


def _compress(
    run: Path,
    recipe: Recipe,
    job: Job,
    device: torch.device,
    *,
    dense: dict[str, Any],
    digest: str,
    seed: int,
    learning_rate: float,
    sparsity: dict[str, Any],
) -> dict[str, Any]:
    task = open_task(recipe)
    training = at_rate(recipe.train.training, learning_rate)
    settings = Sparsity(**sparsity)
    net = load_model(recipe, task, dense, run / DENSE).to(device)
    found = sparsify(net, task, training, settings, seed, job, device)
    strips = layout(net)
    kept = {
        family.name: torch.zeros(family.size, dtype=torch.bool).index_fill(
            0, torch.tensor(found["kept"][family.name]), True
        )
        for family in strips.families
    }
    genotype, width = smaller_genotype(Genotype.from_dict(dense["genotype"]), found["kept"])
    model = {**dense["model"], "width": width}
    changed = replace(training, model={**training.model, **model})
    reduced = build_model(task, genotype, changed, space=space_for(recipe, genotype)).to(device)
    reduced.load_state_dict(strips.cut(net.state_dict(), kept))
    batches = training.batch_settings(task)
    masked, cut = (task.evaluate(m, "valid", batches) for m in (net, reduced))
    # one function twice, but for the order of its sums
    assert abs(masked.value - cut.value) <= 1e-3 * abs(masked.value), (masked.value, cut.value)
    save_weights(reduced, job)
    return {
        **found,
        "genotype": genotype.to_dict(),
        "model": model,
        "n_parameters_before": n_parameters(net),
        "n_parameters": n_parameters(reduced),
        "masked_value": masked.value,
        "value": cut.value,
        "n_predictions": cut.n_predictions,
        "split": "valid",
        "seconds": job.seconds,
    }


def _finetune(
    run: Path,
    recipe: Recipe,
    job: Job,
    device: torch.device,
    *,
    genotype: Any,
    model: Any,
    seed: int,
    epochs: int,
    learning_rate: float,
    reduced: str,
) -> dict[str, Any]:
    task, before = open_task(recipe), read_result(run / "jobs" / reduced)
    assert before is not None, reduced
    spec = {"genotype": genotype, "model": model}
    net = load_model(recipe, task, spec, intact(run, reduced, "model.safetensors")).to(device)
    given = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    kept = {"value": before["value"], "n_predictions": before["n_predictions"], "epoch": 0, "steps": 0}
    result = {**kept, "n_parameters": n_parameters(net), "tokens_per_second": None}
    if epochs:
        result = fit(
            net, task, replace(at_rate(recipe.train.training, learning_rate), epochs=epochs), seed, job, device
        )
        if not task.objective.better(result["value"], before["value"]):
            result = {**result, **kept, "steps": result["steps"]}
            net.load_state_dict(given)
    save_weights(net, job)
    return {**result, "seconds": job.seconds}


def at_rate(training: Training, learning_rate: float) -> Training:
    """The same training by SGD at another rate."""
    optimizer = replace(training.optimizer, method="sgd", learning_rate=learning_rate, decay=1.0)
    return replace(training, optimizer=optimizer)


def smaller_genotype(genotype: Genotype, kept: dict[str, list[int]]) -> tuple[Genotype, int]:
    """What is left of an `lstm` or `recurrent-layers`, and its width; an `lstm` stays one while all layers agree."""
    layers = genotype.choices["layers"]
    width = len(kept[OUTER])
    inner = [len(kept[f"layer {i}"]) for i in range(1, layers)]
    if genotype.space != "recurrent-layers" and all(units == width for units in inner):
        return genotype, width
    cell = genotype.choices.get("cell", "lstm")
    units = {f"units_{i}": count for i, count in enumerate(inner, start=1)}
    return Genotype("recurrent-layers", {"cell": cell, "layers": layers, **units}), width


def load_model(recipe: Recipe, task: Task, spec: dict[str, Any], weights: Path) -> Model:
    """A trained model from its weights and the spec of the job that fitted it.

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


def evaluate_saved(
    run: Path, recipe: Recipe, spec: dict[str, Any], weights: Path, device: torch.device, job: Job | None = None
) -> dict[str, Any]:
    """The test score of saved weights, with what the task details of it; `spec` is the fit job's."""
    task = open_task(recipe)
    net = load_model(recipe, task, spec, weights).to(device)
    tick = None if job is None else (lambda done: job.progress(done, 1.0, "testing"))
    score = task.evaluate(net, "test", recipe.train.training.batch_settings(task), tick=tick)
    found = {"value": score.value, "n_predictions": score.n_predictions, "split": score.split}
    return {**found, "details": dict(score.details)} if score.details else found


KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    "prepare": _prepare,
    "estimate": _estimate,
    "fit": _fit,
    "test": _test,
    "compress": _compress,
    "finetune": _finetune,
}


def run_job(
    run: Path,
    name: str,
    spec: dict[str, Any],
    device: str,
    report: Report = lambda update: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Do the job `name` of a run, or continue it, or return what it gave before.

    Args:
        spec: `{"kind": ..., arguments...}`, plain data.

    Returns:
        The result with `status`: `ok`, `diverged` or `out-of-memory` (then with `failure`, one line).

    Raises:
        Interrupted: `stop` said so; the state is saved.
    """
    directory = run / "jobs" / name
    directory.mkdir(parents=True, exist_ok=True)
    # a worker whose driver was killed may live for another step: wait for it
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = read_result(directory)
        if done is not None:
            if (directory / "checkpoints").is_dir():  # a kill came between the result and this
                Job(directory).checkpoints.delete()
            return done
        job = Job(directory, report, stop)
        job.write_spec(spec)
        recipe = load_recipe(str(run / "recipe.yaml"))
        # as the run began: the kernels' sums differ in order, and a continued run must not change its bits
        pin = read_pin(run)
        if pin is not None:
            pin.apply()
        arguments = {key: value for key, value in spec.items() if key != "kind"}
        try:
            result = {"status": "ok", **KINDS[spec["kind"]](run, recipe, job, open_device(device), **arguments)}
        except Diverged as failure:
            result = {"status": "diverged", "failure": str(failure), "step": failure.step, "seconds": job.seconds}
        except (MemoryError, torch.OutOfMemoryError) as failure:
            result = {"status": "out-of-memory", "failure": _first_line(failure), "seconds": job.seconds}
        except RuntimeError as failure:
            # the CPU allocator has no exception type of its own
            if "can't allocate memory" not in str(failure):
                raise
            result = {"status": "out-of-memory", "failure": _first_line(failure), "seconds": job.seconds}
        job.finish(
            {**result, "files": {path.name: digest(path.read_bytes()) for path in directory.glob("*.safetensors")}}
        )
        with contextlib.suppress(OSError):
            job.checkpoints.delete()
        return result


def intact(run: Path, job: str, name: str) -> Path:
    """The file `name` that a finished job left, checked against the digest in its result.

    Raises:
        UserError: it is gone or was changed since.
    """
    path = run / "jobs" / job / name
    expected = (read_result(path.parent) or {}).get("files", {}).get(name)
    try:
        found = digest(path.read_bytes())
    except OSError:
        found = None
    if found is None or found != expected:
        raise UserError(f"{path} is {'gone' if found is None else 'broken'}; delete {path.parent} to make it anew")
    return path


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
