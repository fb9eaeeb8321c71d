"""The contracts between the parts. Read this file first.

    recipe -> Run -> Strategy -proposes-> Proposal -> Estimator -scores on-> Task -> Trial (recorded) -> report, export
                        ^                               | build(genotype) or a path of the supernet
                        +---------- finished trials ----+

Shapes: T time, B batch, H hidden width, V vocabulary, E edges of a table, K operations on an edge.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lmnas.core.decisions import Decisions
from lmnas.core.errors import UserError
from lmnas.core.genotype import Genotype
from lmnas.core.job import Job
from lmnas.core.nests import Nest, map_tensors
from lmnas.core.proposal import Cost, Proposal, Trial

Mixture = Mapping[str, Tensor]
"""Table name -> (E, K) weights: what a supernet runs when a strategy relaxes the choice."""

Choice = Genotype | Mixture | None
"""Choice that a body runs: one path, a mixture of all, or None for a stand-alone body, which can do one thing."""

Masks = Mapping[str, Tensor]
"""Dropout masks by name, drawn once per segment, already divided by the keep probability. Empty: no dropout. Masks are
values, so that two passes can share them (second-order search) and a fused kernel can take them."""

State = Nest
"""A body's carried state, the batch on the axis before the last of each tensor; None: none."""


@dataclass(frozen=True)
class Objective:
    """Quantity that a task measures. `unit` reads after the number: 112.3 `per word`.

    Attributes:
        worst: the worst value that there can be, where there is one (an error rate: 100 %); a reward can then be the
            share of it that was avoided.
        items: unit of predictions and of throughput, in the plural (`images`); None: tokens.
    """

    name: str
    unit: str
    direction: Literal["minimize", "maximize"]
    worst: float | None = None
    items: str | None = None

    def better(self, first: float, second: float) -> bool:
        """True if `first` is better than `second`; NaN is never better, and any number is better than NaN."""
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


class Body(nn.Module, ABC):
    """The searched part of a model: (T, B, H) -> (T, B, F), F = `n_features`, or what its space says.

    Batch norms keep running statistics in stand-alone bodies (`train()` and `eval()` are the task's to call) and take
    batch statistics always in supernets. A body of padded sequences has a further argument `lengths` (B,).

    Attributes:
        width: H, features of the inputs.
        n_features: F, features of the outputs; the width by default.
        batch_normed: a norm over the batch couples its sequences.
        max_length: longest sequence that it reads; None: any.
    """

    batch_normed: bool = False
    max_length: int | None = None

    def __init__(self, width: int, n_features: int | None = None):
        super().__init__()
        self.width = width
        self.n_features = width if n_features is None else n_features

    @abstractmethod
    def initialise(self, generator: torch.Generator, init_range: float) -> None:
        """Fill all weights; `init_range` is for uniform ones, as the task's own are."""

    def initial_state(self, batch_size: int) -> State:
        """The state before the first segment; None: nothing is carried."""
        return None

    def draw_masks(self, batch_size: int, rates: Mapping[str, float], generator: torch.Generator) -> Masks:
        """Dropout masks for one segment; `rates` are a task's, by name (`x`, `hidden`, `weight`; `path` for images)."""
        return {}

    @abstractmethod
    def forward(self, inputs: Any, state: State, masks: Masks, choice: Choice = None) -> tuple[Any, State]:
        """Outputs, and the state after them."""

    def stacked(self) -> Sequence[nn.Module]:
        """Layers in order; a body that is no stack is its only one."""
        return (self,)

    def hidden(self, state: State) -> list[Tensor]:
        """Per layer (B, H): the part of a state that was the layer's output; empty where the body does not say."""
        return [state] if isinstance(state, Tensor) and state.ndim == 2 else []

    def salient(self) -> Iterable[tuple[Tensor, Tensor]]:
        """(weight, gradient) of the matrices that synaptic saliency sums: all that have one."""
        for parameter in self.parameters():
            if parameter.ndim >= 2 and parameter.grad is not None:
                yield parameter.detach(), parameter.grad


class ImageBody(Body):
    """A body of images: (B, 3, S, S) -> (B, F).

    Attributes:
        auxiliary_channels: channels of the map that an auxiliary head reads.
    """

    auxiliary_channels: int

    @abstractmethod
    def maps(self, inputs: Tensor, masks: Masks, choice: Choice = None) -> tuple[Tensor, Tensor]:
        """(B, F) features, and the map (B, `auxiliary_channels`, S', S') that an auxiliary head reads."""

    def forward(self, inputs: Tensor, state: None, masks: Masks, choice: Choice = None) -> tuple[Tensor, None]:
        return self.maps(inputs, masks, choice)[0], None


