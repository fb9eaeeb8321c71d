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
from torch import Tensor, nn

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
"""How far from w^2 H the default strength is looked for, and updates of the variances meanwhile."""
OUTER = "embedding"
"""The family of the embedding's dimensions, which are the last layer's units: input and output are tied."""


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """How units are taken out.

    Attributes:
        strength: lambda, nats a prediction. None: `break_even` at the start.
        rounds: curvature, update and training, so often.
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
        """Rows of what computes layer i's units, columns of what reads them in the layer itself."""
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
    batches = training.batch_settings(task)
    strips = layout(model)
    assert isinstance(model, SoftmaxModel)
    weights = WeightTraining(model, task, training, seed, device)
    parameters = dict(model.named_parameters())
    strength, omega = sparsity.strength, strips.full(0.0)
    alive = {name: torch.ones_like(value, dtype=torch.bool) for name, value in omega.items()}
    begin, rounds, before = dict[str, Any](), list[dict[str, Any]](), dict[str, Any]()

    def state() -> dict[str, Any]:
        return {
            "strength": strength,
            "omega": omega,
            "alive": alive,
            "begin": begin,
            "rounds": rounds,
            "before": before,
        }

    def restore(saved: dict[str, Any]) -> None:
        nonlocal strength, omega, alive, begin, rounds, before
        strength, omega, alive = saved["strength"], saved["omega"], saved["alive"]
        begin, rounds, before = saved["begin"], list(saved["rounds"]), saved["before"]

    def measure(index: int) -> tuple[dict[str, Any], PerFamily]:
        """Penalty weights from the curvature here; what is told of it, and the evidence that every strip adds."""
        nonlocal strength, omega
        data = upcoming(weights, task, training, sparsity.curvature_batches, index)
        if sparsity.curvature == "recursion":
            curvature = recursion_weights(model, data)
        else:
            curvature = sampled_weights(model, data, seed, index)
        told: dict[str, Any] = {}
        if index == 0:
            told = {"break_even": break_even(strips, parameters, curvature)}
            strength = strength or told["break_even"]
            if not strength:
                raise Emptied("the loss has no curvature where this model stands: it must be trained before")
        assert strength is not None
        h = {name: curvature[name] / strength for name in strips.by_weight}
        s = strips.update(parameters, h, strips.full(1.0))
        omega = strips.omega(h, s)
        gain = strips.gain(parameters, h, s)
        return {**told, "gamma": _listed(s), "gain": _listed(gain)}, gain

    def prune(gain: PerFamily) -> None:
        """Strips that are zero or tiny die, and those that evidence is against, the worst first."""
        norms = strips.norms(parameters)
        for name, norm in norms.items():
            alive[name] = alive[name] & (norm > sparsity.threshold * norm.max())
            against = (alive[name] & (gain[name] <= 0)).nonzero()[:, 0]
            if len(against) == alive[name].sum():
                raise Emptied(
                    f"strength {strength:g}: no unit of family {name!r} is left; half of all were to go at "
                    f"{begin['break_even']:.1e} when it began, try --strength {begin['break_even'] / 2:.1e}"
                )
            if sparsity.dynamic:
                against = against[gain[name][against].argsort()][: math.ceil(sparsity.share * alive[name].sum().item())]
            alive[name][against] = False
        strips.shrink(parameters, _thresholds(strips.full(0.0), alive))

    def prepare() -> None:
        nonlocal begin
        for split in ("valid", "test"):
            score = task.evaluate(model, split, batches)
            before[split] = {"value": score.value, "n_predictions": score.n_predictions}
        begin, _ = measure(0)

    loop = Loop(job, weights, training.checkpoint_steps, state, restore)
    loop.start(prepare)
    while not weights.over():
        try:
            batch = weights.draw()
            loop.loss.add(weights.update(batch))
            assert strength is not None
            rate = weights.step_size * strength
            strips.shrink(parameters, _thresholds({name: rate * each for name, each in omega.items()}, alive))
            ended = weights.due()
            full = ended and weights.stream.epoch % sparsity.round_epochs == 0
            if full:
                measured, gain = measure(len(rounds) + 1)
                if sparsity.dynamic or weights.over():
                    prune(gain)
            if ended:
                score = task.evaluate(model, "valid", batches)
                if not math.isfinite(score.value):
                    raise NotFinite("validation score is not finite")
        except NotFinite as problem:
            loop.recover(problem)
            continue
        if ended:
            told = {
                "train_loss": loop.loss.value(),
                "valid": score.value,
                "units": {name: int(living.sum()) for name, living in alive.items()},
            }
            loop.end_epoch(weights.epoch + 1, **{name: told[name] for name in ("valid", "units")})
            if full:
                norms = _listed(strips.norms(parameters))
                rounds.append({"round": len(rounds) + 1, **told, **measured, "norms": norms})
        text = f"units {'/'.join(map(str, rounds[-1]['units'].values()))}" if rounds else "first round"
        loop.end_step(ended, weights.steps, text)

    kept = {name: living.nonzero()[:, 0].tolist() for name, living in alive.items()}
    return {
        "strength": strength,
        "begin": begin,
        "kept": kept,
        "rounds": rounds,
        "before": before,
        "steps": weights.steps,
    }


def _thresholds(thresholds: PerFamily, alive: dict[str, Tensor]) -> PerFamily:
    """Infinite where a strip is dead."""
    return {name: each.masked_fill(~alive[name], math.inf) for name, each in thresholds.items()}


def _listed(each: PerFamily) -> dict[str, list[float]]:
    """Rounded, for the record."""
    return {name: [float(f"{value:.{DIGITS}g}") for value in values.tolist()] for name, values in each.items()}
