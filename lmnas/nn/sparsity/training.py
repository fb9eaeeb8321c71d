"""Training that takes units out of a trained recurrent language model.

Curvature H of all weights gives variances and penalty weights omega at h = H / lambda (`strips`). A round trains on
E + lambda * sum_g omega_g |w_g|, with a proximal step after every step of SGD so that strips reach zero exactly;
measures the curvature again; and prunes (`dynamic`, or after the last round alone) strips that are zero, tiny beside
their family's largest, or that evidence is against. Then the network is cut.

Departures from the note on plain recurrent networks: the first round has its omega from the curvature of the trained
weights (the note starts with 1, which says nothing at a small lambda); the update is repeated to its limit at fixed
weights; and evidence prunes. A strip of a language model has thousands of weights of rare words that no data hold and
only the penalty moves: at a strength that takes such a strip to zero in a few epochs all others lose their use too.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lmnas.core.contracts import Batch, Model, SoftmaxModel, State, Task
from lmnas.core.errors import Emptied, NotFinite, UserError
from lmnas.core.job import Job
from lmnas.core.length import Length
from lmnas.core.seeds import rng
from lmnas.nn.curvature import recursion_weights, sampled_weights
from lmnas.nn.sparsity.strips import Family, Layout, PerFamily, Piece, Weights
from lmnas.nn.training.loop import Loop
from lmnas.nn.training.settings import Training
from lmnas.nn.training.weights import WeightTraining

DIGITS = 5
"""Significant digits of norms in the record."""
SPAN, ROUGHLY = 1000.0, 20
"""Factor around w^2 H within which the default strength is searched, and updates of the variances for each trial."""
OUTER = "embedding"
"""The family of the embedding's dimensions, which are the last layer's units: input and output are tied."""


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Settings of the removal of units.

    Attributes:
        strength: lambda, nats a prediction. None: `break_even` at the start.
        rounds: number of rounds of curvature, update and training.
        round_epochs: passes over the training data in a round.
        dynamic: prune after every round instead of after the last alone.
        share: of a family's living strips, the most that evidence may take in one round of dynamic pruning, so that
            the others can take over; without it after the last round there is no limit.
        threshold: of a strip's norm by its family's largest, below which it counts as zero.
        curvature: `sampled` or `recursion` (`lmnas.nn.curvature.weights`), over `curvature_batches` batches.
    """

    strength: float | None = None
    rounds: int = 3
    round_epochs: int = 1
    dynamic: bool = True
    share: float = 0.25
    threshold: float = 0.01
    curvature: str = "sampled"
    curvature_batches: int = 4


