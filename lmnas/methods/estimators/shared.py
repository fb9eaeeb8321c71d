"""Shared weights: one supernet trained with the strategy's choices, its paths scored without training.

With `reinforce` this is ENAS (Pham et al., 2018), with `random` it is random search with weight sharing (Li &
Talwalkar, 2019, arXiv 1902.07638), with `gradient` DARTS (Liu et al., 2019), with `bayes` BayesNAS (Zhou et al.,
2019): nothing here knows which.
Scores are proxies: they rank candidates and are never results.
"""

import functools
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch.func import functional_call

from lmnas.core.checkpoints import pack, to_device, unpack
from lmnas.core.contracts import (
    Batch,
    Estimator,
    LearnStep,
    Loss,
    Mixture,
    Model,
    Proposal,
    Score,
    SharingStrategy,
    Space,
    State,
    Strategy,
    Stream,
    Task,
    Trial,
    Workload,
    relaxed,
)
from lmnas.core.errors import Diverged, NotFinite
from lmnas.core.files import write_atomic
from lmnas.core.job import PREPARED, Job
from lmnas.core.seeds import derive, rng
from lmnas.nn.cost import TRAINING_PASSES, example_choice
from lmnas.nn.curvature import diagonal
from lmnas.nn.train import initialise
from lmnas.nn.training.loop import Loop
from lmnas.nn.training.settings import Training
from lmnas.nn.training.weights import WeightTraining

MAX_SKIPPED = 10
"""Batches in a row without an update before training goes back to its last good state."""


