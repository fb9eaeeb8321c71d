"""The contracts between the parts. Read this file first.

    recipe -> Run -> Strategy -proposes-> Proposal -> Estimator -scores on-> Task -> Trial (recorded) -> report, export
                        ^                               | build(genotype) or a path of the supernet
                        +---------- finished trials ----+

Shapes: T time, B batch, H hidden width, V vocabulary, E edges of a table, K operations on an edge.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lmnas.core.decisions import Decisions
from lmnas.core.genotype import Genotype
from lmnas.core.job import Job
from lmnas.core.proposal import Cost, Proposal, Trial

Mixture = Mapping[str, Tensor]
"""Table name -> (E, K) weights: what a supernet runs when a strategy relaxes the choice."""

Choice = Genotype | Mixture | None
"""What a body runs: one path, a mixture of all, or (None) the only thing a stand-alone body can."""

Masks = Mapping[str, Tensor]
"""Dropout masks by name, drawn once per segment, already divided by the keep probability. Empty: no dropout. Masks are
values, so that two passes can share them (second-order search) and a fused kernel can take them."""

State = Any
"""A body's carried state: a tensor or a tuple of tensors, the batch on the axis before the last."""


@dataclass(frozen=True)
class Objective:
    """What is measured. `unit` reads after the number: 112.3 `per word`.

    Attributes:
        worst: the worst value that there can be, where there is one (an error rate: 100 %); a reward can then be the
            share of it that was avoided.
        items: what predictions are made for, and throughput counts (`images`); None: tokens.
    """

    name: str
    unit: str
    direction: Literal["minimize", "maximize"]
    worst: float | None = None
    items: Literal["tokens", "images"] | None = None

    def better(self, first: float, second: float) -> bool:
        """Whether `first` beats `second`; a value that is not finite beats nothing."""
        if first != first:
            return False
        return second != second or (first < second if self.direction == "minimize" else first > second)

    def key(self, value: float) -> float:
        """Sort key: the best value first, NaN last."""
        if value != value:
            return float("inf")
        return value if self.direction == "minimize" else -value


@dataclass(frozen=True)
class Score:
    """One measured value: on which split, over how many predictions.

    `details` are what a task can say beyond the value about the test split (plain data): they are recorded with it, and
    the report draws those that it knows (`confusion`, `calibration`).

    Attributes:
        further: other scores of the same candidate by name, beside the objective's.
        cost: steps and tokens that an estimate took, where it knows them.
    """

    value: float
    split: str
    n_predictions: int
    details: Mapping[str, Any] = field(default_factory=dict)
    further: Mapping[str, float] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)


# ---------------------------------------------------------------------------------------------------------- spaces


@dataclass(frozen=True)
class EdgeTable:
    """One table of a space's relaxation: a weight for every operation on every edge.

    Attributes:
        name: key in a Mixture.
        edges: (node, predecessor) of each row.
        ops: names of the columns.
        inputs: how many of a node's rows an architecture keeps.
    """

    name: str
    edges: tuple[tuple[int, int], ...]
    ops: tuple[str, ...]
    inputs: int = 1


@dataclass(frozen=True)
class Diagram:
    """A cell or two to be drawn: `nodes` as (key, label, kind) with kind input, op or output; `edges` as (from, to,
    label)."""

    title: str
    nodes: tuple[tuple[str, str, str], ...]
    edges: tuple[tuple[str, str, str], ...]


@runtime_checkable
class Body(Protocol):
    """The searched part of a model (an `nn.Module`). Recurrent kind: (T, B, H) -> (T, B, H).

    Image kind: (B, 3, S, S) -> (B, F), F its `n_features`; the state is None. `maps(inputs, masks, choice)` gives the
    features and what an auxiliary head reads, (B, `auxiliary_channels`, S', S'). Batch norms keep running statistics in
    stand-alone bodies (`train()` and `eval()` are the task's to call) and take batch statistics always in supernets.
    """

    width: int

    def initial_state(self, batch_size: int) -> State: ...
    def initialise(self, generator: torch.Generator, init_range: float) -> None: ...
    def draw_masks(self, batch_size: int, rates: Mapping[str, float], generator: torch.Generator) -> Masks:
        """Dropout masks for one segment; `rates` are a task's, by name (`x`, `hidden`, `weight`; `path` for images)."""
        ...

    def __call__(self, inputs: Tensor, state: State, masks: Masks, choice: Choice = None) -> tuple[Tensor, State]: ...


class Supernet(Body, Protocol):
    """A body that holds the weights of every architecture of its space."""

    def inherit(self, genotype: Genotype) -> dict[str, Tensor]:
        """The `state_dict` that `build(genotype)` takes to give this supernet's output on path `genotype` (in training
        mode, where it has batch norms).

        Where architectures differ in their number of features, the supernet has zeros at those that a path lacks, and
        `columns(genotype)` are the others.
        """
        ...


