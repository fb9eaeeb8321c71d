"""`lmnas compress RUN`: a run's trained recurrent model with fewer units, a dense network of the same kind.

The directory that it writes is like a run's: recipe.yaml, genotype.json, model.safetensors, model.json, results.json,
jobs; `lmnas.load` opens it. `dense.safetensors` and `dense.json` are the model that it began from, `strips.svg` shows
the norms of the strips. Killed or stopped, the same command continues; finished, it gives the same answer again.
"""

import argparse
import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from lmnas.core.contracts import Model, Task
from lmnas.core.errors import Interrupted, UserError
from lmnas.core.files import digest, write_atomic, write_json
from lmnas.core.genotype import Genotype
from lmnas.core.job import read_result, read_spec
from lmnas.nn.sparsity.training import Sparsity, layout
from lmnas.report.plots import FAINT, MODEL_COLOURS, STYLE, save
from lmnas.runs.build import covering_space, load_model
from lmnas.runs.directory import Run
from lmnas.runs.environment import environment
from lmnas.runs.executors.base import Setup, default_threads
from lmnas.runs.executors.inline import Inline
from lmnas.runs.job_kinds.compress import DENSE, Compress, smaller_genotype
from lmnas.runs.job_kinds.finetune import Finetune
from lmnas.runs.job_kinds.test import Test
from lmnas.runs.kernel_choice import read_pin, write_pin
from lmnas.runs.progress import Display, Stop
from lmnas.runs.recipe import Recipe
from lmnas.runs.start import open_checked
from lmnas.runs.work import Spec, job_call

FORMAT = 1
SPEC = "dense.json"
PICTURE = "strips.svg"
AFTER_ADAM = 1.0
"""Learning rate of SGD where the run used Adam, whose rate does not carry over."""


def run(options: argparse.Namespace, display: Display) -> dict[str, Any]:
    """Compress, or continue to; returns the results with `run` and `out`.

    Raises:
        UserError: no such run, no trained model, a body without strips, a directory of something else, or a strength
            at which nothing is left.
        Interrupted: a stop was asked for; everything is saved.
    """
    _check(options)
    source, out = options.run, options.out or options.run / "compressed"
    if out.resolve() == source.resolve():
        raise UserError(f"--out {out}: it is the run itself; name another folder")
    with Run(source) as opened:
        recipe, pin = opened.recipe, read_pin(source)
        weights, dense = _trained(source)
    if (out / "recipe.yaml").is_file() and not (out / SPEC).is_file():
        raise UserError(f"--out {out}: the folder holds a run of its own; name another")
    here = open_checked(recipe, source).opened
    _check_reducible(load_model(recipe, here.task, dense, source / "model.safetensors"), dense)
    first = _job(options, recipe, dense, digest(weights))
    threads = recipe.execution.threads or default_threads(1)
    with Run(out, recipe) as opened:
        _begin(opened, first.spec(), weights, dense)
        if pin is not None:
            write_pin(out, pin)
            pin.apply()
        done = _jobs(options, out, str(here.device), threads, first, display)
        results = {
            "format": FORMAT,
            "name": f"{recipe.name}, compressed",
            "objective": asdict(here.task.objective),
            "data": here.task.data(),
            "environment": environment(here.device, threads),
            **_found(first, options.epochs, done),
        }
        _leave(opened, here.task, results)
    return {**results, "run": str(source), "out": str(out), "pictures": [str(out / PICTURE)]}


def _check_reducible(model: Model, dense: dict[str, Any]) -> None:
    """Refuse a model that cannot be made smaller: its body has no strips, or its space has no smaller genotypes."""
    smaller_genotype(
        Genotype.from_dict(dense["genotype"]), {family.name: family.size for family in layout(model).families}
    )