def layout(model: Model) -> Layout:
    """The strips of a tied language model of LSTM or plain recurrent layers.

    Dimension n of the embedding is the last layer's unit n and the first layer's input n: one family. Every inner layer
    has one of its own.

    Raises:
        UserError: another body.
    """
    body, layers = model.body, list[Any](model.body.stacked())
    if not isinstance(model, SoftmaxModel) or not all(type(layer) in (nn.LSTM, nn.RNN) for layer in layers):
        raise UserError(
            f"a body of type {type(body).__name__} has no strips of units to take out; expected layers of LSTM or "
            "plain recurrent units (spaces lstm and recurrent-layers)"
        )

    def weight(i: int, name: str) -> str:
        return f"body.layers.{i}.{name}_l0"

    def state(i: int) -> tuple[Piece, ...]:
        """Rows of the weights that compute layer i's units, columns of those that read them in the layer itself."""
        gates = 4 if isinstance(layers[i], nn.LSTM) else 1
        rows = [Piece(weight(i, name), 0, gates) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        return (*rows, Piece(weight(i, "weight_hh"), 1, diagonal=False))

    last = len(layers) - 1
    outer = (Piece("embedding", 1), Piece(weight(0, "weight_ih"), 1, diagonal=last > 0), *state(last))
    inner = [
        Family(f"layer {i + 1}", layers[i].hidden_size, (*state(i), Piece(weight(i + 1, "weight_ih"), 1)))
        for i in range(last)
    ]
    return Layout((Family(OUTER, layers[last].hidden_size, outer), *inner))


def upcoming(weights: WeightTraining, task: Task, training: Training, n: int, index: int) -> list[Batch]:
    """`n` successive training batches from a random place, each with the state carried to it."""
    stream = task.stream("train", training.batch_settings(task), weights.seed)
    skipped = rng(weights.seed, "curvature", index).randrange(max(1, stream.steps_per_epoch - n - 1))
    for _ in range(skipped):
        stream.next()
    batches: list[Batch] = []
    state: State = None
    with torch.no_grad():
        while len(batches) < n:
            batch = replace(stream.next().to(weights.device), state=state)
            if state is not None:  # the first one warms the state up
                batches.append(batch)
            state = weights.model(batch, {}, None, False).state
    return batches


def break_even(strips: Layout, weights: Weights, curvature: Weights) -> float:
    """The lambda at which evidence is against half of all strips, by bisection to 2 percent.

    Where all weights of a strip are alike, evidence turns against it at w^2 H / 1.745. 0 without curvature.
    """
    worth = strips.sums({k: weights[k].detach().double().square() * curvature[k].double() for k in strips.by_weight})
    counts = strips.counts(weights)
    middle = torch.cat([worth[name] / counts[name] for name in worth]).median().item()
    if not middle > 0:
        return 0.0
    low, high = middle / SPAN, middle * SPAN
    while high > 1.02 * low:
        strength = math.sqrt(low * high)
        h = {name: curvature[name] / strength for name in strips.by_weight}
        gain = strips.gain(weights, h, strips.update(weights, h, strips.full(1.0), ROUGHLY))
        if torch.cat(list(gain.values())).median() > 0:
            low = strength
        else:
            high = strength
    return low


class Pruning:
    """A model that loses units: the strength, the penalty weights, the strips alive, and the record of rounds.

    Its `state_dict` and the keys of the result are those names.
    """

    def __init__(self, model: Model, task: Task, training: Training, sparsity: Sparsity, weights: WeightTraining):
        self.strips = layout(model)
        assert isinstance(model, SoftmaxModel)
        self.model, self.task, self.training, self.sparsity, self.weights = model, task, training, sparsity, weights
        self.parameters = dict(model.named_parameters())
        self.strength, self.omega = sparsity.strength, self.strips.full(0.0)
        self.alive = {name: torch.ones_like(value, dtype=torch.bool) for name, value in self.omega.items()}
        self.begin: dict[str, Any] = {}
        self.rounds: list[dict[str, Any]] = []
        self.before: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "strength": self.strength,
            "omega": self.omega,
            "alive": self.alive,
            "begin": self.begin,
            "rounds": self.rounds,
            "before": self.before,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.strength, self.omega, self.alive = saved["strength"], saved["omega"], saved["alive"]
        self.begin, self.rounds, self.before = saved["begin"], list(saved["rounds"]), saved["before"]

    def prepare(self) -> None:
        """Score the model as given, and measure its strips."""
        for split in ("valid", "test"):
            score = self.task.evaluate(self.model, split, self.training.batch_settings(self.task))
            self.before[split] = {"value": score.value, "n_predictions": score.n_predictions}
        self.begin, _ = self.measure(0)

    def measure(self, index: int) -> tuple[dict[str, Any], PerFamily]:
        """Penalty weights from the curvature at these weights: their record, and the evidence that every strip adds."""
        strips, seed = self.strips, self.weights.seed
        data = upcoming(self.weights, self.task, self.training, self.sparsity.curvature_batches, index)
        if self.sparsity.curvature == "recursion":
            curvature = recursion_weights(self.model, data)
        else:
            curvature = sampled_weights(self.model, data, seed, index)
        told: dict[str, Any] = {}
        if index == 0:
            told = {"break_even": break_even(strips, self.parameters, curvature)}
            self.strength = self.strength or told["break_even"]
            if not self.strength:
                raise Emptied("the loss has no curvature where this model stands: it must be trained before")
        assert self.strength is not None
        h = {name: curvature[name] / self.strength for name in strips.by_weight}
        s = strips.update(self.parameters, h, strips.full(1.0))
        self.omega = strips.omega(h, s)
        gain = strips.gain(self.parameters, h, s)
        return {**told, "gamma": _listed(s), "gain": _listed(gain)}, gain

    def shrink(self, thresholds: PerFamily) -> None:
        """Proximal step: strips lose so much of their norm, the dead ones all of it."""
        dead = {name: each.masked_fill(~self.alive[name], math.inf) for name, each in thresholds.items()}
        self.strips.shrink(self.parameters, dead)

    def penalise(self) -> None:
        """The penalty's proximal step after an update of the weights."""
        assert self.strength is not None
        rate = self.weights.step_size * self.strength
        self.shrink({name: rate * each for name, each in self.omega.items()})

    def prune(self, gain: PerFamily) -> None:
        """Strips that are zero or tiny die, and those that evidence is against, the worst first."""
        alive, sparsity = self.alive, self.sparsity
        for name, norm in self.strips.norms(self.parameters).items():
            alive[name] = alive[name] & (norm > sparsity.threshold * norm.max())
            against = (alive[name] & (gain[name] <= 0)).nonzero()[:, 0]
            if len(against) == alive[name].sum():
                half = self.begin["break_even"]
                raise Emptied(
                    f"strength {self.strength:g}: no unit of family {name!r} is left; half of all were to go at "
                    f"{half:.1e} when it began, try --strength {half / 2:.1e}"
                )
            if sparsity.dynamic:
                against = against[gain[name][against].argsort()][: math.ceil(sparsity.share * alive[name].sum().item())]
            alive[name][against] = False
        self.shrink(self.strips.full(0.0))

    def text(self) -> str:
        return f"units {'/'.join(map(str, self.rounds[-1]['units'].values()))}" if self.rounds else "first round"


def sparsify(
    model: Model, task: Task, training: Training, sparsity: Sparsity, seed: int, job: Job, device: torch.device
) -> dict[str, Any]:
    """Train `model` until some of its strips are zero; it holds the result, dead strips set to zero.

    Returns:
        {"kept": family -> list of units, "rounds": a record each, "steps", "before": scores of the model as given}.

    Raises:
        Emptied: a family died whole.
        Diverged, Interrupted: as in `train.fit`.
    """
    length = Length(sparsity.rounds * sparsity.round_epochs)
    training = replace(training, optimizer=training.optimizer.plain_sgd(), evaluate_steps=None).lasting(length)
    weights = WeightTraining(model, task, training, seed, device)
    pruning = Pruning(model, task, training, sparsity, weights)
    loop = Loop(job, weights, training.checkpoint_steps, pruning.state_dict, pruning.load_state_dict)
    loop.start(pruning.prepare)
    while not weights.over():
        try:
            loop.loss.add(weights.update(weights.draw()))
            pruning.penalise()
            ended = weights.due()
            full = ended and weights.stream.epoch % sparsity.round_epochs == 0
            if full:
                measured, gain = pruning.measure(len(pruning.rounds) + 1)
                if sparsity.dynamic or weights.over():
                    pruning.prune(gain)
            if ended:
                score = task.evaluate(model, "valid", training.batch_settings(task))
                if not math.isfinite(score.value):
                    raise NotFinite("validation score is not finite")
        except NotFinite as problem:
            loop.recover(problem)
            continue
        if ended:
            told = {"valid": score.value, "units": {name: int(living.sum()) for name, living in pruning.alive.items()}}
            record = {"round": len(pruning.rounds) + 1, "train_loss": loop.loss.value(), **told}
            loop.end_epoch(weights.epoch + 1, **told)
            if full:
                norms = _listed(pruning.strips.norms(pruning.parameters))
                pruning.rounds.append({**record, **measured, "norms": norms})
        loop.end_step(ended, weights.steps, pruning.text())

    kept = {name: living.nonzero()[:, 0].tolist() for name, living in pruning.alive.items()}
    return {
        "strength": pruning.strength,
        "begin": pruning.begin,
        "kept": kept,
        "rounds": pruning.rounds,
        "before": pruning.before,
        "steps": weights.steps,
    }


def _listed(each: PerFamily) -> dict[str, list[float]]:
    """Rounded, for the record."""
    return {name: [float(f"{value:.{DIGITS}g}") for value in values.tolist()] for name, values in each.items()}