class Space(Protocol):
    """What can be chosen, and how it becomes a network. Its `__init__` takes the recipe's settings by keyword."""

    name: str
    kind: str
    """Which bodies it makes: a task lists the kinds it can wrap. `recurrent`: (T, B, H) -> (T, B, H), causal.
    `transformer`: (T, B, H) -> (T, B, F), F its `n_features`; it looks both ways, carries no state, and takes the
    `lengths` (B,) of padded sequences. `image`: (B, 3, S, S) -> (B, F)."""
    decisions: Decisions

    @classmethod
    def covering(cls, genotype: Genotype) -> "Space":
        """A space of this kind that holds `genotype`, whatever settings found it: to build, draw and transfer it."""
        ...

    def sample(self, rng: Any) -> Genotype: ...
    def mutate(self, genotype: Genotype, rng: Any) -> Genotype: ...
    def check(self, genotype: Genotype) -> None:
        """Raise UserError where `genotype` is not one of this space."""
        ...

    def build(self, genotype: Genotype, width: int) -> nn.Module: ...
    def supernet(self, width: int) -> nn.Module: ...
    def tables(self) -> tuple[EdgeTable, ...]:
        """The relaxation; empty where the space has none."""
        ...

    def derive(self, mixture: Mixture) -> Genotype:
        """The discrete architecture that a mixture stands for."""
        ...

    def diagram(self, genotype: Genotype) -> Diagram: ...


# ------------------------------------------------------------------------------------------------------ strategies


@dataclass
class LearnStep:
    """What a gradient strategy may use at one step: values and losses, never a model.

    Both losses are functions of (weights, mixture) with this step's data, carried state and dropout masks inside, so
    calling one twice differs in its arguments alone.

    Attributes:
        weights: the supernet's parameters by name (leaves; never modified by the strategy).
        learning_rate: the rate of the weights' next update, after any scaling of this step.
        velocity: momentum times the momentum buffer, which that update adds to the gradient and the decay, by weight
            name; empty without momentum.
        progress: share of the training that is done, 1 at its last step.
        train_gradient: of the training loss, by the mixture that ran in the weights' own update; of a `joint` strategy.
        curvature: (mixture, method, number of batches) -> table name -> (E, K) second derivatives of the mean training
            loss by every entry, without dropout, over the coming batches; a method of `lmnas.nn.curvature`. Computed
            when called.
    """

    step: int
    train_loss: Callable[[Mapping[str, Tensor], Mixture], Tensor]
    valid_loss: Callable[[Mapping[str, Tensor], Mixture], Tensor]
    weights: Mapping[str, Tensor]
    learning_rate: float
    weight_decay: float
    clip: float | None
    velocity: Mapping[str, Tensor] = field(default_factory=dict)
    progress: float = 0.0
    train_gradient: Mixture | None = None
    curvature: Callable[[Mixture, str, int], Mixture] | None = None


class Strategy(ABC):
    """Proposes. `__init__(space, objective, seed, *, settings...)`.

    The k-th proposal draws from a generator seeded by (seed, k), so replaying a record repeats it.
    """

    needs: frozenset[str] = frozenset()
    """Capabilities it needs of the estimator: `shared-weights`, `mixture`."""

    @abstractmethod
    def ask(self, n: int) -> list[Proposal]:
        """The next proposals; fewer than `n` (or none) when there is no more to propose."""

    def tell(self, trials: Sequence[Trial]) -> None:
        """Take the results of proposals, failed ones included. Default: learn nothing from them."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that later proposals depend on; tensors and plain data."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, which stays untouched."""


class SharingStrategy(Strategy):
    """A strategy that can steer the training of shared weights."""

    rewards_per_round: int = 0
    """Proposals to ask for, score on one batch and tell after each pass over the training data; 0: none."""
    rewards_per_update: int = 1
    """Number of them that one `tell` takes."""
    joint: bool = False
    """True: it learns by the training loss, after every update of the weights and from the same pass
    (`LearnStep.train_gradient`). False: before the update and with a validation batch."""
    learn_passes: int = 1
    """Forward and backward passes of one `learn`, for forecasts."""
    weight_copies: int = 0
    """Copies of the weights that `learn` holds at once, for forecasts."""

    @abstractmethod
    def choice(self, step: int) -> Choice:
        """What the supernet runs at training step `step`."""

    def learn(self, step: LearnStep) -> None:
        """One update of what the strategy learns by gradient; called only if `needs` has `mixture`."""

    def statistics(self) -> dict[str, Any]:
        """Numbers for the learning curves: entropy of the policy, weights of the mixture."""
        return {}


