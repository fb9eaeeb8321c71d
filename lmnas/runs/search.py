"""The search stage: ask, estimate, record, tell; one loop for every strategy, estimator and space.

Replaying finished jobs repeats a search exactly, so a search that was killed continues from its record.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lmnas.core import registry
from lmnas.core.contracts import Cost, Estimator, Proposal, Strategy, Trial
from lmnas.core.errors import UserError
from lmnas.core.job import PREPARED
from lmnas.core.names import JobName
from lmnas.methods.estimators.shared import prepared_strategy
from lmnas.runs.build import open_strategy
from lmnas.runs.driver import Driver
from lmnas.runs.job_kinds.estimate import Estimate
from lmnas.runs.job_kinds.prepare import Prepare
from lmnas.runs.record import Record
from lmnas.runs.work import NamedSpec, intact


def search(driver: Driver) -> None:
    """Propose and score, once for every search seed.

    Raises:
        UserError: every candidate failed.
    """
    recipe = driver.recipe
    if driver.started.given is not None:
        return
    estimator: type[Estimator] = registry.component("estimator", recipe.estimator["name"])
    record = driver.record("search")
    seeds = range(recipe.search.seeds)
    prepares = "shared-weights" in estimator.provides
    if prepares:
        driver.do([(str(JobName("search", seed=s)), Prepare(s).spec()) for s in seeds])
    for s in seeds:
        strategy = open_strategy(recipe, driver.space, driver.task, s)
        prepared = JobName("search", seed=s) if prepares else None
        if prepared:
            result = driver.result(prepared)
            if result["status"] != "ok":
                driver.display.message(f"{prepared}: {result['failure']}; this search has no candidates")
                continue
            directory = intact(driver.run.job(str(prepared)), PREPARED).parent
            strategy.load_state_dict(prepared_strategy(directory))
        propose(driver, strategy, estimator, record, s, prepared)
    if not any(trial["value"] is not None for trial in record.trials()):
        refuse_failures(driver, record, prepares)


def propose(
    driver: Driver,
    strategy: Strategy,
    estimator: type[Estimator],
    record: Record,
    s: int,
    prepared: JobName | None,
) -> None:
    """The loop of search number `s`."""
    settings = driver.recipe.search
    told = 0
    trial_jobs: list[str] = []  # of every trial so far, the job that estimated it
    while told < settings.candidates:
        proposals = strategy.ask(min(settings.batch, settings.candidates - told))
        if not proposals:
            break
        groups = [proposals] if estimator.is_cheap else [[proposal] for proposal in proposals]
        jobs: list[NamedSpec] = []
        for group in groups:
            name = str(JobName("search", seed=s, trial=len(trial_jobs)))
            jobs.append((name, _estimate(group, s, prepared, trial_jobs).spec()))
            trial_jobs += [name] * len(group)
        driver.do(jobs)
        trials: list[Trial] = []
        for (name, _), group in zip(jobs, groups, strict=True):
            result = driver.result(name)
            missing = {"value": None, "failure": result.get("failure"), "status": result["status"]}
            values = result.get("values") or [missing] * len(group)
            for proposal, value in zip(group, values, strict=True):
                notes = {"search_seed": s, "is_proxy": estimator.is_proxy, "split": value.get("split", "valid")}
                seconds = result["seconds"] / len(group)
                trial = finished(driver, proposal, told + len(trials), value, seconds, notes)
                record.add(f"{s}/{trial.number}", trial)
                trials.append(trial)
        strategy.tell(trials)
        told += len(trials)


def _estimate(group: Sequence[Proposal], s: int, prepared: JobName | None, trial_jobs: Sequence[str]) -> Estimate:
    """The job that estimates `group`.

    Raises:
        UserError: a parent that is no earlier trial.
    """
    job = Estimate(s, [p.genotype.to_dict() for p in group], None if prepared is None else str(prepared))
    if not any(p.terms() for p in group):
        return job
    for proposal in group:
        if proposal.parent is not None and not 0 <= proposal.parent < len(trial_jobs):
            raise UserError(
                f"strategy: a proposal's parent is trial {proposal.parent}; there are {len(trial_jobs)} so far"
            )
    parents = [None if p.parent is None else trial_jobs[p.parent] for p in group]
    return replace(job, terms=[p.terms() for p in group], parents=parents)


def finished(
    driver: Driver, proposal: Proposal, number: int, value: dict[str, Any], seconds: float, notes: dict[str, Any]
) -> Trial:
    """The trial of one proposal, from its entry in a job's result."""
    cost = Cost(seconds, value.get("steps", 0), value.get("tokens", 0))
    if value["value"] is None or not math.isfinite(value["value"]):
        status, failure = value.get("status", "failed"), value.get("failure", "score is not finite")
        return Trial(proposal, number, {}, status if status != "ok" else "failed", failure, cost, notes)
    scores = {driver.task.objective.name: value["value"], **value.get("further", {})}
    return Trial(proposal, number, scores, cost=cost, notes=notes)


def refuse_failures(driver: Driver, record: Record, prepares: bool) -> None:
    """Raises UserError with the causes of a search without any candidate."""
    names = [JobName("search", seed=s) for s in range(driver.recipe.search.seeds)] if prepares else []
    causes = {driver.result(name).get("failure") for name in names}
    causes |= {trial.get("failure") for trial in record.trials()}
    listed = "; ".join(sorted(str(cause) for cause in causes if cause)) or "no cause given"
    remedy = "; a smaller learning rate or clip is the usual remedy" if "diverged at step" in listed else ""
    raise UserError(f"search: every candidate failed ({listed}){remedy}")
