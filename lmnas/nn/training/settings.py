"""Settings of a training, as recipes give them. Nothing here needs torch, so that a recipe is checked without it."""

import dataclasses
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from lmnas.core import registry
from lmnas.core.errors import UserError
from lmnas.core.length import UNITS, Length
from lmnas.core.settings import STRICT, checked, settings_model

if TYPE_CHECKING:
    from lmnas.core.contracts import Role, Task
    from lmnas.nn.training.optimizers import Method
    from lmnas.nn.training.schedules import Schedule

Share = Annotated[float, Field(ge=0, lt=1)]
Factor = Annotated[float, Field(ge=0)]


@dataclass(kw_only=True)
class Factors:
    """Factors of one role of parameters."""

    __pydantic_config__ = STRICT

    rate: Factor = 1.0
    """Factor on the learning rate."""
    decay: Factor = 1.0
    """Factor on the weight decay."""


@dataclass(kw_only=True)
class Roles:
    """Factors on rate and decay by the role of a parameter."""

    __pydantic_config__ = STRICT

    matrices: Factors = field(default_factory=Factors)
    """Factors for matrices of the body."""
    embeddings: Factors = field(default_factory=Factors)
    """Factors for embeddings and heads."""
    gains: Factors = field(default_factory=Factors)
    """Factors for gains and biases: parameters with one axis."""

    @property
    def alike(self) -> bool:
        return self == Roles()

    def by_role(self) -> "dict[Role, Factors]":
        return {"matrix": self.matrices, "embedding": self.embeddings, "gain": self.gains}


