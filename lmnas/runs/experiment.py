"""The experiment: search -> select -> train -> test, one loop for every strategy, estimator and space.

Every stage reads what the earlier ones recorded and adds to it; each can be repeated or resumed on its own. The driver
holds no tensors: it proposes, hands jobs to an executor and records.
"""

import contextlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import optuna

from lmnas.core import registry
from lmnas.core.contracts import Cost, Proposal, Space, Strategy, Trial
from lmnas.core.errors import Interrupted, UserError
from lmnas.core.files import write_atomic, write_json
from lmnas.core.genotype import Genotype, load_genotype
from lmnas.core.job import PREPARED, read_result, read_spec
from lmnas.core.names import JobName
from lmnas.core.seeds import rng
from lmnas.core.text import seconds_text
from lmnas.core.updates import Incident, Update
from lmnas.methods.estimators.shared import prepared_strategy
from lmnas.nn.kernels import must_compile, unavailable
from lmnas.report.html import write_report
from lmnas.report.verdict import Wording, summarise
from lmnas.runs.build import (
    Opened,
    count_parameters,
    covering_space,
    evaluate_saved,
    matching_width,
    open_device,
    open_space,
    open_strategy,
    open_task,
    space_for,
)
from lmnas.runs.checks import given_genotype, preflight
from lmnas.runs.directory import Record, Run, environment
from lmnas.runs.executors.base import Executor, Setup, default_threads, on_threads, open_executor
from lmnas.runs.job_kinds.estimate import Estimate
from lmnas.runs.job_kinds.fit import Fit
from lmnas.runs.job_kinds.prepare import Prepare
from lmnas.runs.job_kinds.test import Test
from lmnas.runs.kernel_choice import FILE, Pin, read_pin, write_pin
from lmnas.runs.plan import plan
from lmnas.runs.progress import Display, Stop
from lmnas.runs.recipe import Recipe
from lmnas.runs.work import NamedSpec, intact, job_call

STAGES = ("search", "select", "train", "test", "report")
FORMAT = 1
MORE_ROUNDS = 3
"""How often a pool whose candidates all failed is followed by the next ones."""