class Supernet(Body):
    """A body that holds the weights of every architecture of its space."""

    @abstractmethod
    def inherit(self, genotype: Genotype) -> dict[str, Tensor]:
        """The `state_dict` that `build(genotype)` takes to give this supernet's output on path `genotype` (in training
        mode, where it has batch norms).

        Where architectures differ in their number of features, the supernet has zeros at those that a path lacks, and
        `columns(genotype)` are the others.
        """

    def columns(self, genotype: Genotype) -> Sequence[int]:
        """The features that path `genotype` has, in its order; all by default."""
        return range(self.n_features)


class Space(ABC):
    """Architectures and how each becomes a network. Its `__init__` takes the recipe's settings by keyword.

    `sample`, `mutate` and `check` follow from `decisions`; a space without any states its own.

    Attributes:
        name: in recipes and genotypes.
        makes: what its bodies can do, in words of `lmnas.core.capabilities`.
        kernels: fast kernels that its bodies' code can run on.
        noun: what a report calls one of its architectures.
        hand_made: what a verdict calls it, if it is a hand-made network that searched ones of the same use are compared
            with; empty: it is none.
        decisions: the choices of a genotype, which strategies read.
    """

    name: str
    makes: frozenset[str]
    kernels: frozenset[str] = frozenset()
    noun: str = "network"
    hand_made: str = ""
    decisions: Decisions

    @classmethod
    @abstractmethod
    def covering(cls, genotype: Genotype) -> "Space":
        """A space of this class that holds `genotype`, whatever settings found it: to build, draw and transfer it."""

    @abstractmethod
    def build(self, genotype: Genotype, width: int) -> Body:
        """The stand-alone body."""

    @abstractmethod
    def diagram(self, genotype: Genotype) -> Diagram: ...

    def sample(self, rng: Any) -> Genotype:
        return Genotype(self.name, self.decisions.sample(rng))

    def mutate(self, genotype: Genotype, rng: Any) -> Genotype:
        return Genotype(self.name, self.decisions.mutate(genotype.choices, rng))

    def check(self, genotype: Genotype) -> None:
        """Refuse what is not of this space with these settings.

        Raises:
            UserError: another space's genotype, or a decision that is missing, unknown or out of range.
        """
        if genotype.space != self.name:
            raise UserError(f"genotype {genotype.id} is of space {genotype.space!r}, expected {self.name!r}")
        self._check_choices(genotype)

    def _check_choices(self, genotype: Genotype) -> None:
        self.decisions.check(genotype.choices, f"genotype {genotype.id}")

    def canonical(self, genotype: Genotype) -> Genotype:
        """The form that all genotypes of one function share, where the space has one; else `genotype` itself."""
        return genotype

    def width_multiple(self, genotype: Genotype) -> int:
        """Number that a legal width is a multiple of (heads divide a width)."""
        return 1

    def without_units(self, genotype: Genotype, width: int, inner: Sequence[int]) -> Genotype:
        """The architecture that remains when only some units are kept, maybe one of another space.

        Args:
            width: dimensions of the embedding that are kept, which are the last layer's units.
            inner: units that are kept of each layer before the last.

        Raises:
            UserError: the space cannot say it, as is the default.
        """
        raise UserError(f"space {self.name!r} cannot say what is left of an architecture with fewer units")

    @classmethod
    def from_table(cls, entry: Mapping[str, Any]) -> dict[str, Any] | None:
        """The genotype's document that an entry of a published table of this space stands for; None: it is no such
        entry, as is the default."""
        return None


class Relaxed(Space):
    """A space whose architectures share the weights of one supernet, which also runs mixtures of them."""

    @property
    def no_switches(self) -> str | None:
        """Reason why weights of a mixture cannot be read as switches (a norm undoes their scale); None: they can."""
        return None

    @abstractmethod
    def supernet(self, width: int) -> Supernet:
        """The weights of all architectures: a `Supernet`."""

    @abstractmethod
    def tables(self) -> tuple[EdgeTable, ...]:
        """The weights that a mixture has."""

    @abstractmethod
    def derive(self, mixture: Mixture) -> Genotype:
        """Discrete architecture of a mixture."""


class GraphSpace(Space):
    """A space whose genotypes are graphs of named nodes, {name: {op, input}}, and whose bodies are stacks of one cell.

    Its `makes` holds `graph`.
    """

    @abstractmethod
    def stack(self, genotype: Genotype, width: int, layers: Sequence[int]) -> Body:
        """A body that reads `width` and has layers of the given widths, whatever the settings."""


def relaxed(space: Space, part: str) -> Relaxed:
    """`space`, where it has a relaxation.

    Args:
        part: what needs one, as a sentence names it: `strategy 'gradient'`.

    Raises:
        UserError: it has none.
    """
    refuse_unrelaxed(type(space), part)
    assert isinstance(space, Relaxed)
    return space


