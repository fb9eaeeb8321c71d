"""Training of weights: one optimiser step, and one plain loop around it: fit, evaluate, checkpoint.

Searched cells, random cells and baselines are all trained by `fit`; supernets by the same `WeightTraining.step` inside
the estimator's loop. The regime is AWD-LSTM's as DARTS uses it (Merity et al., 2018, arXiv 1708.02182; Liu et al.,
2019, appendix A.1.2): SGD, gradient clipping, learning rate scaled by the segment's length, a switch to averaged SGD
when validation stops improving.

Departures from the DARTS code: the averages are a running mean beside the weights (`AveragedModel`), so the rate never
lags a step behind as in torch's ASGD; NaN alone triggers recovery, not any exception.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

from lmnas.core.checkpoints import to_device
from lmnas.core.contracts import Batch, Choice, Loss, Model, Objective, Task
from lmnas.core.errors import Diverged
from lmnas.core.files import write_atomic
from lmnas.core.job import Job
from lmnas.core.registry import STRICT, checked, settings_model
from lmnas.core.seeds import generator

M = TypeVar("M", bound=Model)

MAX_RECOVERIES = 3
"""How often training goes back to its last good state, with fresh noise, before it counts as diverged."""


@dataclass(kw_only=True)
class Optimizer:
    """How weights are updated."""

    __pydantic_config__ = STRICT

    method: Literal["sgd", "adam"] = "sgd"
    """SGD as DARTS and ENAS have it, or Adam (Kingma & Ba, 2015) as NAS-Bench-NLP has it, with betas 0.9 and 0.999."""
    learning_rate: Annotated[float, Field(gt=0)] = 20.0
    """Rate for a segment of the base length; Adam wants one about 0.001."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of SGD."""
    nesterov: bool = False
    """Nesterov's form of the momentum, as torch has it (ENAS' image networks)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 coefficient, added to the gradient after clipping."""
    clip: Annotated[float, Field(gt=0)] | None = 0.25
    """Largest global norm of the gradient; with a high rate this is the real step-size control."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Constant up to `decay`, or half a cosine from `learning_rate` to `learning_rate_min`, one rate an epoch
    (Loshchilov & Hutter, SGDR, 2017, arXiv 1608.03983, eq. 5)."""
    learning_rate_min: Annotated[float, Field(ge=0)] = 0.0
    """Where the cosine would end, one epoch after its last."""
    restart_epochs: Annotated[int, Field(ge=1)] | None = None
    """Epochs of the cosine's first cycle, T_0 (ENAS: 10); null: one cycle over the whole training."""
    restart_factor: Annotated[int, Field(ge=1)] = 2
    """Each cycle is so many times as long as the one before, T_mul."""
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the rate after every epoch from `decay_from` on (ENAS: 0.96 from 15)."""
    decay_from: Annotated[int, Field(ge=0)] = 0
    """Epochs at the full rate."""
    averaging: Literal["nonmonotonic", "none"] = "nonmonotonic"
    """Switch to averaged SGD when validation is worse than the best of all but the last `patience` epochs."""
    patience: Annotated[int, Field(ge=1)] = 5
    averaging_from: Annotated[float, Field(gt=0)] | None = None
    """Do not switch before validation is better than this (Li & Talwalkar, 2019: perplexity 78)."""

    def __post_init__(self) -> None:
        if self.nesterov and not (self.method == "sgd" and self.momentum > 0):
            raise ValueError("nesterov is a form of SGD's momentum: set method 'sgd' and a momentum above 0")
        if self.schedule == "cosine":
            if self.decay != 1:
                raise ValueError("schedule 'cosine' and decay both set the rate: leave decay at 1")
            if self.learning_rate_min > self.learning_rate:
                raise ValueError(f"learning_rate_min is above learning_rate {self.learning_rate:g}")
        elif self.learning_rate_min or self.restart_epochs:
            raise ValueError("learning_rate_min and restart_epochs are of schedule 'cosine', which is not set")

    def cosine(self, epoch: int, epochs: int) -> float:
        """The cosine's rate in epoch number `epoch` (from 0) of a training of `epochs`."""
        position, length = epoch, self.restart_epochs or epochs
        while self.restart_epochs and position >= length:
            position, length = position - length, length * self.restart_factor
        share = (1 + math.cos(math.pi * position / length)) / 2
        return self.learning_rate_min + (self.learning_rate - self.learning_rate_min) * share


