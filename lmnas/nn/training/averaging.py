"""Averaged weights, and the best ones by validation.

The averages are a running mean beside the weights, so that the rate never lags a step behind as in torch's ASGD.
"""

from typing import Any

from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

from lmnas.core.contracts import Model, Objective, Score
from lmnas.nn.training.settings import Optimizer


def should_average(history: list[float], value: float, settings: Optimizer, objective: Objective) -> bool:
    """The non-monotonic trigger: `value` is worse than the best of `history` without its last `patience` entries."""
    earlier = history[: -settings.patience]
    if settings.averaging == "none" or not earlier:
        return False
    if settings.averaging_from is not None and not objective.better(value, settings.averaging_from):
        return False
    return objective.key(value) > min(objective.key(v) for v in earlier)


class Average(AveragedModel):
    """torch's, of a `Model`."""

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


class Validated:
    """A model's scores so far, its averaged weights once they are switched on, and its best weights.

    Attributes:
        history: scores on the validation split, oldest first.
        best: {"weights", "value", "n_predictions", "epoch"} of the best score; empty before the first.
    """

    def __init__(self, model: Model, objective: Objective, settings: Optimizer):
        self.model, self.objective, self.settings = model, objective, settings
        self.averaged: Average | None = None
        self.history: list[float] = []
        self.best: dict[str, Any] = {}

    @property
    def current(self) -> Model:
        """The model to validate: with averaged weights, if they are switched on."""
        return self.model if self.averaged is None else self.averaged.module

    def update_average(self) -> None:
        """Take the weights of a new update into the average."""
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)

    def add(self, score: Score, epoch: int) -> None:
        """Keep the weights if they are the best so far, and switch the averages on if it is time."""
        if all(self.objective.better(score.value, value) for value in self.history):
            self.best = {
                "weights": {name: tensor.detach().clone() for name, tensor in self.current.state_dict().items()},
                "value": score.value,
                "n_predictions": score.n_predictions,
                "epoch": epoch,
            }
        if self.averaged is None and should_average(self.history, score.value, self.settings, self.objective):
            self.averaged = averaged_model(self.model)
        self.history.append(score.value)

    def state_dict(self) -> dict[str, Any]:
        averaged = None if self.averaged is None else self.averaged.state_dict()
        return {"averaged": averaged, "history": self.history, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.averaged = None
        if state["averaged"] is not None:
            self.averaged = averaged_model(self.model)
            self.averaged.load_state_dict(state["averaged"])
        self.history, self.best = list(state["history"]), state["best"]
