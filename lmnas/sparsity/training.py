"""Training that takes units out of a trained recurrent language model.

A round: curvature H of all weights, variances and penalty weights omega at h = H / lambda (`strips`), then training on
E + lambda * sum_g omega_g |w_g| with a proximal step after every step of SGD, so that strips reach zero exactly. Strips
at zero, or tiny beside their family's largest, are pruned: after every round (dynamic) or after the last one. Then the
network is cut.

Departures from the note on plain recurrent networks: the first round has its omega from the curvature of the trained
weights (the note starts with 1, which says nothing at lambda near 1 / tokens), the update is repeated to its limit at
fixed weights, and gradient noise makes strips wander that the note's full-batch training would leave at zero, hence the
relative threshold.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lmnas.curvature import recursion_weights, sampled_weights
from lmnas.errors import Emptied, UserError
from lmnas.job import Job
from lmnas.protocols import Batch, State, Task
from lmnas.seeds import rng
from lmnas.sparsity.strips import Family, Layout, PerFamily, Piece, Weights
from lmnas.train import Mean, NotFinite, Recovery, Training, WeightTraining

DIGITS = 5
"""Significant digits of norms in the record."""
OF_MEDIAN = 0.5
"""The default strength by the strips' median worth."""
OUTER = "embedding"
"""The family of the embedding's dimensions, which are the last layer's units: input and output are tied."""


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """How units are taken out.

    Attributes:
        strength: lambda, nats a prediction; see `worth`. None: so many times the strips' median worth at the start.
        rounds: curvature, update and training, so often.
        round_epochs: passes over the training data in a round.
        dynamic: prune after every round instead of after the last alone.
        threshold: of a strip's norm by its family's largest, below which it counts as zero.
        curvature: `sampled` or `recursion` (`lmnas.curvature.weights`), over `curvature_batches` batches.
    """

    strength: float | None = None
    rounds: int = 3
    round_epochs: int = 1
    dynamic: bool = True
    threshold: float = 0.01
    curvature: str = "sampled"
    curvature_batches: int = 4


def layout(model: nn.Module) -> Layout:
    """The strips of a tied language model of LSTM or plain recurrent layers.

    Dimension n of the embedding is the last layer's unit n and the first layer's input n: one family. Every inner layer
    has one of its own.

    Raises:
        UserError: another body.
    """
    body: Any = getattr(model, "body", None)
    layers: Any = getattr(body, "layers", ())
    if not len(layers) or not all(type(layer) in (nn.LSTM, nn.RNN) for layer in layers):
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


def upcoming(weights: WeightTraining, task: Task, training: Training, n: int, index: int) -> list[tuple[Batch, State]]:
    """`n` successive training batches from a random place, each with the state carried to it."""
    stream = task.stream("train", training.batch_settings(task), weights.seed)
    skipped = rng(weights.seed, "curvature", index).randrange(max(1, stream.steps_per_epoch - n - 1))
    for _ in range(skipped):
        stream.next()
    batches: list[tuple[Batch, State]] = []
    carry: State = None
    with torch.no_grad():
        while len(batches) < n:
            batch = stream.next()
            batch = Batch(batch.inputs.to(weights.device), batch.targets.to(weights.device))
            if carry is not None:  # the first one warms the state up
                batches.append((batch, carry))
            _, carry = weights.model(batch, carry, {}, None, False)
    return batches


def worth(strips: Layout, weights: Weights, curvature: Weights) -> PerFamily:
    """The largest lambda at which every strip stays: the mean of w^2 H over its weights, weighted by H.

    At fixed curvature and least-cost weights w, evidence rises with a strip's variance from 0 on where
    sum_e h_e (w_e^2 h_e - 1) > 0, h = H / lambda. After training with the penalty it errs towards less.
    """
    by_weight = {name: curvature[name].double() for name in strips.by_weight}
    squares = {name: (weights[name].detach().double() * each).square() for name, each in by_weight.items()}
    total, above = strips.sums(by_weight), strips.sums(squares)
    return {name: torch.where(total[name] > 0, above[name] / total[name], 0.0) for name in total}