@dataclass(kw_only=True)
class Training:
    """One training: how long, which model around the body, which batches, which optimiser."""

    __pydantic_config__ = STRICT

    epochs: Annotated[int, Field(ge=1)]
    """Passes over the training split."""
    model: dict[str, Any] = field(default_factory=dict)
    """Settings of the task's model: width, dropout rates."""
    batches: dict[str, Any] = field(default_factory=dict)
    """Settings of the task's batches: sizes, lengths."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    checkpoint_steps: Annotated[int, Field(ge=1)] = 500
    """Optimiser steps between checkpoints; there is one after every epoch as well."""

    def model_settings(self, task: Task, where: str = "training.model") -> Any:
        return task.model_settings(**checked(settings_model(task.model_settings), self.model, where))

    def batch_settings(self, task: Task, where: str = "training.batches") -> Any:
        return task.batch_settings(**checked(settings_model(task.batch_settings), self.batches, where))


class NotFinite(Exception):
    """A loss or gradient that is NaN or infinite; no update was made."""


class WeightTraining:
    """The weights of one model under training: model, optimiser, data cursor and carried state.

    What the model keeps beside its weights (a batch norm's running statistics) is in its `state_dict`, and so in every
    checkpoint.
    """

    def __init__(self, model: Model, task: Task, training: Training, seed: int, device: torch.device):
        self.model = model
        self.settings = training.optimizer
        self.epochs = training.epochs
        self.seed = seed
        self.device = device
        self.stream = task.stream("train", training.batch_settings(task), seed)
        # gradients are clipped before decay is added, so the optimiser's own decay is the right one
        rate, decay = self.settings.learning_rate, self.settings.weight_decay
        self.optimizer: torch.optim.Optimizer
        # fused: one pass over the weights, a quarter of the time
        if self.settings.method == "adam":
            self.optimizer = torch.optim.Adam(model.parameters(), lr=rate, weight_decay=decay, fused=True)
        else:
            momentum, nesterov = self.settings.momentum, self.settings.nesterov
            self.optimizer = torch.optim.SGD(
                model.parameters(), rate, momentum, weight_decay=decay, nesterov=nesterov, fused=True
            )
            if momentum:
                # a path leaves weights without a gradient, and torch's fused step takes buffers of all or of none
                for weight in model.parameters():
                    self.optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        self.epoch = 0
        """That of the batch in hand; the stream's own has grown already when that batch is the last of a pass."""
        self.steps = 0
        self.step_size = 0.0
        """What the last gradient was multiplied by before it was taken off the weights: rate and clipping (SGD)."""
        self.salt = 0
        """Grows at every recovery, so that the steps after it draw other noise than those that led to NaN."""

    @property
    def learning_rate(self) -> float:
        """The rate of this epoch, for a segment of the base length."""
        if self.settings.schedule == "cosine":
            return self.settings.cosine(self.epoch, self.epochs)
        # `decay` reaches the last batch of a pass already: so it was when the results on record were made
        return self.settings.learning_rate * self.settings.decay ** max(
            0, self.stream.epoch - self.settings.decay_from + 1
        )

    @property
    def progress(self) -> float:
        """Share of the training's epochs that are over, 0 in the first."""
        return self.epoch / self.epochs

    def draw(self) -> Batch:
        """The next batch, on the device; the model is set to train on it (batch norm: by batch statistics)."""
        if not self.model.training:
            self.model.train()
        self.epoch = self.stream.epoch
        return self.stream.next().to(self.device)

    def masks(self, purpose: str, batch: Batch) -> Any:
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
            group["lr"] = rate
        self.step_size = rate * min(1.0, (self.settings.clip or math.inf) / (norm_value + 1e-6))
        self.optimizer.step()
        self.stream.keep(loss.state)
        self.steps += 1
        return value

    def velocity(self) -> dict[str, Tensor]:
        """Momentum times the momentum buffer of each weight, by name; empty without momentum."""
        momentum = self.settings.momentum
        if self.settings.method != "sgd" or not momentum:
            return {}
        buffers = self.optimizer.state
        return {name: momentum * buffers[w]["momentum_buffer"] for name, w in self.model.named_parameters()}

    def skip(self) -> None:
        """Leave the drawn batch out; the next one starts from the initial state."""
        self.stream.keep(None)
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "stream": self.stream.state_dict(),
            "steps": self.steps,
            "salt": self.salt,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.stream.load_state_dict(to_device(state["stream"], self.device))
        self.steps = state["steps"]
        self.salt = state["salt"]


class Recovery:
    """Going back to the last good state after NaN, a few times."""

    def __init__(self, job: Job):
        self.job = job
        self.count = 0

    def state(self, step: int, cause: str) -> dict[str, Any]:
        """Record what happened and return the state to continue from.

        Raises:
            Diverged: it happened too often.
        """
        self.count += 1
        self.job.events.emit("diverged", step=step, cause=cause, recovery=self.count)
        saved = self.job.last_good()
        if saved is None or self.count > MAX_RECOVERIES:
            raise Diverged(step, f"{cause} (after {self.count - 1} recoveries)")
        self.job.warn(f"{cause} at step {step}: went back to step {saved['training']['steps']} with fresh noise")
        return saved


class Mean:
    """Running mean of the training loss, as plain numbers that a checkpoint can hold."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, value: float) -> None:
        self.total, self.count = self.total + value, self.count + 1

    def value(self) -> float | None:
        return self.total / self.count if self.count else None


def should_average(history: list[float], value: float, settings: Optimizer, objective: Objective) -> bool:
    """The non-monotonic trigger: `value` is worse than the best of `history` without its last `patience` entries."""
    earlier = history[: -settings.patience]
    if settings.averaging == "none" or not earlier:
        return False
    if settings.averaging_from is not None and not objective.better(value, settings.averaging_from):
        return False
    return objective.key(value) > min(objective.key(v) for v in earlier)


class Average(AveragedModel):
    module: Model


def averaged_model(model: Model) -> Average:
    """The running mean of a model's weights, and of its buffers: a batch norm's statistics are averaged as the weights
    are, which stands for measuring them anew (Izmailov et al., 2018, arXiv 1803.05407, section 3.3); counts are taken
    over."""
    mean = get_swa_multi_avg_fn()

    def update(averaged: Any, current: Any, n_averaged: Any) -> None:
        if averaged[0].is_floating_point():
            mean(averaged, current, n_averaged)
        else:
            for old, new in zip(averaged, current, strict=True):
                old.copy_(new)

    return Average(model, multi_avg_fn=update, use_buffers=True)


def initialise(model: M, seed: int) -> M:
    """Fill a model's weights from the run's seed."""
    model.initialise(generator(seed, "init"))
    return model


def n_parameters(model: nn.Module) -> int:
    """Parameters of a model that its user runs, or of a body."""
    unused = model.training_only if isinstance(model, Model) else None
    left_out = sum(parameter.numel() for parameter in unused.parameters()) if unused is not None else 0
    return sum(parameter.numel() for parameter in model.parameters()) - left_out


def fit(
    model: Model,
    task: Task,
    training: Training,
    seed: int,
    job: Job,
    device: torch.device,
    purpose: str = "training",
) -> dict[str, Any]:
    """Train a stand-alone model from scratch and keep its best weights by validation.

    Leaves `model.safetensors` in the job's directory, and `model` holding those weights.

    Returns:
        {"value", "n_predictions", "epoch", "steps", "n_parameters", "tokens_per_second", "seconds"}: `value` is the
        best score on the validation split; timings are this machine's.

    Raises:
        Diverged: not finite again and again.
        Interrupted: a stop was asked for; the state is saved.
    """
    batches = training.batch_settings(task)
    weights = WeightTraining(model, task, training, seed, device)
    averaged: Average | None = None
    history: list[float] = []
    best: dict[str, Any] = {}
    loss_mean = Mean()
    recovery = Recovery(job)
    train_seconds, n_targets = 0.0, 0

    def state() -> dict[str, Any]:
        return {
            "training": weights.state_dict(),
            "averaged": averaged.state_dict() if averaged else None,
            "history": history,
            "best": best,
            "loss": [loss_mean.total, loss_mean.count],
            "recoveries": recovery.count,
            "speed": [train_seconds, n_targets],
        }

    def restore(saved: dict[str, Any]) -> None:
        nonlocal averaged, history, best, train_seconds, n_targets
        weights.load_state_dict(saved["training"])
        averaged = None
        if saved["averaged"] is not None:
            averaged = averaged_model(model)
            averaged.load_state_dict(saved["averaged"])
        history, best = list(saved["history"]), saved["best"]
        loss_mean.total, loss_mean.count = saved["loss"]
        train_seconds, n_targets = saved["speed"]

    saved = job.load()
    if saved is None:
        job.save(state())
    else:
        restore(saved)
        recovery.count = saved["recoveries"]

    while weights.stream.epoch < training.epochs:
        epoch = weights.stream.epoch
        try:
            began = job.seconds
            batch = weights.draw()
            loss_mean.add(weights.update(batch))
            if averaged:
                averaged.update_parameters(model)
            train_seconds += job.seconds - began
            n_targets += batch.n_targets
            ended = weights.stream.epoch > epoch
            if ended:
                score = task.evaluate(averaged.module if averaged else model, "valid", batches)
                if not math.isfinite(score.value):
                    raise NotFinite("validation score is not finite")
        except NotFinite as problem:
            salt = weights.salt
            restore(recovery.state(weights.steps, str(problem)))
            weights.salt = salt + 1
            job.save(state())
            continue
        if ended:
            improved = not history or all(task.objective.better(score.value, value) for value in history)
            if improved:
                source = averaged.module if averaged else model
                best = {
                    "weights": {name: tensor.detach().clone() for name, tensor in source.state_dict().items()},
                    "value": score.value,
                    "n_predictions": score.n_predictions,
                    "epoch": epoch + 1,
                }
            job.events.emit(
                "epoch",
                epoch=epoch + 1,
                step=weights.steps,
                train_loss=loss_mean.value(),
                valid=score.value,
                averaging=averaged is not None,
            )
            if averaged is None and should_average(history, score.value, training.optimizer, task.objective):
                averaged = averaged_model(model)
            history.append(score.value)
            loss_mean = Mean()
        if ended or weights.steps % training.checkpoint_steps == 0:
            job.save(state())
        job.stop_if_asked(state)
        done = weights.steps / max(weights.stream.steps_per_epoch, 1)
        text = f"{task.objective.name} {min(history, key=task.objective.key):.2f}" if history else purpose
        job.progress(min(done, training.epochs), training.epochs, text)

    model.load_state_dict(best["weights"])
    save_weights(model, job)
    return {
        "value": best["value"],
        "n_predictions": best["n_predictions"],
        "epoch": best["epoch"],
        "steps": weights.steps,
        "n_parameters": n_parameters(model),
        "tokens_per_second": n_targets / train_seconds if train_seconds else None,
        "seconds": job.seconds,
    }


def save_weights(model: nn.Module, job: Job, name: str = "model.safetensors") -> None:
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    write_atomic(job.directory / name, save_tensors(tensors))