def _check(options: argparse.Namespace) -> None:
    for name, low in (("rounds", 1), ("round_epochs", 1), ("epochs", 0)):
        if getattr(options, name) < low:
            raise UserError(f"--{name.replace('_', '-')}: expected at least {low}, got {getattr(options, name)}")
    for name in ("strength", "learning_rate"):
        value = getattr(options, name)
        if value is not None and not (0 < value < math.inf):
            raise UserError(f"--{name.replace('_', '-')}: expected a positive number, got {value}")
    if not 0 < options.share <= 1:
        raise UserError(f"--share: expected a number above 0, at most 1, got {options.share}")
    if not 0 <= options.threshold < 1:
        raise UserError(f"--threshold: expected a number from 0 to below 1, got {options.threshold}")


def _trained(path: Path) -> tuple[bytes, dict[str, Any]]:
    """A run's saved weights, and the spec of the job that fitted them."""
    try:
        dense = json.loads((path / "model.json").read_text(encoding="utf-8"))
        weights = (path / "model.safetensors").read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"run {path}: it has no trained model ({error}); `lmnas train {path}` makes one") from None
    if not isinstance(dense, dict) or not {"genotype", "model"} <= dense.keys():
        raise UserError(f"{path / 'model.json'}: expected an object with genotype and model")
    covering_space(Genotype.from_dict(dense["genotype"], str(path / "model.json")))
    return weights, dense


def _job(options: argparse.Namespace, recipe: Recipe, dense: dict[str, Any], weights: str) -> Compress:
    """The job that takes the units out; defaults filled in."""
    training = recipe.train.training
    rate = training.optimizer.learning_rate / 4 if training.optimizer.part.heavy_ball else AFTER_ADAM
    sparsity = Sparsity(
        strength=options.strength,
        rounds=options.rounds,
        round_epochs=options.round_epochs,
        dynamic=options.pruning == "dynamic",
        share=options.share,
        threshold=options.threshold,
        curvature=options.curvature,
    )
    kept = {key: dense[key] for key in ("genotype", "model")}
    return Compress(kept, weights, options.seed, options.learning_rate or rate, asdict(sparsity))


def _begin(out: Run, spec: dict[str, Any], weights: bytes, dense: dict[str, Any]) -> None:
    """Put the dense model there; a directory of another compression is refused, of one that failed begun anew."""
    found = read_spec(out.job("compress"))
    if found is not None and found != spec:
        if (read_result(out.job("compress")) or {}).get("status", "ok") == "ok":
            raise UserError(
                f"--out {out.path}: it holds another compression ({_difference(found, spec)}); name another"
            )
        shutil.rmtree(out.path / "jobs")
    write_atomic(out.path / DENSE, weights)
    write_json(out.path / SPEC, dense)


def _jobs(
    options: argparse.Namespace, out: Path, device: str, threads: int, first: Compress, display: Display
) -> dict[str, dict[str, Any]]:
    """The results of the three jobs by their names: units taken out, the smaller model trained, and tested."""
    stop = Stop(display)
    executor = Inline(1, Setup(threads), display.update, lambda: stop.asked)

    def do(name: str, spec: Spec) -> dict[str, Any]:
        ((_, result),) = executor.run([job_call(out, device, name, spec)])
        if stop.asked:
            raise Interrupted
        if result["status"] != "ok":
            raise UserError(f"compress {options.run}: {result['failure']}")
        return result

    with stop:
        cut = do("compress", first.spec())
        tune = Finetune(
            cut["genotype"], cut["model"], options.seed, options.epochs, first.learning_rate, reduced="compress"
        )
        return {
            "compress": cut,
            "finetune": do("finetune", tune.spec()),
            "test": do("test", Test("finetune").spec()),
        }


