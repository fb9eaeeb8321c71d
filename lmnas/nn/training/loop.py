"""Frame of every training around its updates: save, restore, recover from NaN, stop, report progress."""

from collections.abc import Callable
from typing import Any

from lmnas.core.errors import Diverged, NotFinite
from lmnas.core.job import Job
from lmnas.nn.training.weights import WeightTraining

MAX_RECOVERIES = 3
"""Number of times that training returns to its last good state, with fresh noise, before it counts as diverged."""

State = dict[str, Any]


class Mean:
    """Running mean of the training loss, as plain numbers that a checkpoint can hold."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, value: float) -> None:
        self.total, self.count = self.total + value, self.count + 1

    def value(self) -> float | None:
        return self.total / self.count if self.count else None


class Loop:
    """The frame around a training's updates. Its owner gives `state` and `restore` for what is its own.

    Checkpoints hold the owner's state, the weights' training, the mean loss and the number of recoveries.

    Attributes:
        loss: mean of the training loss since the last `epoch` event.
    """

    def __init__(
        self,
        job: Job,
        weights: WeightTraining,
        checkpoint_steps: int,
        state: Callable[[], State] = dict,
        restore: Callable[[State], None] = lambda saved: None,
    ):
        self.job, self.weights, self.checkpoint_steps = job, weights, checkpoint_steps
        self._own_state, self._restore_own = state, restore
        self.loss = Mean()
        self.recoveries = 0

    def state(self) -> State:
        return {
            "training": self.weights.state_dict(),
            "loss": [self.loss.total, self.loss.count],
            "recoveries": self.recoveries,
            **self._own_state(),
        }

    def _restore(self, saved: State) -> None:
        self.weights.load_state_dict(saved["training"])
        self.loss.total, self.loss.count = saved["loss"]
        self._restore_own(saved)

    def start(self, prepare: Callable[[], None] = lambda: None) -> None:
        """Continue from the newest checkpoint; without one `prepare`, and save."""
        saved = self.job.load()
        if saved is None:
            prepare()
            self.job.save(self.state())
        else:
            self._restore(saved)
            self.recoveries = saved["recoveries"]

    def recover(self, problem: NotFinite) -> None:
        """Go back to the last good state; the steps after it draw other noise than those that led here.

        Raises:
            Diverged: there is none, or it happened too often.
        """
        step, salt = self.weights.steps, self.weights.salt
        self.recoveries += 1
        self.job.events.emit("diverged", step=step, cause=str(problem), recovery=self.recoveries)
        saved = self.job.last_good()
        if saved is None or self.recoveries > MAX_RECOVERIES:
            raise Diverged(step, f"{problem} (after {self.recoveries - 1} recoveries)")
        self.job.warn(f"{problem} at step {step}: went back to step {saved['training']['steps']} with fresh noise")
        self._restore(saved)
        self.weights.salt = salt + 1
        self.job.save(self.state())

    def end_epoch(self, epoch: int, **facts: Any) -> None:
        """Emit the event of an epoch, or of another stretch that ends in validation; the mean loss starts anew."""
        self.job.events.emit("epoch", epoch=epoch, step=self.weights.steps, train_loss=self.loss.value(), **facts)
        self.loss = Mean()

    def end_step(self, ended: bool, tick: int, text: str) -> None:
        """A checkpoint if an epoch `ended` or `tick` is a multiple of `checkpoint_steps`; stop if asked; progress.

        Raises:
            Interrupted: a stop was asked for; the state is saved.
        """
        if ended or tick % self.checkpoint_steps == 0:
            self.job.save(self.state())
        self.job.stop_if_asked(self.state)
        self.job.progress(*self.weights.done(), text)
