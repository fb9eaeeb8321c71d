"""Testing a fitted model: its score on the test split."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lmnas.core.errors import UserError
from lmnas.core.job import Job, read_spec
from lmnas.runs.build import evaluate_saved
from lmnas.runs.work import JobKind, Workplace, intact


@dataclass(frozen=True)
class Test(JobKind):
    """The score of the model that the job `fitted` left."""

    __test__ = False  # no test of pytest's
    kind: ClassVar[str] = "test"
    fitted: str

    def do(self, place: Workplace, job: Job) -> Mapping[str, Any]:
        directory = place.job(self.fitted)
        spec = read_spec(directory)
        if spec is None:
            raise UserError(f"{directory / 'job.json'}: is gone or broken; delete {directory} to make it anew")
        score = evaluate_saved(place.opened, spec, intact(directory, "model.safetensors"), job)
        return {**score, "seconds": job.seconds}