def _found(first: Compress, epochs: int, done: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Findings of the jobs, after the settings that they had."""
    cut, tuned, tested = done["compress"], done["finetune"], done["test"]
    genotype = Genotype.from_dict(cut["genotype"])
    settings = {key: value for key, value in first.spec().items() if key not in ("kind", "dense", "digest")}
    return {
        **settings,
        "strength": cut["strength"],
        "epochs": epochs,
        "genotype": {**genotype.to_dict(), "id": genotype.id},
        "before": {
            "genotype_id": Genotype.from_dict(first.dense["genotype"]).id,
            "n_parameters": cut["n_parameters_before"],
            "units": {name: len(norms) for name, norms in cut["rounds"][-1]["norms"].items()},
            **{split: score["value"] for split, score in cut["before"].items()},
        },
        "masked": {"valid": cut["masked_value"]},
        "cut": {"valid": cut["value"]},
        "after": {
            "genotype_id": genotype.id,
            "n_parameters": cut["n_parameters"],
            "units": {name: len(kept) for name, kept in cut["kept"].items()},
            "valid": tuned["value"],
            "test": tested["value"],
            "fine_tuned_epochs": tuned["epoch"],
        },
        "kept": cut["kept"],
        "begin": cut["begin"],
        "rounds": cut["rounds"],
        "seconds": {name: result["seconds"] for name, result in done.items()},
    }


def _leave(run: Run, task: Task, results: dict[str, Any]) -> None:
    """Put the smaller model, its genotype, the results and their picture there."""
    tuned = run.job("finetune")
    genotype = {key: value for key, value in results["genotype"].items() if key != "id"}
    write_json(run.path / "genotype.json", {**genotype, "name": results["name"]})
    shutil.copyfile(tuned / "job.json", run.path / "model.json")
    write_atomic(run.path / "model.safetensors", (tuned / "model.safetensors").read_bytes())
    task.save_assets(run.path)
    run.write_results(results)
    save(picture(results), run.path / PICTURE)


def _difference(found: dict[str, Any], spec: dict[str, Any]) -> str:
    """The first setting that differs, in words."""
    there, here = ({**document, **document["sparsity"]} for document in (found, spec))
    for key in here:
        if key != "sparsity" and there.get(key) != here[key]:
            if key in ("dense", "digest"):
                return "of another model"
            return f"{key} is {there.get(key)} there and {here[key]} here"
    return "other settings"


def text(document: dict[str, Any]) -> str:
    before, after, objective = document["before"], document["after"], document["objective"]
    units = ", ".join(f"{name} {before['units'][name]} -> {count}" for name, count in after["units"].items())
    lines = [
        f"units: {units}",
        f"parameters: {before['n_parameters']:,} -> {after['n_parameters']:,} "
        f"({after['n_parameters'] / before['n_parameters']:.1%})",
    ]
    for split in ("valid", "test"):
        lines.append(f"{split} {objective['name']}: {before[split]:.2f} -> {after[split]:.2f} {objective['unit']}")
    if before["units"] == after["units"]:
        lines.append(
            f"no unit was taken out at strength {document['strength']:.2g}; half of them were to go at "
            f"{document['begin']['break_even']:.2g}"
        )
    lines.append(f"model: {document['out']} (norms of its strips: {document['pictures'][0]})")
    return "\n".join(lines)


def picture(results: dict[str, Any]) -> Figure:
    """Norms of every family's strips after each round, ordered by the last; survivors in colour."""
    families = list(results["kept"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.6 + 2.1 * len(families)), layout="constrained")
        axes = figure.subplots(len(families), 1, squeeze=False)[:, 0]
        for panel, family in zip(axes, families, strict=True):
            rounds = [row["norms"][family] for row in results["rounds"]]
            order = np.argsort(rounds[-1], kind="stable")[::-1].tolist()
            for number, norms in enumerate(rounds):
                last = number == len(rounds) - 1
                values = [norms[n] for n in order]
                if not last:
                    panel.plot(
                        values, color=FAINT, alpha=0.25 + 0.5 * number / len(rounds), label=f"round {number + 1}"
                    )
            kept = set(results["kept"][family])
            colours = [MODEL_COLOURS["searched"] if n in kept else MODEL_COLOURS["random"] for n in order]
            panel.scatter(range(len(order)), [rounds[-1][n] for n in order], s=8, c=colours, zorder=3)
            panel.set_title(f"{family}: {len(kept)} of {len(order)} strips kept")
            panel.set_ylabel("norm")
            panel.set_ylim(bottom=0)
            if len(rounds) > 1:
                panel.legend()
        axes[-1].set_xlabel("strips, by their last norm")
    return figure