class Experiment:
    """One open run and what its stages need.

    Args:
        run: an open run directory.
        display: where progress goes.
    """

    def __init__(self, run: Run, display: Display):
        preflight(run.recipe)
        self.run = run
        self.recipe: Recipe = run.recipe
        self.display = display
        self.task = open_task(self.recipe)
        self.space: Space = open_space(self.recipe)
        execution = self.recipe.execution
        self.device = open_device(execution.device)
        self.threads = execution.threads or default_threads(execution.workers)
        self.stop = Stop(display)
        self.executor: Executor | None = None
        self.given = given_genotype(self.recipe, self.space)

    # ------------------------------------------------------------------------------------------------------- running

    def run_stages(self, stages: tuple[str, ...] = STAGES) -> dict[str, Any]:
        """Go through `stages` in order, continuing where an earlier start stopped.

        Returns:
            The run's results.

        Raises:
            Interrupted: the user asked to stop; everything is saved.
        """
        self._check_data()
        if set(stages) != {"report"}:
            self._settle_kernel()
        environment_document = {**self.environment(), "data": self.task.data()}
        write_json(self.run.path / "environment.json", environment_document)
        self.run.note("start", stages=list(stages), environment=environment_document)
        with self._executor(), self.stop:
            for stage in stages:
                began = time.monotonic()
                getattr(self, stage)()
                self.display.message(f"{stage}: done in {seconds_text(time.monotonic() - began)}")
        self.run.note("finished", stages=list(stages))
        return self.run.results()

    def environment(self) -> dict[str, Any]:
        """What this run's results depend on besides the recipe; the kernel is the one that the run keeps."""
        found, pin = environment(self.device, self.threads), read_pin(self.run.path)
        return found if pin is None else {**found, "kernel": pin.kernel}

    def _settle_kernel(self) -> None:
        """Take the kernel that this run keeps, or decide and pin it; compile it before any worker starts.

        Raises:
            UserError: it cannot be had, or memory does not suffice.
        """
        before, asked = read_pin(self.run.path), self.run.asked_kernel
        pin = plan(self.recipe, self.run.path, asked)
        fell_back = None
        try:
            if pin.kernel == "fused" and must_compile():
                self.display.message("compiling the fused kernel, about 15 s, once")
            pin.apply()
        except UserError as problem:
            cause = problem.__cause__ or problem
            if before is not None and before.kernel == pin.kernel:
                raise UserError(
                    f"run {self.run.path} began with the fused kernel, which cannot be had now ({cause}); "
                    f"--kernel reference continues it with the plain kernel, whose sums differ in the last digits"
                ) from None
            if asked != "auto":
                raise
            fell_back = str(cause)
            pin = Pin("reference", fell_back, pin.chunk)
            pin.apply()
        if before is not None and before.kernel != pin.kernel:
            self._incident(f"kernel: {before.kernel} until now, {pin.kernel} from here on; last digits may differ")
        fast = self.space.kernels | self.task.kernels
        if before is None and asked == "auto" and self.device.type == "cpu" and fast:
            fell_back = fell_back or unavailable()
        if fell_back:
            self._incident(f"kernel: the plain one runs, which is slower: {fell_back}")
        if pin != before or not (self.run.path / FILE).is_file():
            write_pin(self.run.path, pin)

    def _incident(self, message: str) -> None:
        self.run.note("incident", job="driver", message=message)
        self.display.message(message)

    def _check_data(self) -> None:
        """A run belongs to one text: scores on another must not mix with it."""
        stored = self.run.results().get("data", {}).get("fingerprint")
        if stored is not None and stored != self.task.data()["fingerprint"]:
            raise UserError(
                f"run {self.run.path}: its data had fingerprint {stored}, the data found now has "
                f"{self.task.data()['fingerprint']}; give another --run to start anew"
            )
        self._write_results()

    @contextlib.contextmanager
    def _executor(self) -> Iterator[None]:
        execution, setup = self.recipe.execution, Setup(self.threads)
        with open_executor(
            execution.executor, execution.workers, setup, self._update, lambda: self.stop.asked
        ) as self.executor:
            yield
        self.executor = None

    def _update(self, update: Update) -> None:
        self.display.update(update)
        if isinstance(update, Incident):
            self.run.note("incident", job=update.job, message=update.message)

    def _run_jobs(self, jobs: list[NamedSpec]) -> None:
        """Do all jobs; finished ones give their results again."""
        assert self.executor is not None
        calls = [job_call(self.run.path, str(self.device), name, spec) for name, spec in jobs]
        for finished, (name, result) in enumerate(self.executor.run(calls), start=1):
            if "value" in result and result["value"] is not None:
                text = f"{self.task.objective.name} {result['value']:.2f} ({result.get('split', 'valid')})"
            else:
                text = result.get("failure", "done")
            self.display.message(f"[{finished}/{len(jobs)}] {name}: {text}")
            if self.stop.asked:
                raise Interrupted

    def _result(self, job: str) -> dict[str, Any]:
        """The result of a finished job; a stage that comes too early is the user's mistake."""
        result = read_result(self.run.job(job))
        if result is None:
            raise UserError(f"run {self.run.path}: job {job} is not finished; run the stages before this one first")
        return result

    # -------------------------------------------------------------------------------------------------------- search

    def search(self) -> None:
        """Propose and score, once for every search seed."""
        if self.given is not None:
            return
        estimator = registry.component("estimator", self.recipe.estimator["name"])
        record = Record(self.run, "search", self.task.objective, self.space)
        seeds = range(self.recipe.search.seeds)
        shared = "shared-weights" in estimator.provides
        if shared:
            self._run_jobs([(str(JobName("search", seed=s)), Prepare(s).spec()) for s in seeds])
        for s in seeds:
            strategy = open_strategy(self.recipe, self.space, self.task, s)
            prepared = str(JobName("search", seed=s)) if shared else None
            if prepared:
                result = self._result(prepared)
                if result["status"] != "ok":
                    self.display.message(f"{prepared}: {result['failure']}; this search has no candidates")
                    continue
                strategy.load_state_dict(prepared_strategy(intact(self.run.job(prepared), PREPARED).parent))
            self._propose(strategy, record, s, prepared, estimator)
        if not any(t["value"] is not None for t in record.trials()):
            causes = {self._result(str(JobName("search", seed=s))).get("failure") for s in seeds} if shared else set()
            causes |= {t.get("failure") for t in record.trials()}
            listed = "; ".join(sorted(str(cause) for cause in causes if cause)) or "no cause given"
            remedy = "; a smaller learning rate or clip is the usual remedy" if "diverged at step" in listed else ""
            raise UserError(f"search: every candidate failed ({listed}){remedy}")
        self._write_results()

    def _propose(self, strategy: Strategy, record: Record, s: int, prepared: str | None, estimator: Any) -> None:
        """The loop of one search: ask, estimate, record, tell. Replaying finished jobs repeats it exactly."""
        told = 0
        trial_jobs: list[str] = []
        while told < self.recipe.search.candidates:
            proposals = strategy.ask(min(self.recipe.search.batch, self.recipe.search.candidates - told))
            if not proposals:
                break
            groups = [proposals] if estimator.is_cheap else [[p] for p in proposals]
            jobs: list[NamedSpec] = []
            for offset, group in enumerate(groups):
                documents = [p.genotype.to_dict() for p in group]
                job = Estimate(s, documents, prepared)
                if any(p.terms() for p in group):
                    parents = [None if p.parent is None else trial_jobs[p.parent] for p in group]
                    job = replace(job, terms=[p.terms() for p in group], parents=parents)
                jobs.append((str(JobName("search", seed=s, trial=told + offset)), job.spec()))
                trial_jobs += [jobs[-1][0]] * len(group)
            self._run_jobs(jobs)
            trials: list[Trial] = []
            for (name, _), group in zip(jobs, groups, strict=True):
                result = self._result(name)
                missing = {"value": None, "failure": result.get("failure"), "status": result["status"]}
                values = result.get("values") or [missing] * len(group)
                for proposal, value in zip(group, values, strict=True):
                    number = told + len(trials)
                    notes = {"search_seed": s, "is_proxy": estimator.is_proxy, "split": value.get("split", "valid")}
                    seconds = result["seconds"] / len(group)
                    trial = self._trial(proposal, number, value, seconds, notes)
                    record.add(f"{s}/{number}", trial)
                    trials.append(trial)
            strategy.tell(trials)
            told += len(trials)

    def _trial(
        self, proposal: Proposal, number: int, value: dict[str, Any], seconds: float, notes: dict[str, Any]
    ) -> Trial:
        """What became of one proposal, from its entry in a job's result."""
        cost = Cost(seconds, value.get("steps", 0), value.get("tokens", 0))
        if value["value"] is None or not math.isfinite(value["value"]):
            status, failure = value.get("status", "failed"), value.get("failure", "score is not finite")
            return Trial(proposal, number, {}, status, failure, cost, notes)
        scores = {self.task.objective.name: value["value"], **value.get("further", {})}
        return Trial(proposal, number, scores, cost=cost, notes=notes)

    # -------------------------------------------------------------------------------------------------------- select

    def _found(self) -> list[Genotype]:
        """The best few of every search by their score, without repeats, and the next ones where all of these failed."""
        if self.given is not None:
            return [self.given]
        record = Record(self.run, "search", self.task.objective, self.space)
        chosen: dict[str, Genotype] = {}
        for s in range(self.recipe.search.seeds):
            trials = [t for t in record.trials() if t["search_seed"] == s and t["value"] is not None]
            trials.sort(key=lambda t: self.task.objective.key(t["value"]))
            ranked = {trial["genotype"].id: trial["genotype"] for trial in trials}
            kept = self._kept(list(ranked.values()))
            chosen |= {genotype.id: genotype for genotype in kept}
        if not chosen:
            raise UserError(f"run {self.run.path}: no candidates yet; run the search stage first")
        return list(chosen.values())

    def _kept(self, ranked: list[Genotype], at_least: int = 0) -> list[Genotype]:
        """The first `select.keep` (or `at_least`) of `ranked`, and as many again while every one of them has failed."""
        n = keep = self.recipe.select.keep
        n = max(n, at_least)
        for _ in range(MORE_ROUNDS):
            if n >= len(ranked) or not all(self._failed(genotype) for genotype in ranked[:n]):
                break
            n += keep
        return ranked[:n]

    def _failed(self, genotype: Genotype) -> bool:
        """Whether a short training of this candidate was made and gave no model."""
        results = [
            read_result(self.run.job(str(JobName("select", genotype.id, s))))
            for s in self._seeds(self.recipe.select.seeds)
        ]
        return any(result is not None and result["status"] != "ok" for result in results)

    def _random(self, n: int) -> list[Genotype]:
        """`n` distinct random candidates, the k-th drawn with the run's seed and k."""
        drawn: dict[str, Genotype] = {}
        for k in range(100 * n):
            if len(drawn) == n:
                break
            genotype = self.space.sample(rng(self.recipe.seed, "random-baseline", k))
            drawn.setdefault(genotype.id, genotype)
        return list(drawn.values())

    def _pools(self) -> dict[str, list[Genotype]]:
        """Candidates that compete for each searched name: `searched`, and every `random` baseline as many."""
        found = self._found()
        pools = {"searched": found}
        for name, baseline in self.recipe.baselines.items():
            if baseline.source == "random":
                n = len(found) if self.given is None else self.recipe.select.keep
                pools[name] = self._kept(self._random(n + MORE_ROUNDS * self.recipe.select.keep), n)
        return pools

    def _fit_job(self, name: JobName, genotype: Genotype, epochs: int | None, model: dict[str, Any]) -> NamedSpec:
        assert name.seed is not None
        return str(name), Fit(genotype.to_dict(), name.seed, epochs, model).spec()

    def _seeds(self, n: int) -> list[int]:
        return [self.recipe.seed + i for i in range(n)]

    def select(self) -> None:
        """Retrain the candidates shortly; a pool of one needs none. Where all of a pool fail, the next best follow."""
        settings = self.recipe.select
        asked: set[str] = set()
        while True:
            pools = {name: pool for name, pool in self._pools().items() if len(pool) > 1}
            jobs = dict(
                self._fit_job(JobName("select", genotype.id, seed), genotype, settings.epochs, {})
                for pool in pools.values()
                for genotype in pool
                for seed in self._seeds(settings.seeds)
            )
            due = [job for job in jobs.items() if job[0] not in asked]
            if not due:
                break
            if asked:
                self.display.message("select: every candidate of a pool failed; the next ones follow")
            self._run_jobs(due)
            asked |= jobs.keys()
        record = Record(self.run, "select", self.task.objective, self.space)
        for name, pool in pools.items():
            for genotype in pool:
                for seed in self._seeds(settings.seeds):
                    result = self._result(str(JobName("select", genotype.id, seed)))
                    notes = {"source": name, "seed": seed, "is_proxy": False, "split": "valid"}
                    value = {"value": None, **result}
                    trial = self._trial(Proposal(genotype), 0, value, result["seconds"], notes)
                    record.add(f"{name}/{genotype.id}/{seed}", trial)
        self._write_results()

    def winners(self) -> dict[str, Genotype]:
        """The genotype of every model: the best of its pool, or the baseline's own."""
        winners = {}
        for name, pool in self._pools().items():
            winners[name] = pool[0] if len(pool) == 1 else self._best(name, pool)
        for name, baseline in self.recipe.baselines.items():
            if baseline.source != "random":
                genotype = load_genotype(baseline.source)
                covering_space(genotype)
                winners[name] = genotype
        return winners

    def _best(self, name: str, pool: list[Genotype]) -> Genotype:
        """The candidate with the best mean validation score over its short trainings; failed ones count as worst."""
        objective = self.task.objective
        means: dict[str, float] = {}
        for genotype in pool:
            results = [
                self._result(str(JobName("select", genotype.id, seed)))
                for seed in self._seeds(self.recipe.select.seeds)
            ]
            values = [r.get("value") for r in results]
            means[genotype.id] = math.nan if None in values else statistics.fmean(v for v in values if v is not None)
        if all(math.isnan(mean) for mean in means.values()):
            causes = {
                self._result(str(JobName("select", genotype.id, self.recipe.seed))).get("failure") for genotype in pool
            }
            listed = "; ".join(sorted(str(cause) for cause in causes if cause))
            raise UserError(f"select: every candidate of {name!r} failed ({listed})")
        return min(pool, key=lambda g: objective.key(means[g.id]))

    # --------------------------------------------------------------------------------------------------------- train

    def _model_overrides(self, winners: dict[str, Genotype]) -> dict[str, dict[str, Any]]:
        """What differs in every model's settings from the recipe's: baselines match the searched model's parameters."""
        training = self.recipe.train.training
        spaces = {name: space_for(self.recipe, genotype) for name, genotype in winners.items()}
        target = count_parameters(self.task, winners["searched"], training, spaces["searched"])
        overrides: dict[str, dict[str, Any]] = {"searched": {}}
        for name, baseline in self.recipe.baselines.items():
            overrides[name] = dict(baseline.model)
            if baseline.match_parameters:
                changed = _with_model(training, baseline.model)
                overrides[name]["width"] = matching_width(self.task, winners[name], changed, target, spaces[name])
        return overrides

    def train(self) -> None:
        """Train winner and baselines from scratch, every one with the same seeds."""
        winners = self.winners()
        overrides = self._model_overrides(winners)
        write_json(self.run.path / "genotype.json", {**winners["searched"].to_dict(), "name": self.recipe.name})
        epochs = self.recipe.train.training.epochs
        jobs = [
            self._fit_job(JobName("train", name, seed), genotype, epochs, overrides[name])
            for seed in self._seeds(self.recipe.train.seeds)
            for name, genotype in winners.items()
        ]
        self._run_jobs(jobs)
        self._export()
        self._write_results()

    def _export(self) -> None:
        """The searched model of the best seed by validation, with what its user needs."""
        fitted = [str(JobName("train", "searched", seed)) for seed in self._seeds(self.recipe.train.seeds)]
        values: dict[str, Any] = {name: self._result(name).get("value") for name in fitted}
        good = [name for name in fitted if values[name] is not None]
        if not good:
            raise UserError(
                f"train: the searched model diverged with every seed ({self._result(fitted[0]).get('failure')}); "
                "a smaller train.training.optimizer.learning_rate or clip may help"
            )
        best = min(good, key=lambda name: self.task.objective.key(values[name]))
        source = self.run.job(best)
        write_atomic(self.run.path / "model.safetensors", intact(source, "model.safetensors").read_bytes())
        shutil.copyfile(source / "job.json", self.run.path / "model.json")
        self.task.save_assets(self.run.path)

    # ---------------------------------------------------------------------------------------------------------- test

    def test(self) -> None:
        """The test split, once for every trained model; then the saved model is loaded back and must agree."""
        winners = self.winners()
        fitted = [JobName("train", name, seed) for seed in self._seeds(self.recipe.train.seeds) for name in winners]
        jobs: list[NamedSpec] = [
            (str(replace(name, stage="test")), Test(str(name)).spec())
            for name in fitted
            if self._result(str(name))["status"] == "ok"
        ]
        self._run_jobs(jobs)
        self._write_results()

    def reload(self) -> dict[str, Any]:
        """Load `model.safetensors` as its user would and test it again: {"value", "recorded", "difference"}."""
        path = self.run.path / "model.json"
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); `lmnas train {self.run.path}` writes it anew") from None
        opened = Opened(self.recipe, self.task, self.space, self.device)
        with on_threads(self.threads):
            score = evaluate_saved(opened, document, self.run.path / "model.safetensors")
        recorded = self._result(str(JobName("test", "searched", document["seed"])))["value"]
        return {"value": score["value"], "recorded": recorded, "difference": abs(score["value"] - recorded)}

    def report(self) -> None:
        write_report(self.run.path)

    # ------------------------------------------------------------------------------------------------------- results

    def _write_results(self) -> None:
        self.run.write_results(collect(self))