def refuse_unrelaxed(space: type[Space], part: str) -> None:
    """Refuse a space without a relaxation, as `relaxed` does, before it is opened.

    Raises:
        UserError
    """
    if not issubclass(space, Relaxed):
        raise UserError(f"{part} needs a space with a relaxation; space {space.name!r} has none")


# ------------------------------------------------------------------------------------------------------ strategies


@dataclass
class LearnStep:
    """Values and losses that a gradient strategy may use at one step; never a model.

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
    takes: frozenset[str] = frozenset()
    """Capabilities that it needs of a body, in words of `lmnas.core.capabilities`."""

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
        """Choice that the supernet runs at training step `step`."""

    def learn(self, step: LearnStep) -> None:
        """One update of what the strategy learns by gradient; called only if `needs` has `mixture`."""

    def statistics(self) -> dict[str, Any]:
        """Numbers for the learning curves: entropy of the policy, weights of the mixture."""
        return {}


# ------------------------------------------------------------------------------------------------------ estimators


@dataclass(frozen=True)
class Workload:
    """A training that will be done: what forecasts of time and memory, and the check before the start, read of it.

    Attributes:
        where: its place in the recipe.
        training: its settings.
        model: builds the model on the current default device.
        choice: an example of what the model runs.
        batches: settings of its batches; of several sizes, the training's own come first.
        reads: (split, settings of batches) of every stream that it opens.
        passes: (steps of an epoch, predictions of a step) -> its length in forward passes over the training split;
            a backward pass counts as two.
        per_candidate: it is done for every candidate; else once in each search.
        copies: further copies of the weights beside model, gradients and optimiser.
        keeps_best, averaged: the best weights so far, and averaged ones, are held as well.
    """

    where: str
    training: Any
    model: "Callable[[], Model]"
    choice: Choice
    batches: tuple[Any, ...]
    reads: tuple[tuple[str, Any], ...]
    passes: Callable[[int, int], float]
    per_candidate: bool = False
    copies: int = 0
    keeps_best: bool = False
    averaged: bool = False


class Estimator(ABC):
    """Scores proposals. `__init__(space, task, seed, device, *, settings...)`.

    One that cannot score every body states what it `takes`.
    """

    takes: frozenset[str] = frozenset()
    """Capabilities that it needs of a body, in words of `lmnas.core.capabilities`."""
    provides: frozenset[str] = frozenset()
    """Capabilities it offers a strategy."""
    is_proxy: bool = False
    """True: its scores rank candidates but are not results (weights shared, or none trained)."""
    is_cheap: bool = False
    """True: an estimate takes seconds; all proposals of one `ask` are one job."""

    def workload(self, strategy: Strategy) -> tuple[Workload, ...]:
        """The trainings that a search will do; nothing is allocated and no data is read. Default: none."""
        return ()

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


@dataclass(frozen=True)
class Batch:
    """One step's data.

    Attributes:
        inputs, targets: of the form that the task's model takes.
        n_targets: predictions that count, padding left out; losses are means over them.
        lengths: (B,) real positions of each padded sequence.
        scale: multiplies the learning rate for this step (segment length over its base).
        state: the model's state before the batch, put in by its stream; None: the initial one.
    """

    inputs: Nest
    targets: Nest
    n_targets: int
    lengths: Tensor | None = None
    scale: float = 1.0
    state: State = None

    def to(self, device: torch.device | str) -> "Batch":
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device)

        parts = ("inputs", "targets", "lengths", "state")
        return replace(self, **{name: map_tensors(move, self.__dict__[name]) for name in parts})


class Loss(NamedTuple):
    """Mean loss over a batch's `n_targets`, and the state to carry on, detached."""

    value: Tensor
    state: State = None


class Stream(ABC):
    """Training batches in order, with a cursor that can be saved.

    Attributes:
        epoch: passes finished; grows by one when `next` returns the last batch of a pass.
        steps_per_epoch: about how many steps one pass takes, for progress.
    """

    epoch: int

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int: ...

    @abstractmethod
    def next(self) -> Batch:
        """The next batch, with the carried state in it."""

    def keep(self, state: State) -> None:
        """Take back the state after the last batch, for the next one; None: begin anew. Default: nothing is carried."""
        return

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...
    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


Role = Literal["matrix", "embedding", "gain"]
"""Role of a parameter: a matrix of the body; an embedding or a head; a gain or a bias (one axis)."""


