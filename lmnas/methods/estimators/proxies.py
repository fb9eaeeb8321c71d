"""Score candidates without training: a metric of the untrained network on one batch of validation text.

Serianni & Kalita, 2023, arXiv 2306.00288. Scores are proxies: they rank candidates and are never results. They are
turned so that they follow the task's objective: where that is minimised, a lower value is a better candidate.
"""

from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from lmnas.core.contracts import Estimator, Proposal, Score, Space, Task
from lmnas.core.errors import Unscored, UserError, nearest
from lmnas.core.genotype import Genotype
from lmnas.core.job import Job
from lmnas.methods.proxies import predictor, transformer
from lmnas.methods.proxies.recurrent import METRICS, measure
from lmnas.methods.proxies.statistics import Undefined
from lmnas.nn.train import Training, initialise

PREDICTED = ("predictor", "prior")
"""Scores of a small network of their own, for spaces that build one (`stack`)."""
KNOWN = {"recurrent": (*METRICS, *PREDICTED), "transformer": tuple(transformer.METRICS)}
"""Kind of body -> its metrics."""


class Proxy(Estimator):
    """A training-free metric of recurrent or Transformer bodies (`metric`), such as Jacobian cosine or a predictor."""

    is_proxy = True
    is_cheap = True
    kinds = frozenset(KNOWN)

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
            metric: one of `methods.proxies.recurrent.METRICS`, or `predictor` or `prior`; for Transformer bodies one of
                `methods.proxies.transformer.METRICS`.
            columns: columns of text in the batch (the paper: 50); default: as in training.
            steps: tokens of each (the paper: 70); default: as in training.
        """
        known = KNOWN.get(space.kind, ())
        if metric not in known:
            raise UserError(
                f"estimator.metric {metric!r} is none of {space.kind} bodies, which space {space.name!r} makes. "
                + nearest(metric, known)
            )
        if metric in PREDICTED and not hasattr(space, "stack"):
            raise UserError(f"estimator.metric {metric!r} reads a graph, which space {space.name!r} has not")
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
        try:
            value, n_tokens = self._value(proposal.genotype, seed)
        except Undefined as reason:
            raise Unscored(f"{self.metric} is undefined: {reason}") from None
        return Score(value if self.task.objective.direction == "maximize" else -value, "valid", n_tokens)

    def _value(self, genotype: Genotype, seed: int) -> tuple[float, int]:
        """(higher is better, tokens read)."""
        if self.metric in PREDICTED:
            features = predictor.features(self.space, genotype, seed)
            value = predictor.SCORES[self.metric](features)
            return value, predictor.T * predictor.B
        self.space.check(genotype)
        body = self.space.build(genotype, self.settings.width)
        tokens = self.task.stream("valid", self.batches, seed).next().inputs
        if self.space.kind == "transformer":
            network = transformer.untrained(body, len(self.task.vocabulary), seed)  # type: ignore[attr-defined]
            measured, sign = transformer.measure(network, tokens.t(), [self.metric], seed)[self.metric], 1
        else:
            model = initialise(self.task.model(body, self.settings), seed).to(self.device)
            embedding = model.get_parameter("embedding")
            measured = measure(body, embedding, tokens.to(self.device), [self.metric], seed)[self.metric]
            sign = METRICS[self.metric].sign
        if isinstance(measured, str):
            raise Undefined(measured)
        return sign * measured, tokens.numel()


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
