"""Score candidates without training: a metric of the untrained network on one batch of validation text.

Serianni & Kalita, 2023, arXiv 2306.00288. Scores are proxies: they rank candidates and are never results. They are
turned so that they follow the task's objective: where that is minimised, a lower value is a better candidate.
"""

from functools import cache
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from lmnas.core.contracts import Body, Estimator, Proposal, Score, Space, Task
from lmnas.core.errors import Unscored
from lmnas.core.job import Job
from lmnas.methods.proxies.family import Subject, family_of
from lmnas.methods.proxies.statistics import Undefined
from lmnas.nn.train import initialise
from lmnas.nn.training.settings import Training


class Proxy(Estimator):
    """A training-free metric (`metric`) of the untrained network, such as Jacobian cosine or a predictor."""

    is_proxy = True
    is_cheap = True
    takes = frozenset({"sequence"})

    def __init__(
        self,
        space: Space,
        task: Task,
        seed: int,
        device: torch.device,
        *,
        training: Training,
        metric: str = "hidden_covariance_1",
        columns: Annotated[int, Field(ge=2)] | None = None,
        steps: Annotated[int, Field(ge=2)] | None = None,
    ):
        """
        Args:
            training: only its model counts: what is scored is that model, untrained.
            metric: of a family that fits the space's bodies (`lmnas.methods.proxies`).
            columns: columns of text in the batch (the paper: 50); default: as in training.
            steps: tokens of each (the paper: 70); default: as in training.
        """
        self.family = family_of(metric, space, "estimator.metric")
        self.space = space
        self.task = task
        self.device = device
        self.metric = metric
        self.settings = training.model_settings(task, "estimator.training.model")
        given = {"batch_size": columns, "bptt": steps}
        batches = {**training.batches, **{key: value for key, value in given.items() if value is not None}}
        self.batches = Training(epochs=1, batches=batches).batch_settings(task, "estimator.training.batches")

    def estimate(self, proposal: Proposal, seed: int, job: Job, parent: Path | None = None) -> Score:
        """The metric, turned to the objective's direction.

        Raises:
            Unscored: it is undefined for this candidate, with the reason.
        """
        genotype = proposal.genotype
        self.space.check(genotype)

        @cache
        def text() -> tuple[Tensor, int]:
            return self.task.stream("valid", self.batches, seed).next().inputs, self.task.data()["vocabulary"]

        def network() -> tuple[Body, Tensor]:
            body = self.space.build(genotype, self.settings.width)
            model = initialise(self.task.model(body, self.settings), seed).to(self.device)
            return body, model.get_parameter("embedding")

        subject = Subject(self.space, genotype, self.settings.width, seed, text, network, own_seed=seed)
        try:
            value = self.family.measure(subject, [self.metric])[self.metric]
        except Undefined as reason:
            value = str(reason)
        if isinstance(value, str):
            raise Unscored(f"{self.metric} is undefined: {value}")
        value *= self.family.sign(self.metric)
        n_inputs = self.family.n_inputs(subject)
        return Score(value if self.task.objective.direction == "maximize" else -value, "valid", n_inputs)


class HiddenCovariance(Proxy):
    """Hidden covariance of the first layer (Serianni & Kalita, 2023): training-free."""

    def __init__(
        self,
        space: Space,
        task: Task,
        seed: int,
        device: torch.device,
        *,
        training: Training,
        columns: Annotated[int, Field(ge=2)] | None = None,
        steps: Annotated[int, Field(ge=2)] | None = None,
    ):
        """
        Args:
            training: only its model counts: what is scored is that model, untrained.
            columns: columns of text in the batch (the paper: 50); default: as in training.
            steps: tokens of each (the paper: 70); default: as in training.
        """
        super().__init__(space, task, seed, device, training=training, columns=columns, steps=steps)
