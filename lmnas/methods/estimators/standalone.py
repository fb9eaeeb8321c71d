"""Train every candidate on its own, from scratch: the honest and expensive score, in full or for a few epochs."""

from pathlib import Path

import torch

from lmnas.core.contracts import Cost, Estimator, Proposal, Score, Space, Strategy, Task, Workload
from lmnas.core.job import Job
from lmnas.core.seeds import rng
from lmnas.nn.cost import TRAINING_PASSES
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
        self.seed = seed
        self.device = device
        self.training = training

    def workload(self, strategy: Strategy) -> tuple[Workload, ...]:
        settings, batches = self.training.model_settings(self.task), self.training.batch_settings(self.task)
        genotype = self.space.sample(rng(self.seed, "preflight"))
        return (
            Workload(
                "estimator.training",
                self.training,
                lambda: self.task.model(self.space.build(genotype, settings.width), settings),
                None,
                (batches,),
                (("train", batches),),
                lambda steps, targets: self.training.passes(steps, targets) * TRAINING_PASSES,
                per_candidate=True,
                keeps_best=True,
                averaged=self.training.optimizer.averaging != "none",
            ),
        )

    def estimate(self, proposal: Proposal, seed: int, job: Job, parent: Path | None = None) -> Score:
        settings = self.training.model_settings(self.task, "estimator.training.model")
        body = self.space.build(proposal.genotype, settings.width)
        model = initialise(self.task.model(body, settings), seed).to(self.device)
        result = fit(model, self.task, self.training, seed, job, self.device)
        return Score(result["value"], "valid", result["n_predictions"], cost=Cost(steps=result["steps"]))
