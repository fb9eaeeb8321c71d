"""Preparing one search: training its shared weights, where the estimator has any -> prepared.safetensors."""

from dataclasses import dataclass
from typing import ClassVar, TypedDict

from lmnas.core.job import Job
from lmnas.runs.build import open_estimator, open_strategy
from lmnas.runs.work import JobKind, Workplace


class Prepared(TypedDict):
    """Result of a preparation."""

    seconds: float


@dataclass(frozen=True)
class Prepare(JobKind):
    """Preparation of the estimator before its first estimate in search number `search`."""

    kind: ClassVar[str] = "prepare"
    search: int

    def do(self, place: Workplace, job: Job) -> Prepared:
        recipe, space, task = place.opened.recipe, place.opened.space, place.opened.task
        estimator = open_estimator(recipe, space, task, self.search, place.opened.device)
        estimator.prepare(open_strategy(recipe, space, task, self.search), job)
        return {"seconds": job.seconds}