def sparsify(
    model: nn.Module, task: Task, training: Training, sparsity: Sparsity, seed: int, job: Job, device: torch.device
) -> dict[str, Any]:
    """Train `model` until some of its strips are zero; it holds the result, dead strips set to zero.

    Returns:
        {"kept": family -> list of units, "rounds": a record each, "steps", "before": scores of the model as given}.

    Raises:
        Emptied: a family died whole.
        Diverged, Interrupted: as in `train.fit`.
    """
    optimizer = replace(training.optimizer, method="sgd", momentum=0.0, averaging="none")
    training = replace(training, optimizer=optimizer, epochs=sparsity.rounds * sparsity.round_epochs)
    batches = training.batch_settings(task)
    strips = layout(model)
    weights = WeightTraining(model, task, training, seed, device)
    parameters = dict(model.named_parameters())
    recovery, loss_mean = Recovery(job), Mean()
    strength, omega = sparsity.strength, strips.full(0.0)
    alive = {name: torch.ones_like(value, dtype=torch.bool) for name, value in omega.items()}
    updates, rounds, before = 0, list[dict[str, Any]](), dict[str, Any]()

    def state() -> dict[str, Any]:
        return {
            "training": weights.state_dict(),
            "strength": strength,
            "omega": omega,
            "alive": alive,
            "updates": updates,
            "rounds": rounds,
            "before": before,
            "loss": [loss_mean.total, loss_mean.count],
            "recoveries": recovery.count,
        }

    def restore(saved: dict[str, Any]) -> None:
        nonlocal strength, omega, alive, updates, rounds, before
        weights.load_state_dict(saved["training"])
        strength, omega, alive = saved["strength"], saved["omega"], saved["alive"]
        updates, rounds, before = saved["updates"], list(saved["rounds"]), saved["before"]
        loss_mean.total, loss_mean.count = saved["loss"]

    def update() -> dict[str, Any]:
        """Variances and penalty weights from the curvature here; what is told of them."""
        nonlocal omega, strength
        data = upcoming(weights, task, training, sparsity.curvature_batches, updates)
        if sparsity.curvature == "recursion":
            curvature = recursion_weights(model, data)
        else:
            curvature = sampled_weights(model, data, seed, updates)
        worths = worth(strips, parameters, curvature)
        living = torch.cat([worths[name][alive[name]] for name in worths])
        if strength is None:
            strength = OF_MEDIAN * living.median().item()
        h = {name: curvature[name] / strength for name in strips.by_weight}
        s = strips.update(parameters, h, strips.full(1.0))
        omega = strips.omega(h, s)
        gamma = {name: [_rounded(value) for value in variances.tolist()] for name, variances in s.items()}
        return {"worth_median": living.median().item(), "worth_max": living.max().item(), "gamma": gamma}

    def prune() -> None:
        """Strips that are zero or tiny die; their weights become zero."""
        norms = strips.norms(parameters)
        for name, norm in norms.items():
            alive[name] = alive[name] & (norm > sparsity.threshold * norm.max())
        strips.shrink(parameters, _thresholds(strips.full(0.0), alive))
        empty = [name for name, living in alive.items() if not living.any()]
        if empty:
            suggestion = rounds[0]["worth_median"]
            advice = f"; units were worth about {suggestion:.1e} at first, try --strength {suggestion / 2:.1e}"
            raise Emptied(f"strength {strength:g}: no unit of family {empty[0]!r} is left{advice}")

    saved = job.load()
    if saved is None:
        for split in ("valid", "test"):
            score = task.evaluate(model, split, batches)
            before[split] = {"value": score.value, "n_predictions": score.n_predictions}
        job.save(state())
    else:
        restore(saved)
        recovery.count = saved["recoveries"]

    while weights.stream.epoch < training.epochs:
        epoch = weights.stream.epoch
        if updates == epoch // sparsity.round_epochs:
            told = update()
            updates += 1
            rounds.append({"round": updates, **told})
            job.save(state())
        try:
            batch = weights.draw()
            loss_mean.add(weights.update(batch))
            assert strength is not None
            rate = weights.step_size * strength
            strips.shrink(parameters, _thresholds({name: rate * each for name, each in omega.items()}, alive))
            ended = weights.stream.epoch > epoch
            if ended:
                if weights.stream.epoch % sparsity.round_epochs == 0 and (
                    sparsity.dynamic or weights.stream.epoch == training.epochs
                ):
                    prune()
                score = task.evaluate(model, "valid", batches)
                if not math.isfinite(score.value):
                    raise NotFinite("validation score is not finite")
        except NotFinite as problem:
            salt = weights.salt
            restore(recovery.state(weights.steps, str(problem)))
            weights.salt = salt + 1
            job.save(state())
            continue
        if ended:
            norms = strips.norms(parameters)
            largest = {name: norm.max() for name, norm in norms.items()}
            told = {
                "train_loss": loss_mean.value(),
                "valid": score.value,
                "units": {n: int((norm > sparsity.threshold * largest[n]).sum()) for n, norm in norms.items()},
            }
            job.events.emit("epoch", epoch=epoch + 1, step=weights.steps, **told)
            if weights.stream.epoch % sparsity.round_epochs == 0:
                shown = {name: [_rounded(value) for value in norm.tolist()] for name, norm in norms.items()}
                rounds[-1] = {**rounds[-1], **told, "norms": shown}
            loss_mean = Mean()
        if ended or weights.steps % training.checkpoint_steps == 0:
            job.save(state())
        job.stop_if_asked(state)
        done = weights.steps / max(weights.stream.steps_per_epoch, 1)
        text = "" if "units" not in rounds[-1] else f"units {'/'.join(map(str, rounds[-1]['units'].values()))}"
        job.progress(min(done, training.epochs), training.epochs, text)

    kept = {name: living.nonzero()[:, 0].tolist() for name, living in alive.items()}
    return {"strength": strength, "kept": kept, "rounds": rounds, "before": before, "steps": weights.steps}


def _thresholds(thresholds: PerFamily, alive: dict[str, Tensor]) -> PerFamily:
    """Infinite where a strip is dead."""
    return {name: each.masked_fill(~alive[name], math.inf) for name, each in thresholds.items()}


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
