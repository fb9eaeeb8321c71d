"""Names of jobs: `search-0`, `search-0-trial-5`, `select-0123456789ab-0`, `train-lstm-2`, `test-lstm-2`, `compress`.

One class makes them and reads them back. A job's name is its folder's, so these forms are part of a run's format.
"""

import re
from dataclasses import dataclass

SUBJECT = re.compile(r"(?P<stage>select|train|test)-(?P<subject>.+)-(?P<seed>\d+)")
SEARCH = re.compile(r"(?P<stage>search)-(?P<seed>\d+)(?:-trial-(?P<trial>\d+))?")
ALONE = re.compile(r"(?P<stage>compress|finetune|test)")


@dataclass(frozen=True)
class JobName:
    """A job's name in its parts.

    Attributes:
        stage: `search`, `select`, `train`, `test`, `compress` or `finetune`.
        subject: model or genotype's id; empty where there is only one.
        seed: seed of the training, or number of the search.
        trial: number of a search's first proposal that the job estimates.
    """

    stage: str
    subject: str = ""
    seed: int | None = None
    trial: int | None = None

    def __str__(self) -> str:
        parts = [self.stage, self.subject, *([] if self.seed is None else [str(self.seed)])]
        return "-".join([*filter(None, parts), *([] if self.trial is None else ["trial", str(self.trial)])])

    @classmethod
    def parse(cls, name: str) -> "JobName | None":
        """The parts of a job's name; None for a folder that no job made."""
        for form in (SEARCH, SUBJECT, ALONE):
            if found := form.fullmatch(name):
                parts = found.groupdict()
                seed, trial = (int(parts[key]) if parts.get(key) else None for key in ("seed", "trial"))
                made = cls(parts["stage"], parts.get("subject") or "", seed, trial)
                return made if str(made) == name else None
        return None
