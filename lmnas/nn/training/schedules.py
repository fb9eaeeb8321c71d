"""Schedules of the learning rate: the rate of an update as a function of its place in the training, without a state.

A new one is a class here and a line in `lmnas.core.registry`. Each is tested against torch.optim.lr_scheduler or a
formula by hand.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from lmnas.nn.training.settings import Optimizer


@dataclass(frozen=True)
class Moment:
    """Place of an update in its training.

    Attributes:
        step: updates made before it.
        share: part of the training that is done, from 0 to 1.
        epoch: passes finished before its batch; of a training that is not measured in epochs, with the part of the
            pass that is done.
        epochs: passes of the whole training.
        passes: passes finished with its batch.
    """

    step: int
    share: float
    epoch: float
    epochs: float
    passes: int


class Schedule(ABC):
    """A function of `Optimizer` settings and a `Moment`.

    Attributes:
        uses: settings that mean something for it, beyond those of every schedule.
        tolerated: settings of other schedules that it ignores, as recipes of version 0.1.0 may have them.
    """

    uses: ClassVar[frozenset[str]] = frozenset()
    tolerated: ClassVar[frozenset[str]] = frozenset()

    @staticmethod
    def check(settings: "Optimizer") -> None:
        """Raise ValueError where settings contradict each other."""

    @staticmethod
    @abstractmethod
    def rate(settings: "Optimizer", at: Moment) -> float:
        """The rate at a moment, before warm-up."""


class Constant(Schedule):
    """The full rate; with `decay` below 1 step decay, as old recipes say it."""

    uses = frozenset({"decay", "decay_from"})
    tolerated = frozenset({"restart_factor"})

    @staticmethod
    def rate(settings: "Optimizer", at: Moment) -> float:
        # `decay` reaches the last batch of a pass already: so it was when the results on record were made
        return settings.learning_rate * settings.decay ** max(0, at.passes - settings.decay_from + 1)


class StepDecay(Constant):
    """The full rate for `decay_from` epochs, then `decay` times as much after every epoch."""

    tolerated = frozenset()

    @staticmethod
    def check(settings: "Optimizer") -> None:
        if settings.decay == 1:
            raise ValueError("schedule 'step-decay' needs a decay below 1")


def _check_floor(settings: "Optimizer") -> None:
    if settings.learning_rate_min > settings.learning_rate:
        raise ValueError(f"learning_rate_min is above learning_rate {settings.learning_rate:g}")


class Cosine(Schedule):
    """Half a cosine from `learning_rate` to `learning_rate_min`, with warm restarts: one rate an epoch; an update,
    where the training's length is not in epochs (Loshchilov & Hutter, SGDR, 2017, arXiv 1608.03983, eq. 5)."""

    uses = frozenset({"learning_rate_min", "restart_epochs", "restart_factor"})
    tolerated = frozenset({"decay_from"})
    check = staticmethod(_check_floor)

    @staticmethod
    def rate(settings: "Optimizer", at: Moment) -> float:
        position, length = at.epoch, settings.restart_epochs or at.epochs
        while settings.restart_epochs and position >= length:
            position, length = position - length, length * settings.restart_factor
        share = (1 + math.cos(math.pi * position / length)) / 2
        return settings.learning_rate_min + (settings.learning_rate - settings.learning_rate_min) * share


class InverseRoot(Schedule):
    """After a warm-up of W updates the rate falls as sqrt(W / n), n the update's number from 1 (Vaswani et al., 2017,
    arXiv 1706.03762, eq. 3, with its peak at `learning_rate`)."""

    @staticmethod
    def check(settings: "Optimizer") -> None:
        if not settings.warmup_steps:
            raise ValueError("schedule 'inverse-root' falls from the end of a warm-up: set warmup_steps")

    @staticmethod
    def rate(settings: "Optimizer", at: Moment) -> float:
        return settings.learning_rate * math.sqrt(settings.warmup_steps / max(at.step + 1, settings.warmup_steps))


class WarmupStableDecay(Schedule):
    """The full rate up to `stable_share` of the training, then down to `learning_rate_min` at its end: `linear`,
    `root` (1 - sqrt) or `cosine` (Hu et al., MiniCPM, 2024, arXiv 2404.06395; Haegele et al., 2024, arXiv 2405.18392).
    """

    uses = frozenset({"learning_rate_min", "stable_share", "decay_shape"})
    check = staticmethod(_check_floor)

    @staticmethod
    def rate(settings: "Optimizer", at: Moment) -> float:
        share = max(0.0, at.share - settings.stable_share) / (1 - settings.stable_share)
        left = {"linear": 1 - share, "root": 1 - math.sqrt(share), "cosine": (1 + math.cos(math.pi * share)) / 2}
        low = settings.learning_rate_min
        return low + (settings.learning_rate - low) * left[settings.decay_shape]


def warmup(settings: "Optimizer", at: Moment) -> float:
    """Factor on the rate: it grows linearly over the first `warmup_steps` updates or `warmup_share` of the training."""
    if settings.warmup_steps:
        return min(1.0, (at.step + 1) / settings.warmup_steps)
    if settings.warmup_share:
        # never zero: that would waste an update
        return min(1.0, max(at.share, 1e-3 * settings.warmup_share) / settings.warmup_share)
    return 1.0
