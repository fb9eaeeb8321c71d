"""Settings of a training, as recipes give them. Nothing here needs torch, so that a recipe is checked without it."""

import dataclasses
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from lmnas.core import registry
from lmnas.core.errors import UserError
from lmnas.core.length import UNITS, Length
from lmnas.core.registry import STRICT, checked, settings_model

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
    """On the learning rate."""
    decay: Factor = 1.0
    """On the weight decay."""


@dataclass(kw_only=True)
class Roles:
    """Factors by what a parameter is."""

    __pydantic_config__ = STRICT

    matrices: Factors = field(default_factory=Factors)
    """Matrices of the body."""
    embeddings: Factors = field(default_factory=Factors)
    """Embeddings and heads."""
    gains: Factors = field(default_factory=Factors)
    """Gains and biases: parameters with one axis."""

    @property
    def alike(self) -> bool:
        return self == Roles()

    def by_role(self) -> "dict[Role, Factors]":
        return {"matrix": self.matrices, "embedding": self.embeddings, "gain": self.gains}


@dataclass(kw_only=True)
class Optimizer:
    """How weights are updated."""

    __pydantic_config__ = STRICT

    method: str = "sgd"
    """An optimiser: SGD as DARTS and ENAS have it, Adam as NAS-Bench-NLP has it, AdamW, Adafactor or Muon."""
    learning_rate: Annotated[float, Field(gt=0)] = 20.0
    """Rate for a segment of the base length; Adam wants one about 0.001."""
    momentum: Share = 0.0
    """Of SGD and Muon."""
    nesterov: bool = False
    """Nesterov's form of the momentum, as torch has it (ENAS' image networks)."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Of Adam: decay of the running means of the gradient and of its square."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Of Adam: added to the root of the mean square."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 coefficient, added to the gradient after clipping; AdamW and Muon take it off the weights by itself."""
    clip: Annotated[float, Field(gt=0)] | None = 0.25
    """Largest global norm of the gradient; with a high rate this is the real step-size control."""
    roles: Roles = field(default_factory=Roles)
    """Factors on rate and decay for matrices, embeddings and gains."""
    schedule: str = "constant"
    """A schedule: `constant` (up to `decay`), `step-decay`, `cosine`, `inverse-root` or `warmup-stable-decay`."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Updates over which the rate grows linearly from nothing, whatever the schedule."""
    warmup_share: Share = 0.0
    """The same as a share of the training."""
    learning_rate_min: Annotated[float, Field(ge=0)] = 0.0
    """Where the cosine would end, one epoch after its last; where warmup-stable-decay ends."""
    restart_epochs: Annotated[int, Field(ge=1)] | None = None
    """Epochs of the cosine's first cycle, T_0 (ENAS: 10); null: one cycle over the whole training."""
    restart_factor: Annotated[int, Field(ge=1)] = 2
    """Each cycle is so many times as long as the one before, T_mul."""
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the rate after every epoch from `decay_from` on (ENAS: 0.96 from 15)."""
    decay_from: Annotated[int, Field(ge=0)] = 0
    """Epochs at the full rate."""
    stable_share: Share = 0.8
    """Share of the training after which warmup-stable-decay falls."""
    decay_shape: Literal["linear", "root", "cosine"] = "linear"
    """How it falls."""
    averaging: Literal["nonmonotonic", "none"] = "nonmonotonic"
    """Switch to averaged weights when validation is worse than the best of all but the last `patience` scores."""
    patience: Annotated[int, Field(ge=1)] = 5
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
        """Refuse what differs from its default and belongs to other optimisers or schedules alone."""
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
    """One training: how long, which model around the body, which batches, which optimiser."""

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
        """About how many passes over the training split the length is; one, where it is in seconds."""
        steps = {"steps": self.steps, "tokens": self.tokens and self.tokens / targets_per_step}.get(self.length.unit)
        return self.epochs or (steps / steps_per_epoch if steps else 1.0)

    def model_settings(self, task: "Task", where: str = "training.model") -> Any:
        return task.model_settings(**checked(settings_model(task.model_settings), self.model, where))

    def batch_settings(self, task: "Task", where: str = "training.batches") -> Any:
        return task.batch_settings(**checked(settings_model(task.batch_settings), self.batches, where))
