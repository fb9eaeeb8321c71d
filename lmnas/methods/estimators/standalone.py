"""Train every candidate on its own, from scratch: the honest and expensive score, in full or for a few epochs."""

from pathlib import Path

import torch

from lmnas.core.checkpoints import pack, unpack
from lmnas.core.contracts import Cost, Estimator, Model, Proposal, Score, Space, Strategy, Task, Workload
from lmnas.core.errors import Unscored
from lmnas.core.files import write_atomic
from lmnas.core.job import Job
from lmnas.core.seeds import rng
from lmnas.nn.cost import TRAINING_PASSES
from lmnas.nn.train import fit, initialise
from lmnas.nn.training.settings import Training

KEPT = "kept.safetensors"
"""State at the end of a training that later proposals may continue."""


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
        """The best score on the validation split of a training as long as the proposal's budget, its ancestors' share
        counted.

        With a parent of the same architecture the training goes on from where the parent's ended, to the same bits as
        one that was never cut; of another architecture, it starts from the parent's weights where names and shapes
        agree.

        Raises:
            Unscored: the parent left no training state.
        """
        training = self.training if proposal.budget is None else self.training.lasting(proposal.budget)
        settings = training.model_settings(self.task, "estimator.training.model")
        body = self.space.build(proposal.genotype, settings.width)
        model = initialise(self.task.model(body, settings), seed).to(self.device)
        if parent is not None:
            self._inherit(proposal, model, job, parent)
        result = fit(model, self.task, training, seed, job, self.device)
        if proposal.keep:
            kept = {"genotype": proposal.genotype.id, "state": job.last_good()}
            write_atomic(job.directory / KEPT, pack(kept))
        return Score(result["value"], "valid", result["n_predictions"], cost=Cost(steps=result["steps"]))

    def _inherit(self, proposal: Proposal, model: Model, job: Job, parent: Path) -> None:
        """Begin where `parent` ended; a job that has begun already goes on by itself."""
        try:
            kept = unpack((parent / KEPT).read_bytes())
        except OSError:
            raise Unscored(f"its parent ({parent.name}) left no training state; propose parents with keep") from None
        if kept["genotype"] == proposal.genotype.id:
            if job.last_good() is None:
                job.save(kept["state"])
            return
        own, inherited = model.state_dict(), kept["state"]["training"]["model"]
        fitting = {name: w for name, w in inherited.items() if name in own and own[name].shape == w.shape}
        model.load_state_dict({**own, **fitting})
