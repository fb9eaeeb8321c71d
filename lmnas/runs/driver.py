"""The driver of a run: what its stages share. It holds no tensors; it hands jobs to an executor and records."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from lmnas.core.contracts import Space, Task
from lmnas.core.errors import Interrupted, UserError
from lmnas.core.genotype import Genotype
from lmnas.core.job import read_result
from lmnas.core.names import JobName
from lmnas.core.updates import Incident, Update
from lmnas.runs.directory import Run
from lmnas.runs.executors.base import Executor, Setup, default_threads, open_executor
from lmnas.runs.job_kinds.fit import Fit
from lmnas.runs.progress import Display, Stop
from lmnas.runs.recipe import Recipe
from lmnas.runs.record import Record
from lmnas.runs.start import Start
from lmnas.runs.work import NamedSpec, Workplace, job_call, share

SEARCHED = "searched"
"""Name of the model that was searched for, beside the baselines'."""


class Driver:
    """One open run, its start, and the executor of its jobs."""

    def __init__(self, run: Run, started: Start, display: Display):
        self.run = run
        self.started = started
        self.display = display
        self.recipe: Recipe = started.opened.recipe
        self.task: Task = started.opened.task
        self.space: Space = started.opened.space
        execution = self.recipe.execution
        self.threads = execution.threads or default_threads(execution.workers)
        self.stop = Stop(display)
        self.executor: Executor | None = None

    @contextlib.contextmanager
    def executing(self) -> Iterator[None]:
        """The block in which jobs can be done."""
        execution, setup = self.recipe.execution, Setup(self.threads)
        share(Workplace(self.run.path, str(self.started.opened.device), self.started.opened))
        with open_executor(
            execution.executor, execution.workers, setup, self._update, lambda: self.stop.asked
        ) as self.executor:
            yield
        self.executor = None

    def _update(self, update: Update) -> None:
        if isinstance(update, Incident):
            self.run.note("incident", job=update.job, message=update.message)
        self.display.update(update)

    def incident(self, message: str) -> None:
        """Note something that changes the run, and say it."""
        self.run.note("incident", job="driver", message=message)
        self.display.message(message)

    def do(self, jobs: Sequence[NamedSpec]) -> None:
        """Do all jobs; finished ones give their results again.

        Raises:
            Interrupted: a stop was asked for; everything is saved.
        """
        assert self.executor is not None
        device = str(self.started.opened.device)
        calls = [job_call(self.run.path, device, name, spec) for name, spec in jobs]
        for finished, (name, result) in enumerate(self.executor.run(calls), start=1):
            if "value" in result and result["value"] is not None:
                text = f"{self.task.objective.name} {result['value']:.2f} ({result.get('split', 'valid')})"
            else:
                text = result.get("failure", "done")
            self.display.message(f"[{finished}/{len(jobs)}] {name}: {text}")
            if self.stop.asked:
                raise Interrupted

    def result(self, name: JobName | str) -> dict[str, Any]:
        """The result of a finished job; a stage that comes too early is the user's mistake."""
        result = read_result(self.run.job(str(name)))
        if result is None:
            raise UserError(f"run {self.run.path}: job {name} is not finished; run the stages before this one first")
        return result

    def record(self, stage: str) -> Record:
        return Record(self.run, stage, self.task.objective, self.space)

    def seeds(self, n: int) -> list[int]:
        """Seeds of `n` trainings of one model."""
        return [self.recipe.seed + i for i in range(n)]


def fit_job(name: JobName, genotype: Genotype, epochs: int | None, model: dict[str, Any]) -> NamedSpec:
    """The job `name` that trains `genotype`, its model's settings changed by `model`."""
    assert name.seed is not None
    return str(name), Fit(genotype.to_dict(), name.seed, epochs, model).spec()
