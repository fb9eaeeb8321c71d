"""The selection stage: pools of candidates, short trainings of the best few, and the winner of each pool."""

import math
import statistics
from typing import Any

from lmnas.core.contracts import Proposal
from lmnas.core.errors import UserError
from lmnas.core.genotype import Genotype, load_genotype
from lmnas.core.job import read_result
from lmnas.core.names import JobName
from lmnas.core.seeds import rng
from lmnas.runs.build import covering_space
from lmnas.runs.driver import SEARCHED, Driver, fit_job
from lmnas.runs.search import finished

MORE_ROUNDS = 3
"""Number of further pools that are tried after pools whose candidates all failed."""


def select(driver: Driver) -> None:
    """Retrain the candidates shortly; a pool of one needs none. Where all of a pool fail, the next best follow."""
    settings = driver.recipe.select
    seeds = driver.seeds(settings.seeds)
    asked: set[str] = set()
    while True:
        competing = {name: pool for name, pool in pools(driver).items() if len(pool) > 1}
        jobs = dict(
            fit_job(JobName("select", genotype.id, seed), genotype, settings.epochs, {})
            for pool in competing.values()
            for genotype in pool
            for seed in seeds
        )
        due = [job for job in jobs.items() if job[0] not in asked]
        if not due:
            break
        if asked:
            driver.display.message("select: every candidate of a pool failed; the next ones follow")
        driver.do(due)
        asked |= jobs.keys()
    record = driver.record("select")
    for name, pool in competing.items():
        for genotype in pool:
            for seed in seeds:
                result = driver.result(JobName("select", genotype.id, seed))
                notes = {"source": name, "seed": seed, "is_proxy": False, "split": "valid"}
                value: dict[str, Any] = {"value": None, **result}
                trial = finished(driver, Proposal(genotype), 0, value, result["seconds"], notes)
                record.add(f"{name}/{genotype.id}/{seed}", trial)


def winners(driver: Driver) -> dict[str, Genotype]:
    """The genotype of every model: the best of its pool, or the baseline's own."""
    found = {name: pool[0] if len(pool) == 1 else best(driver, name, pool) for name, pool in pools(driver).items()}
    for name, baseline in driver.recipe.baselines.items():
        if baseline.source != "random":
            found[name] = load_genotype(baseline.source)
            covering_space(found[name])
    return found


def best(driver: Driver, name: str, pool: list[Genotype]) -> Genotype:
    """The candidate with the best mean validation score over its short trainings; failed ones count as worst."""
    means: dict[str, float] = {}
    causes = set()
    for genotype in pool:
        jobs = [JobName("select", genotype.id, seed) for seed in driver.seeds(driver.recipe.select.seeds)]
        results = [driver.result(job) for job in jobs]
        values = [result.get("value") for result in results]
        means[genotype.id] = math.nan if None in values else statistics.fmean(v for v in values if v is not None)
        causes.add(results[0].get("failure"))
    if all(math.isnan(mean) for mean in means.values()):
        listed = "; ".join(sorted(str(cause) for cause in causes if cause))
        raise UserError(f"select: every candidate of {name!r} failed ({listed})")
    return min(pool, key=lambda genotype: driver.task.objective.key(means[genotype.id]))


# ------------------------------------------------------------------------------------------------------------ pools


def pools(driver: Driver) -> dict[str, list[Genotype]]:
    """Candidates that compete for each searched name: `searched`, and every `random` baseline as many."""
    candidates = found(driver)
    by_name = {SEARCHED: candidates}
    keep = driver.recipe.select.keep
    for name, baseline in driver.recipe.baselines.items():
        if baseline.source == "random":
            n = len(candidates) if driver.started.given is None else keep
            by_name[name] = _kept(driver, _random(driver, n + MORE_ROUNDS * keep), n)
    return by_name


def found(driver: Driver) -> list[Genotype]:
    """The best few of every search by their score, without repeats, and the next ones where all of these failed."""
    if driver.started.given is not None:
        return [driver.started.given]
    trials = driver.record("search").trials()
    chosen: dict[str, Genotype] = {}
    for s in range(driver.recipe.search.seeds):
        scored = [t for t in trials if t["search_seed"] == s and t["value"] is not None]
        scored.sort(key=lambda t: driver.task.objective.key(t["value"]))
        ranked = {trial["genotype"].id: trial["genotype"] for trial in scored}
        chosen |= {genotype.id: genotype for genotype in _kept(driver, list(ranked.values()))}
    if not chosen:
        raise UserError(f"run {driver.run.path}: no candidates yet; run the search stage first")
    return list(chosen.values())


def _kept(driver: Driver, ranked: list[Genotype], at_least: int = 0) -> list[Genotype]:
    """The first `select.keep` (or `at_least`) of `ranked`, and as many again while every one of them has failed."""
    keep = driver.recipe.select.keep
    n = max(keep, at_least)
    for _ in range(MORE_ROUNDS):
        if n >= len(ranked) or not all(_failed(driver, genotype) for genotype in ranked[:n]):
            break
        n += keep
    return ranked[:n]


def _failed(driver: Driver, genotype: Genotype) -> bool:
    """A short training of this candidate was made and gave no model."""
    names = [JobName("select", genotype.id, seed) for seed in driver.seeds(driver.recipe.select.seeds)]
    results = [read_result(driver.run.job(str(name))) for name in names]
    return any(result is not None and result["status"] != "ok" for result in results)


def _random(driver: Driver, n: int) -> list[Genotype]:
    """`n` distinct random candidates, the k-th drawn with the run's seed and k."""
    drawn: dict[str, Genotype] = {}
    for k in range(100 * n):
        if len(drawn) == n:
            break
        genotype = driver.space.sample(rng(driver.recipe.seed, "random-baseline", k))
        drawn.setdefault(genotype.id, genotype)
    return list(drawn.values())
