"""Estimating candidates: the scores of one or several proposals by their search's estimator."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypedDict

from lmnas.core.contracts import Proposal, Score
from lmnas.core.errors import Diverged, Unscored
from lmnas.core.genotype import Genotype
from lmnas.core.job import PREPARED, Job
from lmnas.runs.build import open_estimator
from lmnas.runs.work import JobKind, Workplace, intact


class Estimated(TypedDict, total=False):
    """Score of one proposal; without a value, the cause."""

    value: float | None
    n_predictions: int
    split: str
    further: dict[str, float]
    steps: int
    tokens: int
    status: str
    failure: str


class Estimates(TypedDict):
    """Scores of all proposals of a job, in order."""

    values: list[Estimated]
    seconds: float


@dataclass(frozen=True)
class Estimate(JobKind):
    """Scores of `genotypes`.

    Attributes:
        prepared: name of the search's preparation, whose files the estimator reads; None: it has none.
        terms: what each proposal says beyond its genotype (`Proposal.terms`); None: nothing.
        parents: for each proposal, the name of the job that estimated its parent.
    """

    kind: ClassVar[str] = "estimate"
    search: int
    genotypes: list[dict[str, Any]]
    prepared: str | None
    terms: list[dict[str, Any]] | None = None
    parents: list[str | None] | None = None

    def do(self, place: Workplace, job: Job) -> Estimates:
        recipe, opened = place.opened.recipe, place.opened
        estimator = open_estimator(recipe, opened.space, opened.task, self.search, opened.device)
        if self.prepared is not None:
            estimator.load(intact(place.job(self.prepared), PREPARED).parent)
        values: list[Estimated] = []
        for number, document in enumerate(self.genotypes):
            terms = self.terms[number] if self.terms else {}
            proposal = Proposal.from_terms(Genotype.from_dict(document), terms)
            parent = self.parents[number] if self.parents else None
            try:
                values.append(
                    _entry(
                        estimator.estimate(
                            proposal, recipe.seed + self.search, job, None if parent is None else place.job(parent)
                        )
                    )
                )
            except Diverged as failure:
                status = "unscored" if isinstance(failure, Unscored) else "diverged"
                values.append({"value": None, "failure": str(failure), "status": status})
            job.progress(number + 1, len(self.genotypes), "scoring candidates")
        return {"values": values, "seconds": job.seconds}


def _entry(score: Score) -> Estimated:
    entry: Estimated = {"value": score.value, "n_predictions": score.n_predictions, "split": score.split}
    if score.further:
        entry["further"] = dict(score.further)
    for key, count in asdict(score.cost).items():
        if count and key != "seconds":
            entry[key] = count  # type: ignore[literal-required]
    return entry
