"""Results of a run, collected from its records: the content of `results.json`."""

import contextlib
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

import optuna

from lmnas.core.contracts import Objective
from lmnas.core.genotype import Genotype, load_genotype
from lmnas.core.job import read_result, read_spec
from lmnas.core.names import JobName
from lmnas.report.verdict import SEARCHED, Wording, summarise
from lmnas.runs.build import Opened, covering_space
from lmnas.runs.directory import Run
from lmnas.runs.record import Record

FORMAT = 1


def collect(run: Run, opened: Opened, environment: dict[str, Any]) -> dict[str, Any]:
    """All results of a run from its records; parts that are still to come are empty."""
    recipe, objective = opened.recipe, opened.task.objective
    finished = list(_finished(run))
    scores = [score for name, result in finished for score in _scores(run, opened, name, result)]
    results: dict[str, Any] = {
        "format": FORMAT,
        "name": recipe.name,
        "objective": {key: value for key, value in asdict(objective).items() if value is not None},
        "noun": opened.space.noun,
        "data": opened.task.data(),
        "environment": environment,
        "seed": recipe.seed,
        "candidates": _candidates(run, opened, objective),
        "scores": scores,
        "verdict": None,
        "costs": _costs(finished),
    }
    genotype_path = run.path / "genotype.json"
    if genotype_path.is_file():
        results |= _genotype(load_genotype(genotype_path))
    if any(score["split"] == "test" for score in scores):
        wording = Wording.of(opened.space, opened.task)
        results["verdict"] = summarise(scores, objective, recipe.level, wording)
        results |= _details(run)
    return results


def _finished(run: Run) -> Iterable[tuple[JobName, dict[str, Any]]]:
    """Every finished job with its result, in order of name; what is broken is done again, and left out until then."""
    for path in sorted((run.path / "jobs").glob("*/result.json")):
        name, result = JobName.parse(path.parent.name), read_result(path.parent)
        if name is not None and result is not None and "status" in result:
            yield name, result


def _costs(finished: Iterable[tuple[JobName, dict[str, Any]]]) -> dict[str, float]:
    """Seconds of work by stage."""
    costs: dict[str, float] = {}
    for name, result in finished:
        key = f"{name.stage}_seconds"
        costs[key] = costs.get(key, 0.0) + result.get("seconds", 0.0)
    return {key: round(value, 3) for key, value in costs.items()}


def _scores(run: Run, opened: Opened, name: JobName, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries of `scores` of one job; a diverged training has value None and its cause."""
    settings = opened.recipe.train
    models = (SEARCHED, *opened.recipe.baselines)
    seeds = range(opened.recipe.seed, opened.recipe.seed + settings.seeds)
    if name.stage not in ("train", "test") or name.subject not in models or name.seed not in seeds:
        return []
    directory = run.job(str(replace(name, stage="train")))
    spec, fitted = read_spec(directory), read_result(directory)
    if spec is None or fitted is None:  # its training is done again
        return []
    score = {
        "model": name.subject,
        "genotype_id": Genotype.from_dict(spec["genotype"]).id,
        "split": result.get("split", "valid" if name.stage == "train" else "test"),
        "value": result.get("value"),
        "seed": name.seed,
        "n_parameters": fitted.get("n_parameters"),
        "n_predictions": result.get("n_predictions"),
        "stage": name.stage,
        "tokens_per_second": fitted.get("tokens_per_second"),
        "seconds": fitted.get("seconds"),
    }
    if "failure" in result:
        score["failure"] = result["failure"]
    if name.stage == "train" and result["status"] != "ok":  # it has no model to test, and the verdict must say so
        return [score, {**score, "split": "test"}]
    return [score]


def _genotype(genotype: Genotype) -> dict[str, Any]:
    """The genotype that was found, and its diagram."""
    diagram = covering_space(genotype).diagram(genotype)
    return {
        "genotype": {**genotype.to_dict(), "id": genotype.id},
        "diagram": {"title": diagram.title, "nodes": diagram.nodes, "edges": diagram.edges},
    }


def _details(run: Run) -> dict[str, Any]:
    """`details` of the test of the model that is handed over, where its task gives any."""
    model = _exported(run)
    tested = read_result(run.job(str(JobName("test", SEARCHED, model["seed"])))) if model else None
    if not model or not tested or "details" not in tested:
        return {}
    return {"details": {"model": SEARCHED, "seed": model["seed"], **tested["details"]}}


def _exported(run: Run) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        document = json.loads((run.path / "model.json").read_text(encoding="utf-8"))
        return document if isinstance(document, dict) and "seed" in document else None
    return None


def _candidates(run: Run, opened: Opened, objective: Objective) -> list[dict[str, Any]]:
    """All trials: proxy scores of the search, then the short trainings of the selection."""
    if not (run.path / "study.db").is_file():
        return []
    stored = optuna.get_all_study_names(run.storage)
    return [
        {
            "stage": stage,
            "source": trial.get("source", SEARCHED),
            "search_seed": trial.get("search_seed"),
            "genotype_id": trial["genotype_id"],
            "value": trial["value"],
            "split": trial["split"],
            "is_proxy": trial["is_proxy"],
            "failure": trial.get("failure"),
        }
        for stage in ("search", "select")
        if stage in stored
        for trial in Record(run, stage, objective, opened.space).trials()
    ]
