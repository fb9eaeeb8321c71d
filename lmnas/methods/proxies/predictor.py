"""A quick predictor for recurrent graphs, from a small untrained network and from the graph itself.

Three layers of width 64 read random numbers: no text is needed, and the answer depends on the graph alone. Measured
are hidden covariance (Serianni & Kalita, 2023, arXiv 2306.00288), the memory of the output (how well a linear read-out
recovers the input of k steps ago; Jaeger, "Short term memory in echo state networks", 2001), gradients back in time,
and the size and rank of the states.

`prior` combines four of these with equal weights; no trained cell went into it. `Predictor` is kernel ridge regression
on the losses of 100 trained cells, shipped with its provenance (`predictor.json`).

Shapes: T time, B batch, H width, D read-out targets.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmnas.core.contracts import Body, GraphSpace
from lmnas.core.genotype import Genotype
from lmnas.core.seeds import generator
from lmnas.methods.proxies.family import Family, Subject, Values
from lmnas.methods.proxies.statistics import Undefined, covariance_score
from lmnas.spaces.recurrent.graph_form import n_states

WIDTH, LAYERS, T, B = 64, 3, 64, 64
LAGS = (0, 1, 2, 3, 4, 8)
STEPS_BACK = (0, 1, 2, 3, 4, 8, 16, 32)
WARM_UP = 16
"""Steps that the read-out leaves out: a lag must not reach before the text."""
SHIPPED = Path(__file__).with_name("predictor.json")
OPERATIONS = (
    "linear",
    "blend",
    "elementwise_prod",
    "elementwise_sum",
    "activation_tanh",
    "activation_sigm",
    "activation_leaky_relu",
)


def memory(states: Tensor, inputs: Tensor, lags: Sequence[int]) -> list[float]:
    """R² of a linear read-out that recovers the inputs of k steps ago from the states.

    Args:
        states: (T, B, H), a layer's outputs.
        inputs: (T, B, D), what is to be recovered.
        lags: k, each below WARM_UP.

    Returns:
        Per lag the R² of ridge regression, fitted on half of the columns and measured on the others, at least 0.

    Raises:
        Undefined: states that are not finite.
    """
    if not torch.isfinite(states).all():
        raise Undefined("states that are not finite")
    rows = states[WARM_UP:].double()
    targets = torch.cat([inputs[WARM_UP - k : len(inputs) - k].double() for k in lags], dim=-1)
    half = states.shape[1] // 2
    fit, held = rows[:, :half].flatten(0, 1), rows[:, half:].flatten(0, 1)
    wanted, unseen = targets[:, :half].flatten(0, 1), targets[:, half:].flatten(0, 1)
    mean, scale = fit.mean(dim=0), fit.std(dim=0) + 1e-12
    fit, held = (fit - mean) / scale, (held - mean) / scale
    penalty = 1e-3 * len(fit) * torch.eye(fit.shape[1], dtype=torch.float64)
    read_out = torch.linalg.solve(fit.t() @ fit + penalty, fit.t() @ (wanted - wanted.mean(dim=0)))
    centred = unseen - wanted.mean(dim=0)
    missed = (centred - held @ read_out).square().sum(dim=0).view(len(lags), -1).sum(dim=1)
    whole = centred.square().sum(dim=0).view(len(lags), -1).sum(dim=1)
    return (1 - missed / whole).clamp(min=0.0).tolist()


def dynamics(build: Callable[[int, tuple[int, ...]], Body], seed: int = 0) -> dict[str, float]:
    """Features of a small untrained body that reads random inputs; NaN where one is undefined.

    Args:
        build: (width, widths of the layers) -> a recurrent body of such layers.

    Returns:
        For layers 1 to 3 `hidden_covariance`, as -log10(-S); `memory_k`; `size`, the log of the mean square of the
        states; `rank`, the log of their effective rank (exp of the entropy of the covariance's eigenvalues). And
        `gradient_k`: log mean square of ∂(random projection of the last output) / ∂(input k steps before).
    """
    body = build(WIDTH, (WIDTH,) * LAYERS)
    body.initialise(generator(seed, "predictor-init"), 0.1)
    draws = generator(seed, "predictor-inputs")
    inputs = torch.empty(T, B, WIDTH).uniform_(-0.1, 0.1, generator=draws)
    projection, direction = torch.randn(WIDTH, 16, generator=draws), torch.randn(WIDTH, generator=draws)
    seen: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda module, arguments, result: seen.append(result[0].detach()))
        for layer in body.stacked()
    ]
    leaf = inputs.clone().requires_grad_()
    outputs, _ = body(leaf, body.initial_state(B), {})
    (gradient,) = torch.autograd.grad((outputs[-1] @ direction).sum(), leaf)
    for handle in handles:
        handle.remove()
    found: dict[str, float] = {}
    for layer, states in enumerate(seen, start=1):
        entering = torch.cat([torch.zeros_like(states[:1]), states[:-1]]).flatten(0, 1)
        try:
            score = -math.log10(max(-covariance_score(entering.t()), 1.0))
        except Undefined:
            score = math.nan
        found[f"hidden_covariance_{layer}"] = score
        try:
            values = memory(states, inputs @ projection, LAGS)
        except Undefined:
            values = [math.nan] * len(LAGS)
        found |= {f"memory_{lag}_{layer}": value for lag, value in zip(LAGS, values, strict=True)}
        found[f"size_{layer}"] = math.log(float(states.double().square().mean()) + 1e-12)
        found[f"rank_{layer}"] = _log_rank(states.flatten(0, 1).double())
    squares = gradient.double().square().mean(dim=(1, 2)).flip(0)
    for back in STEPS_BACK:
        found[f"gradient_{back}"] = math.log(float(squares[back]) + 1e-30)
    return {name: value if math.isfinite(value) else math.nan for name, value in found.items()}


def _log_rank(rows: Tensor) -> float:
    if not torch.isfinite(rows).all():
        return math.nan
    centred = rows - rows.mean(dim=0)
    shares = torch.linalg.eigvalsh(centred.t() @ centred).clamp(min=0.0)
    shares = shares / shares.sum()
    return float(torch.special.entr(shares).sum())


def structure(recipe: Mapping[str, Any]) -> dict[str, float]:
    """Features of a cell's graph alone.

    Args:
        recipe: node -> {"op", "input"}.

    Returns:
        Numbers of states, nodes and each operation; which operation makes h_new_0 (`output_...`) and feeds it; shortest
        ways, in nodes, from x and from h_prev_0 to h_new_0 (9 where there is none), and over nodes other than linear
        ones and activations from any old state to any new one.
    """
    n = n_states(recipe)
    counts = Counter(node["op"] for node in recipe.values())
    found = {"states": float(n), "nodes": float(len(recipe))}
    found |= {f"count_{op}": float(counts[op]) for op in OPERATIONS}
    output = recipe["h_new_0"]
    found |= {f"output_{op}": float(output["op"] == op) for op in OPERATIONS}
    fed = Counter(recipe[i]["op"] for i in output["input"] if i in recipe)
    found |= {f"feeds_{op}": float(fed[op]) for op in OPERATIONS}

    @cache
    def way(source: str, target: str, gated: bool) -> int:
        if source == target:
            return 0
        node = recipe.get(target)
        if node is None or (gated and (node["op"] == "linear" or node["op"].startswith("activation"))):
            return 9
        return min(9, 1 + min(way(source, i, gated) for i in node["input"]))

    old, new = [f"h_prev_{i}" for i in range(n)], [f"h_new_{i}" for i in range(n)]
    found["way_x"] = float(way("x", "h_new_0", False))
    found["way_h"] = float(way("h_prev_0", "h_new_0", False))
    found["way_any"] = float(min(way(a, "h_new_0", False) for a in old))
    found["skips"] = float(sum(way(a, b, True) < 9 for a in old for b in new))
    found["own_skips"] = float(sum(way(a, b, True) < 9 for a, b in zip(old, new, strict=True)))
    found["self_reading"] = float(sum(way(a, b, False) < 9 for a, b in zip(old, new, strict=True)))
    return found


# ---------------------------------------------------------------------------------------------------- the predictors

PRIOR = {"hidden_covariance_1": 1.0, "memory_1_3": 1.0, "memory_2_3": 1.0, "size_3": -1.0}
"""A cell should keep its units apart, remember the last two words in its output, and not saturate."""
GRID = tuple((penalty, gamma) for penalty in (0.03, 0.1, 0.3, 1.0) for gamma in (0.1, 0.3, 1.0, 3.0))
LINEAR = 0.3
"""Weight of the linear kernel beside the Gaussian one: what carries over beyond the cells seen."""
CLIP = 3.0


class Predictor:
    """Kernel ridge regression on the features of this module; a higher value predicts a better cell.

        k(a, b) = exp(-gamma mean_j (a_j - b_j)²) + LINEAR mean_j a_j b_j

    over features that are standardised and clipped at ±CLIP; one that is undefined counts as -CLIP.

    Attributes:
        names: of the features.
        mean, scale: (F,), of the features over untrained networks.
        cells: (N, F), standardised features of the cells it was fitted to.
        weights: (N,), dual coefficients.
    """

    def __init__(
        self,
        names: Sequence[str],
        mean: np.ndarray,
        scale: np.ndarray,
        cells: np.ndarray,
        weights: np.ndarray,
        gamma: float,
    ):
        self.names, self.mean, self.scale = list(names), mean, scale
        self.cells, self.weights, self.gamma = cells, weights, gamma

    @classmethod
    def fit(
        cls, cells: Sequence[Mapping[str, float]], losses: Sequence[float], mean: np.ndarray, scale: np.ndarray
    ) -> "Predictor":
        """Fit the ranks of `losses`; penalty and gamma have the least leave-one-out error on these cells alone."""
        names = list(cells[0])
        rows = standardised(cells, names, mean, scale)
        ranks = 1.0 - (np.argsort(np.argsort(losses)) + 0.5) / len(losses)
        best = None
        for penalty, gamma in GRID:
            inverse = np.linalg.inv(_kernel(rows, rows, gamma) + penalty * np.eye(len(rows)))
            weights = inverse @ (ranks - ranks.mean())
            error = float(np.square(weights / np.diag(inverse)).mean())  # of leaving each cell out, in closed form
            if best is None or error < best[0]:
                best = (error, cls(names, mean, scale, rows, weights, gamma))
        assert best is not None
        return best[1]

    def predict(self, features: Sequence[Mapping[str, float]]) -> np.ndarray:
        """(N,) predictions."""
        return _kernel(standardised(features, self.names, self.mean, self.scale), self.cells, self.gamma) @ self.weights

    def document(self) -> dict[str, Any]:
        """The predictor as JSON values."""
        return {
            "features": self.names,
            "mean": np.round(self.mean, 5).tolist(),
            "scale": np.round(self.scale, 5).tolist(),
            "gamma": self.gamma,
            "weights": np.round(self.weights, 5).tolist(),
            "cells": np.round(self.cells, 3).tolist(),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "Predictor":
        mean, scale, cells, weights = (np.asarray(document[key]) for key in ("mean", "scale", "cells", "weights"))
        return cls(document["features"], mean, scale, cells, weights, document["gamma"])


def standardised(
    features: Sequence[Mapping[str, float]], names: Sequence[str], mean: np.ndarray, scale: np.ndarray
) -> np.ndarray:
    """(N, F) features as multiples of their scale; undefined ones are -CLIP."""
    rows = (np.array([[cell[name] for name in names] for cell in features], dtype=float) - mean) / scale
    return np.clip(np.nan_to_num(rows, nan=-CLIP), -CLIP, CLIP)


def _kernel(first: np.ndarray, second: np.ndarray, gamma: float) -> np.ndarray:
    distances = np.square(first[:, None] - second[None]).mean(axis=-1)
    return np.exp(-gamma * distances) + LINEAR * first @ second.T / first.shape[1]


@cache
def shipped() -> Predictor:
    """The predictor fitted to 100 cells of NAS-Bench-NLP."""
    return Predictor.from_document(json.loads(SHIPPED.read_text(encoding="utf-8")))


def prior(features: Mapping[str, float]) -> float:
    """Training-free: the sum of PRIOR's features, each in units of its scale over untrained cells."""
    model = shipped()
    places = [model.names.index(name) for name in PRIOR]
    row = standardised([features], list(PRIOR), model.mean[places], model.scale[places])[0]
    # an undefined feature is bad news whatever its sign
    signs = np.array([sign if math.isfinite(features[name]) else 1.0 for name, sign in PRIOR.items()])
    return float(row @ signs)


def features(space: GraphSpace, genotype: Genotype, seed: int = 0) -> dict[str, float]:
    """All features of a cell that `space` builds."""
    small = dynamics(lambda width, layers: space.stack(genotype, width, layers), seed)
    return {**small, **structure(genotype.choices)}


SCORES: Mapping[str, Callable[[Mapping[str, float]], float]] = {
    "predictor": lambda cell: float(shipped().predict([cell])[0]),
    "prior": prior,
}
"""Score -> its value for the features of one cell; higher predicts a better cell."""


class PredictorMetrics(Family):
    """The quick predictors; their own network and seed, so that they depend on the graph alone."""

    takes = frozenset({"sequence", "causal", "stateful", "graph"})
    listed_for = frozenset({"sequence", "causal", "stateful"})
    metrics = tuple(SCORES)
    reads_text = False

    def measure(self, subject: Subject, metrics: Sequence[str]) -> Values:
        space = subject.space
        assert isinstance(space, GraphSpace)
        try:
            cell = features(space, space.canonical(subject.genotype), subject.own_seed)
        except Undefined as reason:
            return dict.fromkeys(metrics, str(reason))
        return {name: SCORES[name](cell) for name in metrics}

    def n_inputs(self, subject: Subject) -> int:
        return T * B
