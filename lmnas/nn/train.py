"""Training of a stand-alone model: one plain loop of updates, validation and checkpoints.

Searched cells, random cells and baselines are all trained by `fit`; supernets by the same `WeightTraining` inside the
estimator's loop. The regime is AWD-LSTM's as DARTS uses it (Merity et al., 2018, arXiv 1708.02182; Liu et al., 2019,
appendix A.1.2): SGD, gradient clipping, learning rate scaled by the segment's length, a switch to averaged SGD when
validation stops improving.

Departure from the DARTS code: NaN alone triggers recovery, not any exception.
"""

import math
from typing import Any, TypeVar

import torch
from safetensors.torch import save as save_tensors
from torch import nn

from lmnas.core.contracts import Model, Task
from lmnas.core.errors import NotFinite
from lmnas.core.files import write_atomic
from lmnas.core.job import Job
from lmnas.core.seeds import generator
from lmnas.nn.training.averaging import Validated
from lmnas.nn.training.loop import Loop
from lmnas.nn.training.settings import Training
from lmnas.nn.training.weights import WeightTraining

M = TypeVar("M", bound=Model)


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
    model: Model, task: Task, training: Training, seed: int, job: Job, device: torch.device, purpose: str = "training"
) -> dict[str, Any]:
    """Train a stand-alone model from scratch and keep its best weights by validation.

    Leaves `model.safetensors` in the job's directory, and `model` holding those weights.

    Returns:
        `value`, `n_predictions`, `epoch` of the best validation; `steps`, `n_parameters`; `tokens_per_second` and
        `seconds`, of this machine.

    Raises:
        Diverged: not finite again and again.
        Interrupted: a stop was asked for; the state is saved.
    """
    batches, objective = training.batch_settings(task), task.objective
    weights = WeightTraining(model, task, training, seed, device, clock=lambda: job.seconds)
    validated = Validated(model, objective, training.optimizer)
    train_seconds, n_targets = 0.0, 0

    def state() -> dict[str, Any]:
        return {**validated.state_dict(), "speed": [train_seconds, n_targets]}

    def restore(saved: dict[str, Any]) -> None:
        nonlocal train_seconds, n_targets
        validated.load_state_dict(saved)
        train_seconds, n_targets = saved["speed"]

    loop = Loop(job, weights, training.checkpoint_steps, state, restore)
    loop.start()
    while not (weights.over() and validated.best):
        try:
            began = job.seconds
            batch = weights.draw()
            loop.loss.add(weights.update(batch))
            validated.update_average()
            train_seconds += job.seconds - began
            n_targets += batch.n_targets
            if due := weights.due() or weights.over():
                score = task.evaluate(validated.current, "valid", batches)
                if not math.isfinite(score.value):
                    raise NotFinite("validation score is not finite")
        except NotFinite as problem:
            loop.recover(problem)
            continue
        if due:
            epoch = weights.epoch + 1
            loop.end_epoch(epoch, valid=score.value, averaging=validated.averaged is not None)
            validated.add(score, epoch)
        text = f"{objective.name} {min(validated.history, key=objective.key):.2f}" if validated.history else purpose
        loop.end_step(due, weights.steps, text)

    model.load_state_dict(validated.best["weights"])
    save_weights(model, job)
    return {
        **{name: validated.best[name] for name in ("value", "n_predictions", "epoch")},
        "steps": weights.steps,
        "n_parameters": n_parameters(model),
        "tokens_per_second": n_targets / train_seconds if train_seconds else None,
        "seconds": job.seconds,
    }


def save_weights(model: nn.Module, job: Job, name: str = "model.safetensors") -> None:
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    write_atomic(job.directory / name, save_tensors(tensors))
