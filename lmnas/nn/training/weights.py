"""The update of a model's weights: one batch, one optimiser step, and the state that continues it.

Effective order of an update: loss, gradient, clipping to a global norm, rate of the schedule times the batch's scale,
the optimiser's step with its decay.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lmnas.core.checkpoints import to_device
from lmnas.core.contracts import Batch, Choice, Loss, Masks, Model, Task
from lmnas.core.errors import NotFinite
from lmnas.core.seeds import generator
from lmnas.nn.training.optimizers import Joined, make_optimizer
from lmnas.nn.training.schedules import Moment, warmup
from lmnas.nn.training.settings import Training


class WeightTraining:
    """The weights of one model under training: model, optimiser, data cursor and carried state.

    What the model keeps beside its weights (a batch norm's running statistics) is in its `state_dict`, and so in every
    checkpoint.
    """

    def __init__(
        self,
        model: Model,
        task: Task,
        training: Training,
        seed: int,
        device: torch.device,
        clock: Callable[[], float] = lambda: 0.0,
    ):
        """
        Args:
            clock: seconds spent so far, for a length in seconds.
        """
        self.model = model
        self.settings = training.optimizer
        self.length = training.length
        self.evaluate_steps = training.evaluate_steps
        self.seed = seed
        self.device = device
        self.clock = clock
        self.stream = task.stream("train", training.batch_settings(task), seed)
        self.schedule = self.settings.shape
        self.optimizer = make_optimizer(model, self.settings)
        self.epoch = 0
        """Epoch of the current batch; the stream's own has already grown when that batch is the last of a pass."""
        self.steps = 0
        self.number = 0
        """Number of the current batch, from 1."""
        self.targets = 0
        """Number of predictions of all batches drawn."""
        self.seconds = 0.0
        """Seconds of training after the last update; the clock is read once an update, so that all readers agree."""
        self.progress = 0.0
        """Share of the training that was done before the batch in hand: of its epochs, those that are over."""
        self.step_size = 0.0
        """Effective step of the last update: learning rate times clipping factor (SGD)."""
        self.salt = 0
        """Number of recoveries: the steps after one draw other noise than those that led to NaN."""

    def spent(self) -> float:
        """Part of the training's length that is spent after the current batch, in the unit of the length."""
        spent = {"epochs": self.stream.epoch, "steps": self.number, "tokens": self.targets, "seconds": self.seconds}
        return spent[self.length.unit]

    def over(self) -> bool:
        """The training's length is spent."""
        return self.spent() >= self.length.amount

    def done(self) -> tuple[float, float]:
        """(spent, total) for progress; of epochs with the part of the pass that is done."""
        by_epochs = self.length.unit == "epochs"
        spent = self.steps / max(self.stream.steps_per_epoch, 1) if by_epochs else self.spent()
        return min(spent, self.length.amount), self.length.amount

    @property
    def share(self) -> float:
        """Share of the training that is done, 1 at its last update; in epochs the number of steps is an estimate."""
        if self.over():
            return 1.0
        if self.length.unit != "epochs":
            return self.spent() / self.length.amount
        total = self.length.amount * self.stream.steps_per_epoch
        return min(self.steps, total - 1) / total

    def due(self) -> bool:
        """Validation is due after the last update: at the end of a pass, or every `evaluate_steps` if given."""
        return self.steps % self.evaluate_steps == 0 if self.evaluate_steps else self.stream.epoch > self.epoch

    @property
    def learning_rate(self) -> float:
        """Rate of the coming update, for a segment of the base length."""
        epoch, epochs = float(self.epoch), self.length.amount
        if self.length.unit != "epochs":
            epoch = self.steps / max(self.stream.steps_per_epoch, 1)
            epochs = epoch / self.progress if self.progress else 1.0
        at = Moment(self.steps, self.share, epoch, epochs, self.stream.epoch)
        return self.schedule.rate(self.settings, at) * warmup(self.settings, at)

    def draw(self) -> Batch:
        """The next batch, on the device; the model is set to train on it (batch norm: by batch statistics)."""
        if not self.model.training:
            self.model.train()
        self.epoch = self.stream.epoch
        self.progress = min(self.spent() / self.length.amount, 1.0)
        batch = self.stream.next().to(self.device)
        self.number, self.targets = self.steps + 1, self.targets + batch.n_targets
        return batch

    def masks(self, purpose: str, batch: Batch) -> Masks:
        """This step's dropout masks for one purpose."""
        noise = generator(self.seed, "masks", purpose, self.salt, self.steps)
        return self.model.draw_masks(batch, noise, self.progress)

    def update(self, batch: Batch, choice: Choice = None) -> float:
        """One optimiser step on `batch`.

        Returns:
            The training loss before the step.

        Raises:
            NotFinite: loss or gradient is not finite; weights are as before.
        """
        loss: Loss = self.model(batch, self.masks("weights", batch), choice)
        self.optimizer.zero_grad(set_to_none=True)
        loss.value.backward()
        return self.apply(batch, loss)

    def apply(self, batch: Batch, loss: Loss) -> float:
        """The optimiser's step, once the gradients of `loss` are there; the rest is as in `update`."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip or math.inf, foreach=True)
        value, norm_value = torch.stack([loss.value.detach(), norm.to(loss.value.dtype)]).tolist()
        if not (math.isfinite(value) and math.isfinite(norm_value)):
            raise NotFinite(f"{'loss' if not math.isfinite(value) else 'gradient norm'} is not finite")
        rate = self.learning_rate * batch.scale
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("factor", 1.0)
        self.step_size = rate * min(1.0, (self.settings.clip or math.inf) / (norm_value + 1e-6))
        self.optimizer.step()
        self.stream.keep(loss.state)
        self._count()
        return value

    def _count(self) -> None:
        self.steps += 1
        self.seconds = self.clock()

    def velocity(self) -> dict[str, Tensor]:
        """Momentum times the momentum buffer of each weight, by name; empty without momentum."""
        if not self.settings.heavy_ball or isinstance(self.optimizer, Joined):
            return {}
        momentum, buffers = self.settings.momentum, self.optimizer.state
        return {name: momentum * buffers[w]["momentum_buffer"] for name, w in self.model.named_parameters()}

    def skip(self) -> None:
        """Leave the drawn batch out; the next one starts from the initial state."""
        self.stream.keep(None)
        self._count()

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "stream": self.stream.state_dict(),
            "steps": self.steps,
            "targets": self.targets,
            "salt": self.salt,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.stream.load_state_dict(to_device(state["stream"], self.device))
        self.steps = self.number = state["steps"]
        self.targets = state.get("targets", 0)  # version 0.1.0 counted none
        self.seconds = self.clock()
        self.salt = state["salt"]