@dataclass(kw_only=True)
class Optimizer:
    """Settings of the updates of the weights: method, rates, schedule, averaging."""

    __pydantic_config__ = STRICT

    method: str = "sgd"
    """Name of the optimiser: `sgd` (DARTS, ENAS), `adam` (NAS-Bench-NLP), `adamw`, `adafactor` or `muon`."""
    learning_rate: Annotated[float, Field(gt=0)] = 20.0
    """Learning rate for a segment of the base length. The default suits SGD; Adam needs about 0.001."""
    momentum: Share = 0.0
    """Momentum of SGD and Muon; 0: none."""
    nesterov: bool = False
    """Use Nesterov's form of the momentum, as in torch (ENAS' image networks)."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay factors of Adam's running means of the gradient and of its square."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Constant that Adam adds to the root of the mean square."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 coefficient, added to the gradient after clipping; AdamW and Muon apply it apart from the gradient."""
    clip: Annotated[float, Field(gt=0)] | None = 0.25
    """Largest global norm of the gradient; with a high rate it controls the step size. null: no clipping."""
    roles: Roles = field(default_factory=Roles)
    """Factors on rate and decay for matrices, embeddings and gains."""
    schedule: str = "constant"
    """Name of the schedule: `constant` (but for `decay`), `step-decay`, `cosine`, `inverse-root` or
    `warmup-stable-decay`."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Number of updates over which the rate grows linearly from 0, with any schedule; 0: no warm-up."""
    warmup_share: Share = 0.0
    """Length of the warm-up as a share of the training, instead of `warmup_steps`; 0: no warm-up."""
    learning_rate_min: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of `cosine` (one epoch after its last) and of `warmup-stable-decay`."""
    restart_epochs: Annotated[int, Field(ge=1)] | None = None
    """Epochs of the cosine's first cycle, T_0 (ENAS: 10); null: one cycle over the whole training."""
    restart_factor: Annotated[int, Field(ge=1)] = 2
    """Ratio of the length of a cosine's cycle to that of the one before, T_mul."""
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the rate after every epoch from `decay_from` on (ENAS: 0.96 from 15)."""
    decay_from: Annotated[int, Field(ge=0)] = 0
    """Number of epochs at the full rate, before `decay` applies."""
    stable_share: Share = 0.8
    """Share of the training after which warmup-stable-decay falls."""
    decay_shape: Literal["linear", "root", "cosine"] = "linear"
    """Shape of the fall of warmup-stable-decay after `stable_share`."""
    averaging: Literal["nonmonotonic", "none"] = "nonmonotonic"
    """Switch to averaged weights when validation is worse than the best of all but the last `patience` scores."""
    patience: Annotated[int, Field(ge=1)] = 5
    """Number of latest validation scores that do not count as the best so far, for `averaging`."""
    averaging_from: Annotated[float, Field(gt=0)] | None = None
    """Do not switch before validation is better than this (Li & Talwalkar, 2019: perplexity 78)."""

    @property
    def part(self) -> "type[Method]":
        return registry.component("optimizer", self.method)

    @property
    def shape(self) -> "type[Schedule]":
        return registry.component("schedule", self.schedule)

    @property
    def copies(self) -> int:
        """Copies of the weights that the optimiser holds."""
        return max(self.part.copies, int(self.heavy_ball))

    @property
    def heavy_ball(self) -> bool:
        """Updates add a velocity: momentum times a buffer."""
        return self.part.heavy_ball and self.momentum > 0

    def __post_init__(self) -> None:
        try:
            self._refuse_foreign("method", "optimizer")
            self._refuse_foreign("schedule", "schedule")
        except UserError as unknown:  # pydantic adds the place in the recipe to a ValueError
            raise ValueError(str(unknown)) from None
        if self.warmup_steps and self.warmup_share:
            raise ValueError("warmup_steps and warmup_share both set the warm-up: leave one at 0")
        self.part.check(self)
        self.shape.check(self)

    def _refuse_foreign(self, setting: str, kind: str) -> None:
        """Refuse settings that differ from their default and belong only to other optimisers or schedules."""
        values = vars(self)
        chosen = registry.component(kind, values[setting])
        owners: dict[str, list[str]] = {}
        for name in registry.names(kind):
            for used in registry.component(kind, name).uses:
                owners.setdefault(used, []).append(repr(name))
        for each in dataclasses.fields(self):
            foreign = each.name in owners and each.name not in chosen.uses | chosen.tolerated
            if foreign and values[each.name] != each.default:
                raise ValueError(f"{each.name} is of {setting} {' or '.join(owners[each.name])}, which is not set")

    def plain_sgd(self) -> "Optimizer":
        """The same rates for SGD without momentum and averaging."""
        own: dict[str, Any] = {
            each.name: each.default for each in dataclasses.fields(self) if each.name in self.part.uses
        }
        return replace(self, **{**own, "method": "sgd", "momentum": 0.0, "averaging": "none"})


Positive = Annotated[int, Field(ge=1)]


@dataclass(kw_only=True)
class Training:
    """Settings of one training: length, model around the body, batches, optimiser."""

    __pydantic_config__ = STRICT

    epochs: Positive | None = None
    """Length in passes over the training split; exactly one of the four lengths is given."""
    steps: Positive | None = None
    """Length in optimiser steps."""
    tokens: Positive | None = None
    """Length in predictions: tokens of a text, images."""
    seconds: Annotated[float, Field(gt=0)] | None = None
    """Length in seconds of this machine, those before an interruption counted."""
    evaluate_steps: Positive | None = None
    """Optimiser steps between validations; null: after every epoch. The end of the training is always validated."""
    model: dict[str, Any] = field(default_factory=dict)
    """Settings of the task's model: width, dropout rates."""
    batches: dict[str, Any] = field(default_factory=dict)
    """Settings of the task's batches: sizes, lengths."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    checkpoint_steps: Positive = 500
    """Optimiser steps between checkpoints; there is one after every validation as well."""

    def __post_init__(self) -> None:
        given = [unit for unit, amount in self._amounts().items() if amount is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"expected exactly one length, of epochs, steps, tokens or seconds; {found} given")

    def _amounts(self) -> dict[str, float | None]:
        return {"epochs": self.epochs, "steps": self.steps, "tokens": self.tokens, "seconds": self.seconds}

    @property
    def length(self) -> Length:
        return next(Length(amount, unit) for unit in UNITS if (amount := self._amounts()[unit]) is not None)

    def lasting(self, length: Length) -> "Training":
        """The same training of another length."""
        amounts: dict[str, Any] = {unit: length.amount if unit == length.unit else None for unit in UNITS}
        return replace(self, **amounts)

    def passes(self, steps_per_epoch: int, targets_per_step: int) -> float:
        """Approximate number of passes over the training split; 1 where the length is in seconds."""
        steps = {"steps": self.steps, "tokens": self.tokens and self.tokens / targets_per_step}.get(self.length.unit)
        return self.epochs or (steps / steps_per_epoch if steps else 1.0)

    def model_settings(self, task: "Task", where: str = "training.model") -> Any:
        return task.model_settings(**checked(settings_model(task.model_settings), self.model, where))

    def batch_settings(self, task: "Task", where: str = "training.batches") -> Any:
        return task.batch_settings(**checked(settings_model(task.batch_settings), self.batches, where))