class Model(nn.Module, ABC):
    """A body with its task's head; calling it gives the loss of one batch.

    It is in train mode but while its task evaluates it.

    Attributes:
        body: the searched part.
        training_only: a part that a user of the trained model never runs (an auxiliary head); its parameters are not
            counted.
    """

    body: Body

    def __init__(self) -> None:
        super().__init__()
        self.training_only: nn.Module | None = None

    @abstractmethod
    def initialise(self, generator: torch.Generator) -> None: ...

    def draw_masks(self, batch: Batch, generator: torch.Generator, progress: float = 0.0) -> Masks:
        """Dropout masks of one step; `progress` is the share of the training that is done."""
        return {}

    @abstractmethod
    def forward(self, batch: Batch, masks: Masks, choice: Choice = None, penalised: bool = True) -> Loss:
        """The loss of a batch, with the model's penalties if asked."""

    def roles(self) -> dict[str, Role]:
        """Role of every parameter by name: with one axis a gain; in the body a matrix, unless a table of embeddings;
        elsewhere an embedding or a head."""
        tables = {id(module.weight) for module in self.modules() if isinstance(module, nn.Embedding)}

        def role(name: str, parameter: Tensor) -> Role:
            if parameter.ndim < 2:
                return "gain"
            return "matrix" if name.startswith("body.") and id(parameter) not in tables else "embedding"

        return {name: role(name, parameter) for name, parameter in self.named_parameters()}


class SoftmaxModel(Model):
    """A model that ends in one softmax layer over all of a batch's targets: its curvature can be computed."""

    def embedded(self, batch: Batch, masks: Masks) -> Tensor:
        """The body's input."""
        return batch.inputs

    @abstractmethod
    def features(self, batch: Batch, choice: Choice = None) -> Tensor:
        """(N, H), the softmax layer's input without dropout, in the order of the flattened targets."""

    @abstractmethod
    def output_layer(self) -> tuple[Tensor, Tensor | None]:
        """Weight (V, H) and bias (V,) of the softmax layer."""


@dataclass(frozen=True)
class UsualModel:
    """A model of usual sizes around a genotype's body, by which its parameters are counted.

    The sizes are those of the papers' Penn Treebank language model where a task does not say others.

    Attributes:
        width: of the body.
        vocabulary, decoder_bias: words of the output layer, and whether each has a bias; None: it is not of words.
        build: body -> model; None: there is none, and the body alone is counted.
        words: what was counted, with `{model:,}` and `{body:,}` for the numbers of parameters.
    """

    width: int = 850
    vocabulary: int | None = 10_000
    decoder_bias: bool | None = True
    build: Callable[[Any], Model] | None = None
    words: str = "{body:,} in the body"


class Task(ABC):
    """Data, head, loss and metric. Its `__init__` takes the recipe's settings by keyword.

    A task wraps a searched body; recipes fill in the dataclasses of settings `model_settings` and `batch_settings`.
    """

    name: str
    takes: frozenset[str]
    """Capabilities that it needs of a body, in words of `lmnas.core.capabilities`."""
    kernels: frozenset[str]
    """Fast kernels that the task's own code can run on."""
    objective: Objective
    model_settings: type
    batch_settings: type

    @classmethod
    def usual_model(cls, genotype: str, given: Mapping[str, Any]) -> UsualModel:
        """The model whose parameters are counted for a genotype, without data. Default: none, the body alone.

        Args:
            genotype: its name, for messages.
            given: fields of `UsualModel` that the user or the genotype's file states; the others are the task's.

        Raises:
            UserError: a size that the model does not have.
        """
        usual = UsualModel(**given)
        return replace(usual, words=f"{usual.words}, for embeddings of width {usual.width}")

    @abstractmethod
    def data(self) -> dict[str, Any]:
        """Name, fingerprint, sizes: what every result carries."""

    @abstractmethod
    def model(self, body: Any, settings: Any) -> Model:
        """The model around a body that the task takes."""

    @abstractmethod
    def stream(self, split: str, settings: Any, seed: int) -> Stream: ...

    def largest_batch(self, settings: Any) -> Batch:
        """The largest training batch, from which memory is forecast: the first by default."""
        return self.stream("train", settings, 0).next()

    @abstractmethod
    def score_batch(self, model: Model, batch: Batch, choice: Choice = None) -> Score:
        """The metric on one batch from the initial state, without dropout: a reward."""

    @abstractmethod
    def evaluate(
        self,
        model: Model,
        split: str,
        settings: Any,
        choice: Choice = None,
        tick: Callable[[float], None] | None = None,
        max_segments: int | None = None,
    ) -> Score:
        """The metric over a whole split, or the first `max_segments` batches; `tick` gets the fraction done."""

    @abstractmethod
    def score_text(self, model: Model, text: str) -> Score:
        """The metric on new raw data, for users of a trained model: a text, or the path of a folder of images."""

    @abstractmethod
    def save_assets(self, directory: Path) -> None:
        """Write the files that the trained model needs besides its weights (a vocabulary, label names)."""
