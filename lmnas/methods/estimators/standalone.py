"""Train every candidate on its own, from scratch: the honest and expensive score, in full or for a few epochs."""

from pathlib import Path

import torch

from lmnas.core.contracts import Cost, Estimator, Proposal, Score, Space, Task
from lmnas.core.job import Job
from lmnas.nn.train import fit, initialise
from lmnas.nn.training.settings import Training


class Standalone(Estimator):
    """`training.epochs` sets the fidelity. Scores are the best on the validation split."""

    def __init__(self, space: Space, task: Task, seed: int, device: torch.device, *, training: Training):
        """
        Args:
            training: how each candidate is trained.
        """
        self.space = space
        self.task = task
        self.device = device
        self.training = training

    def estimate(self, proposal: Proposal, seed: int, job: Job, parent: Path | None = None) -> Score:
        settings = self.training.model_settings(self.task, "estimator.training.model")
        body = self.space.build(proposal.genotype, settings.width)
        model = initialise(self.task.model(body, settings), seed).to(self.device)
        result = fit(model, self.task, self.training, seed, job, self.device)
        return Score(result["value"], "valid", result["n_predictions"], cost=Cost(steps=result["steps"]))