def _with_model(training: Any, model: dict[str, Any]) -> Any:
    return replace(training, model={**training.model, **model})


def collect(experiment: Experiment) -> dict[str, Any]:
    """All results of a run from its records; parts that are still to come are empty."""
    run, recipe, task = experiment.run, experiment.recipe, experiment.task
    objective = task.objective
    results: dict[str, Any] = {
        "format": FORMAT,
        "name": recipe.name,
        "noun": experiment.space.noun,
        "objective": {key: value for key, value in asdict(objective).items() if value is not None},
        "data": task.data(),
        "environment": experiment.environment(),
        "seed": recipe.seed,
        "candidates": _candidates(experiment),
        "scores": [],
        "verdict": None,
        "costs": {},
    }
    costs: dict[str, float] = {}
    for path in sorted((run.path / "jobs").glob("*/result.json")) if (run.path / "jobs").is_dir() else []:
        name, result = JobName.parse(path.parent.name), read_result(path.parent)
        if name is None or result is None:  # no job's folder; or broken, and its job is done again
            continue
        stage = name.stage
        costs[f"{stage}_seconds"] = costs.get(f"{stage}_seconds", 0.0) + result.get("seconds", 0.0)
        if stage in ("train", "test"):
            score = _score(experiment, name, result)
            results["scores"].append(score)
            if stage == "train" and result["status"] != "ok":  # it has no model to test, and the verdict must say so
                results["scores"].append({**score, "split": "test"})
    results["costs"] = {key: round(value, 3) for key, value in costs.items()}
    genotype_path = run.path / "genotype.json"
    if genotype_path.is_file():
        genotype = load_genotype(genotype_path)
        diagram = covering_space(genotype).diagram(genotype)
        results["genotype"] = {**genotype.to_dict(), "id": genotype.id}
        results["diagram"] = {"title": diagram.title, "nodes": diagram.nodes, "edges": diagram.edges}
    if any(score["split"] == "test" for score in results["scores"]):
        wording = Wording.of(experiment.space, task)
        results["verdict"] = summarise(results["scores"], objective, recipe.level, wording)
        results |= _details(run)
    return results