# ------------------------------------------------------------------------------------------------------ estimators


class Estimator(ABC):
    """Scores proposals. `__init__(space, task, seed, device, *, settings...)`.

    One that cannot score every kind of body has `kinds`, those that it can.
    """

    provides: frozenset[str] = frozenset()
    """Capabilities it offers a strategy."""
    kinds: frozenset[str] | None = None
    """Kinds of body that it can score; None: all."""
    is_proxy: bool = False
    """True: its scores rank candidates but are not results (weights shared, or none trained)."""
    is_cheap: bool = False
    """True: an estimate takes seconds; all proposals of one `ask` are one job."""

    def prepare(self, strategy: Strategy, job: Job) -> None:
        """Do what must be done before the first estimate, resumable; leave its files in the job's directory."""

    def load(self, prepared: Path) -> None:
        """Take over what `prepare` left in its job's directory."""

    @abstractmethod
    def estimate(self, proposal: Proposal, seed: int, job: Job, parent: Path | None = None) -> Score:
        """The proposal's score; `parent` is the directory of the job of the trial that `proposal.parent` names.

        Raises:
            Diverged: it has no score; `Unscored` where none is defined.
        """


# ----------------------------------------------------------------------------------------------------------- tasks


@dataclass
class Batch:
    """One step's data.

    Attributes:
        lr_scale: multiplies the learning rate for this step (segment length over its base).
        progress: share of the training's epochs that are over, 0 in the first; the training sets it. A rate that grows
            with time (drop-path) is a function of it.
    """

    inputs: Tensor
    targets: Tensor
    lr_scale: float = 1.0
    progress: float = 0.0

    def to(self, device: torch.device | str) -> "Batch":
        return replace(self, inputs=self.inputs.to(device), targets=self.targets.to(device))


class Stream(Protocol):
    """Training batches in order, with a cursor that can be saved. `carry` is the model state carried between them."""

    carry: State
    epoch: int
    """Passes finished. Grows by one when `next` returns the last batch of a pass."""
    steps_per_epoch: int
    """About how many steps one pass takes, for progress."""

    def next(self) -> Batch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Model(Protocol):
    """A body with its task's head (an `nn.Module`); calling it gives the loss of one batch.

    A class may have `forward_many(models, batches, carries, masks)`, the results of calling each of several models of
    one size, for `train.fit_many`; and a body's class `forward_many(bodies, inputs, states, masks)`, with inputs and
    outputs of (S, T, B, H) for S bodies whose state is their last output. Others run one after the other.

    A model is in train mode but while its task evaluates it. `training_only` is a part, where it has one, that a user
    of the trained model never runs (an auxiliary head): its parameters are not counted.
    """

    def initialise(self, generator: torch.Generator) -> None: ...
    def draw_masks(self, batch: Batch, generator: torch.Generator) -> Masks: ...
    def __call__(
        self, batch: Batch, carry: State, masks: Masks, choice: Choice = None, penalised: bool = True
    ) -> tuple[Tensor, State]:
        """The mean loss (with the model's penalties if asked) and the state to carry on, detached."""
        ...


class Task(Protocol):
    """Data, head, loss and metric. Its `__init__` takes the recipe's settings by keyword.

    A task wraps a searched body; `Model` and `Batches` are dataclasses of settings that recipes fill in. A task whose
    batches differ in size may have `largest_batch(settings) -> Batch`, from which forecasts of memory are made; without
    it they take the first one.
    """

    name: str
    kinds: frozenset[str]
    """The kinds of body it can wrap."""
    objective: Objective
    Model: type
    Batches: type

    def data(self) -> dict[str, Any]:
        """Name, fingerprint, sizes: what every result carries."""
        ...

    def model(self, body: nn.Module, settings: Any) -> nn.Module: ...
    def stream(self, split: str, settings: Any, seed: int) -> Stream: ...
    def score_batch(self, model: nn.Module, batch: Batch, choice: Choice = None) -> Score:
        """The metric on one batch, without dropout: a reward."""
        ...

    def evaluate(
        self,
        model: nn.Module,
        split: str,
        settings: Any,
        choice: Choice = None,
        tick: Callable[[float], None] | None = None,
        max_segments: int | None = None,
    ) -> Score: ...

    def score_text(self, model: nn.Module, text: str) -> Score:
        """The metric on new raw data, for users of a trained model: a text, or the path of a folder of images."""
        ...

    def save_assets(self, directory: Path) -> None:
        """What a user of the trained model needs beside its weights (a vocabulary, label names)."""
        ...