class Shared(Estimator):
    """Trains the supernet in `prepare`, scores paths of it in `estimate`."""

    provides = frozenset({"shared-weights", "mixture"})
    is_proxy = True
    is_cheap = True

    def __init__(
        self,
        space: Space,
        task: Task,
        seed: int,
        device: torch.device,
        *,
        training: Training,
        valid_batch_size: Annotated[int, Field(ge=1)] | None = None,
        score_segments: Annotated[int, Field(ge=1)] | None = None,
    ):
        """
        Args:
            training: how the supernet is trained.
            valid_batch_size: streams of validation text in architecture steps and rewards; default: as in training.
            score_segments: number of validation segments that score a candidate; default: the whole split.
        """
        self.space = space
        self.task = task
        self.seed = seed
        self.device = device
        self.training = training
        self.score_segments = score_segments
        self.batches = training.batch_settings(task, "estimator.training.batches")
        valid = {**training.batches, **({"batch_size": valid_batch_size} if valid_batch_size else {})}
        self.valid_batches = Training(epochs=1, batches=valid).batch_settings(task, "estimator.training.batches")
        self.settings = training.model_settings(task, "estimator.training.model")
        self.shared = relaxed(space, "training of shared weights")

    @functools.cached_property
    def model(self) -> Model:
        """The supernet with the task's head."""
        return initialise(self._build(), self.seed).to(self.device)

    def _build(self) -> Model:
        return self.task.model(self.shared.supernet(self.settings.width), self.settings)

    def workload(self, strategy: Strategy) -> tuple[Workload, ...]:
        assert isinstance(strategy, SharingStrategy)
        by_gradient = "mixture" in strategy.needs
        learned = strategy.learn_passes if by_gradient else 0

        def passes(steps: int, targets: int) -> float:
            return self.training.passes(steps, targets) * (
                TRAINING_PASSES * (1 + learned) + strategy.rewards_per_round / steps
            )

        sizes = (self.batches,) if self.valid_batches == self.batches else (self.batches, self.valid_batches)
        return (
            Workload(
                "estimator.training",
                self.training,
                self._build,
                example_choice(self.space, by_gradient, rng(self.seed, "preflight")),
                sizes,
                (("train", self.batches), ("valid", self.valid_batches)),
                passes,
                # a strategy that learns by gradient is given the velocity as values of its own
                copies=strategy.weight_copies + int(by_gradient and self.training.optimizer.heavy_ball),
            ),
        )

    def prepare(self, strategy: Strategy, job: Job) -> None:
        """Train the supernet: per step the strategy learns (if by gradient) and the weights of its choice move; after
        each pass its proposals are rewarded (if by reinforcement), with the weights frozen."""
        assert isinstance(strategy, SharingStrategy)
        weights = WeightTraining(self.model, self.task, self.training, self.seed, self.device, lambda: job.seconds)
        # one cursor over validation text for architecture steps, one for rewards
        valid_stream = self.task.stream("valid", self.valid_batches, self.seed)
        reward_stream = self.task.stream("valid", self.valid_batches, self.seed + 1)
        rewards_due, ticks, skipped = 0, 0, 0

        def state() -> dict[str, Any]:
            return {
                "valid": valid_stream.state_dict(),
                "reward": reward_stream.state_dict(),
                "strategy": strategy.state_dict(),
                "rewards_due": rewards_due,
                "ticks": ticks,
                "skipped": skipped,
            }

        def restore(saved: dict[str, Any]) -> None:
            nonlocal rewards_due, ticks, skipped
            valid_stream.load_state_dict(to_device(saved["valid"], self.device))
            reward_stream.load_state_dict(saved["reward"])
            strategy.load_state_dict(saved["strategy"])
            rewards_due, ticks, skipped = saved["rewards_due"], saved["ticks"], saved["skipped"]

        loop = Loop(job, weights, self.training.checkpoint_steps, state, restore)
        loop.start()
        while not weights.over() or rewards_due:
            if rewards_due:
                self._reward(strategy, reward_stream.next(), weights.steps)
                rewards_due -= 1
                ended = rewards_due == 0
            else:
                try:
                    loop.loss.add(self._step(strategy, weights, valid_stream))
                    skipped = 0
                except NotFinite as problem:
                    # one sampled path that explodes: its batch is left out; a mixture is all paths at once
                    skipped += 1
                    if "mixture" in strategy.needs or skipped > MAX_SKIPPED:
                        loop.recover(problem)
                        continue
                    job.events.emit("skipped", step=weights.steps, cause=str(problem))
                    weights.skip()
                ended = weights.due() or weights.over()
                if ended and not loop.loss.count:
                    raise Diverged(weights.steps, "no batch of an epoch made an update")
                if ended and strategy.rewards_per_round:
                    rewards_due = max(1, strategy.rewards_per_round // strategy.rewards_per_update)
                    ended = False
            if ended:
                loop.end_epoch(weights.stream.epoch, valid=None, statistics=strategy.statistics())
            ticks += 1
            loop.end_step(ended, ticks, "rewards" if rewards_due else "training shared weights")

        write_atomic(
            job.directory / PREPARED, pack({"model": self.model.state_dict(), "strategy": strategy.state_dict()})
        )

    def _step(self, strategy: SharingStrategy, weights: WeightTraining, valid_stream: Stream) -> float:
        """One update of the weights, and one of a strategy that learns by gradient; the training loss before both."""
        batch, by_gradient = weights.draw(), "mixture" in strategy.needs
        if by_gradient and not strategy.joint:
            self._learn(strategy, weights, batch, valid_stream)
        choice = to_device(strategy.choice(weights.steps), self.device)
        if by_gradient and strategy.joint:
            return self._update_jointly(strategy, weights, batch, choice)
        return weights.update(batch, choice)

    def _learn(self, strategy: SharingStrategy, weights: WeightTraining, batch: Batch, valid_stream: Stream) -> None:
        """One architecture step: losses as functions of weights and mixture, data and dropout noise held fixed."""
        valid = valid_stream.next().to(self.device)
        train_masks, valid_masks = weights.masks("learn-train", batch), weights.masks("learn-valid", valid)
        carried: State = None

        def train_loss(parameters: Any, mixture: Mixture) -> torch.Tensor:
            return self._loss(batch, train_masks, parameters, mixture).value

        def valid_loss(parameters: Any, mixture: Mixture) -> torch.Tensor:
            nonlocal carried
            loss, carried = self._loss(valid, valid_masks, parameters, mixture)
            return loss

        strategy.learn(
            LearnStep(
                step=weights.steps,
                train_loss=train_loss,
                valid_loss=valid_loss,
                weights=dict(self.model.named_parameters()),
                learning_rate=weights.learning_rate * batch.scale,
                weight_decay=self.training.optimizer.weight_decay,
                clip=self.training.optimizer.clip,
                velocity=weights.velocity(),
                progress=weights.share,
                curvature=functools.partial(self._curvature, weights),
            )
        )
        valid_stream.keep(carried)

    def _update_jointly(self, strategy: SharingStrategy, weights: WeightTraining, batch: Batch, choice: Any) -> float:
        """The weights' update, then the strategy's step from the same pass; the training loss before both."""
        mixture = {name: table.detach().requires_grad_() for name, table in choice.items()}
        step, masks = weights.steps, weights.masks("weights", batch)
        rate = weights.learning_rate * batch.scale
        loss = weights.update(batch, mixture)

        def train_loss(parameters: Any, mixture: Mixture) -> torch.Tensor:
            return self._loss(batch, masks, parameters, mixture).value

        def valid_loss(parameters: Any, mixture: Mixture) -> torch.Tensor:
            raise ValueError("a joint strategy learns by the training loss; no validation batch is drawn for it")

        strategy.learn(
            LearnStep(
                step=step,
                train_loss=train_loss,
                valid_loss=valid_loss,
                weights=dict(self.model.named_parameters()),
                learning_rate=rate,
                weight_decay=self.training.optimizer.weight_decay,
                clip=self.training.optimizer.clip,
                progress=weights.share,
                train_gradient={
                    name: torch.zeros_like(table) if table.grad is None else table.grad
                    for name, table in mixture.items()
                },
                curvature=functools.partial(self._curvature, weights),
            )
        )
        return loss

    def _loss(self, batch: Batch, masks: Any, parameters: Any, mixture: Mixture) -> Loss:
        # the look-ahead leaves penalties out, as DARTS does
        return functional_call(self.model, dict(parameters), (batch, masks, mixture, False))

    def _curvature(self, weights: WeightTraining, mixture: Mixture, method: str, n_batches: int) -> Mixture:
        """`LearnStep.curvature`: over the batches that come next, which training then draws all the same.

        Raises:
            NotFinite: some second derivative is not.
        """
        mixture = {name: table.detach().to(self.device) for name, table in mixture.items()}
        stream = self.task.stream("train", self.batches, self.seed)
        stream.load_state_dict(to_device(weights.stream.state_dict(), self.device))
        batches: list[Batch] = []
        for _ in range(n_batches):
            batches.append(stream.next().to(self.device))
            with torch.no_grad():
                stream.keep(self.model(batches[-1], {}, mixture, False).state)
        seed = derive(self.seed, "curvature", weights.salt, weights.steps)
        found = diagonal(method, self.model, batches, mixture, seed)
        if not all(torch.isfinite(table).all() for table in found.values()):
            raise NotFinite("curvature is not finite")
        return found

    def _reward(self, strategy: SharingStrategy, batch: Batch, step: int) -> None:
        """One update of the policy: proposals scored on the same validation batch, from zero state, no dropout."""
        batch = batch.to(self.device)
        name = self.task.objective.name
        strategy.tell(
            [
                Trial(proposal, scores={name: self.task.score_batch(self.model, batch, proposal.genotype).value})
                for proposal in strategy.ask(strategy.rewards_per_update)
            ]
        )

    def load(self, prepared: Path) -> None:
        self.model.load_state_dict(unpack((prepared / PREPARED).read_bytes())["model"])

    def estimate(self, proposal: Proposal, seed: int, job: Job, parent: Path | None = None) -> Score:
        """The path's proxy score on the validation split."""
        return self.task.evaluate(
            self.model, "valid", self.batches, proposal.genotype, max_segments=self.score_segments
        )


def prepared_strategy(directory: Path) -> dict[str, Any]:
    """The strategy's state after `prepare`."""
    return unpack((directory / PREPARED).read_bytes())["strategy"]