def _details(run: Run) -> dict[str, Any]:
    """`details` of the test of the model that is handed over, where its task gives any."""
    model = _exported(run)
    tested = read_result(run.job(str(JobName("test", "searched", model["seed"])))) if model else None
    if not model or not tested or "details" not in tested:
        return {}
    return {"details": {"model": "searched", "seed": model["seed"], **tested["details"]}}


def _exported(run: Run) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        document = json.loads((run.path / "model.json").read_text(encoding="utf-8"))
        return document if isinstance(document, dict) and "seed" in document else None
    return None


def _score(experiment: Experiment, name: JobName, result: dict[str, Any]) -> dict[str, Any]:
    """One entry of `scores`; a diverged training has value None and its cause."""
    fit_name = str(replace(name, stage="train"))
    spec, fitted = read_spec(experiment.run.job(fit_name)), experiment._result(fit_name)
    assert spec is not None, fit_name
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
    return score if "failure" not in result else {**score, "failure": result["failure"]}


def _candidates(experiment: Experiment) -> list[dict[str, Any]]:
    """All trials: proxy scores of the search, then the short trainings of the selection."""
    if not (experiment.run.path / "study.db").is_file():
        return []
    stored = optuna.get_all_study_names(experiment.run.storage)
    rows = []
    for stage in ("search", "select"):
        if stage not in stored:
            continue
        record = Record(experiment.run, stage, experiment.task.objective, experiment.space)
        for trial in record.trials():
            rows.append(
                {
                    "stage": stage,
                    "source": trial.get("source", "searched"),
                    "search_seed": trial.get("search_seed"),
                    "genotype_id": trial["genotype_id"],
                    "value": trial["value"],
                    "split": trial["split"],
                    "is_proxy": trial["is_proxy"],
                    "failure": trial.get("failure"),
                }
            )
    return rows
