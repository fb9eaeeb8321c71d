"""The record of a run: its trials in `study.db`, one Optuna study a stage."""

from typing import Any

import optuna

from lmnas.core.contracts import Objective, Space, Trial
from lmnas.core.genotype import Genotype
from lmnas.runs.directory import Run


class Record:
    """The trials of one stage as an Optuna study in the run's `study.db`; the driver is its only writer.

    A trial is known by its key, so one that is told again after a kill is not doubled.
    """

    def __init__(self, run: Run, stage: str, objective: Objective, space: Space):
        # it prints a line for every study that it creates or opens
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.space = space
        self.stage = stage
        self.study = optuna.create_study(
            storage=run.storage,
            study_name=stage,
            direction=objective.direction,
            load_if_exists=True,
        )
        self.keys = {trial.user_attrs["key"] for trial in self.study.get_trials(deepcopy=False)}

    def add(self, key: str, trial: Trial) -> None:
        """Record a finished trial; a failure is a FAIL trial with its cause."""
        if key in self.keys:
            return
        choices = trial.genotype.choices
        failed = trial.value is None
        self.study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE,
                value=trial.value,
                params=self.space.decisions.parameters(choices),
                distributions=self.space.decisions.distributions(choices),
                user_attrs={
                    "key": key,
                    "genotype": trial.genotype.to_dict(),
                    "genotype_id": trial.genotype.id,
                    "seconds": trial.cost.seconds,
                    **({"failure": trial.failure} if failed else {}),
                    **_beyond(trial),
                    **trial.notes,
                },
            )
        )
        self.keys.add(key)

    def trials(self) -> list[dict[str, Any]]:
        """The record as plain data, oldest first."""
        return [
            {
                "key": t.user_attrs["key"],
                "genotype": Genotype.from_dict(t.user_attrs["genotype"]),
                "value": t.value,
                **{k: v for k, v in t.user_attrs.items() if k not in ("key", "genotype")},
            }
            for t in self.study.get_trials(deepcopy=False)
        ]


def _beyond(trial: Trial) -> dict[str, Any]:
    """Attributes of a trial that only some have."""
    status = {} if trial.status == "ok" else {"status": trial.status}
    work = {key: n for key, n in (("steps", trial.cost.steps), ("tokens", trial.cost.tokens)) if n}
    further = {} if len(trial.scores) < 2 else {"scores": dict(trial.scores)}
    return {**trial.proposal.terms(), **status, **work, **further}
