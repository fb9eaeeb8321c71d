"""The planted plain recurrent network: are the units and inputs that made the data found again?

    x_t = tanh(W_x x_{t-1} + W_i u_t),   y_t = o x_t + noise      (o: one factor a unit)

Inputs are Gaussian. The truth uses the first units and inputs alone: W_x and W_i are zero but for a block in the upper
left corner. A larger network is fitted to the data by full-batch proximal gradient, ten loops, after the note on plain
recurrent networks that came with BayesNAS (Zhou et al., ICML 2019): fit, curvature by recursion through time, variances
and penalty weights, pruning (`dynamic`) or pruning after the last loop (`last`). Every unit has an output of its own,
since units could otherwise trade places and no position would be right or wrong.

lambda = log(n) sigma^2 / n with n = T B predictions and sigma from the residuals of the unpenalised fit: dropping a
strip is worth log(n) / 2 of log-likelihood a weight, as in BIC (Schwarz, 1978). At the likelihood's own sigma^2 / n
every other strip that fits noise alone would stay: the mean of w^2 H n / sigma^2 over its weights is about 1. Compared
with

    lasso       the same fit with omega = 1 throughout, lambda from a grid by the loss on held-out sequences
    magnitude   the unpenalised fit, of which the largest strips are kept, as many as the truth has (it is told)

    python benchmarks/planted_rnn.py --seeds 20
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from lmnas.core.seeds import generator
from lmnas.nn.curvature import Chain, chain_diagonal
from lmnas.nn.sparsity.strips import PerFamily, plain_layout

GRID = (0.001, 0.003, 0.01, 0.03, 0.1)
TINY = 0.01
"""A strip whose norm is below this share of its family's largest counts as zero."""


@dataclass(frozen=True)
class World:
    """Sizes of truth and fit, and of the data."""

    units: int = 10
    inputs: int = 6
    true_units: int = 4
    true_inputs: int = 3
    steps: int = 20
    sequences: int = 12
    noise: float = 0.3
    loops: int = 10
    loop_steps: int = 100
    rate: float = 0.5
    clip: float = 0.3


class Data:
    """Training and held-out sequences of one seed, and the true weights. u (T, B, M), y (T, B, N)."""

    def __init__(self, world: World, seed: int):
        w, n, m = world, world.true_units, world.true_inputs
        noise = generator(seed, "planted")
        self.truth = {
            "w_x": torch.zeros(w.units, w.units),
            "w_i": torch.zeros(w.units, w.inputs),
            "w_o": torch.zeros(w.units),
        }
        self.truth["w_x"][:n, :n] = torch.randn(n, n, generator=noise) / n**0.5
        self.truth["w_i"][:n, :m] = torch.randn(n, m, generator=noise) / m**0.5
        self.truth["w_o"][:n] = 1.0
        self.split = {}
        for name in ("train", "held out"):
            u = torch.randn(w.steps, w.sequences, w.inputs, generator=noise)
            y = predict(self.truth, u)
            self.split[name] = (u, y + w.noise * torch.randn(y.shape, generator=noise))


def predict(weights: dict[str, Tensor], u: Tensor) -> Tensor:
    """(T, B, N) outputs."""
    state = u.new_zeros(1, u.shape[1], len(weights["w_x"]))
    x, _ = torch.rnn_tanh(u, state, [weights["w_i"], weights["w_x"]], False, 1, 0.0, False, False, False)
    return x * weights["w_o"]


def loss(weights: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
    """Mean over steps and sequences of half the squared error."""
    u, y = data
    return 0.5 * (predict(weights, u) - y).square().sum(-1).mean()


def curvature(weights: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Curvature by the recursion through time, without the terms that may be negative."""
    u, y = data
    chain = Chain(weights["w_x"], weights["w_i"], weights["w_o"].diag())
    found = chain_diagonal(chain, u, y.new_zeros(y.shape[1:]), y, "squared-error", curved=False)
    return {"w_x": found.w_x, "w_i": found.w_i, "w_o": found.w_o.diagonal()}


class Fit:
    """The larger network, from weights that the seed alone decides."""

    def __init__(self, world: World, data: Data, seed: int):
        self.world, self.data = world, data
        self.strips = plain_layout(world.units, world.inputs, diagonal_output=True)
        noise = generator(seed, "planted", "start")
        self.weights = {
            name: (0.3 * torch.randn(value.shape, generator=noise)).requires_grad_()
            for name, value in data.truth.items()
        }
        with torch.no_grad():
            self.weights["w_o"].fill_(1.0)
        self.alive = {name: torch.ones_like(each, dtype=torch.bool) for name, each in self.strips.full(0.0).items()}

    def descend(self, strength: float, omega: PerFamily) -> None:
        """One loop of proximal gradient steps."""
        w = self.world
        limits = {name: each.masked_fill(~self.alive[name], torch.inf) for name, each in omega.items()}
        for _ in range(w.loop_steps):
            gradients = torch.autograd.grad(loss(self.weights, self.data.split["train"]), list(self.weights.values()))
            norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
            rate = w.rate * min(1.0, w.clip / max(norm, 1e-9))
            with torch.no_grad():
                for weight, gradient in zip(self.weights.values(), gradients, strict=True):
                    weight -= rate * gradient
            self.strips.shrink(self.weights, {name: rate * strength * each for name, each in limits.items()})

    def prune(self) -> None:
        for name, norms in self.strips.norms(self.weights).items():
            self.alive[name] &= norms > TINY * norms.max()

    def held_out(self) -> float:
        return loss(self.weights, self.data.split["held out"]).item()


def bayes(world: World, data: Data, seed: int, strength: float, dynamic: bool) -> Fit:
    fit = Fit(world, data, seed)
    omega = fit.strips.full(1.0)
    for loop in range(world.loops):
        fit.descend(strength, omega)
        if dynamic or loop == world.loops - 1:
            fit.prune()
        weights = {name: value.detach() for name, value in fit.weights.items()}
        h = {name: each / strength for name, each in curvature(weights, data.split["train"]).items()}
        omega = fit.strips.omega(h, fit.strips.update(weights, h, fit.strips.full(1.0)))
    return fit


def lasso(world: World, data: Data, seed: int, strength: float) -> Fit:
    """Group lasso; without strength the unpenalised fit."""
    fit = Fit(world, data, seed)
    for _ in range(world.loops):
        fit.descend(strength, fit.strips.full(1.0))
    fit.prune()
    return fit


def largest(fit: Fit, units: int, inputs: int) -> dict[str, Tensor]:
    """The strips of largest norm, the given number of each family."""
    kept = {}
    for (name, norms), n in zip(fit.strips.norms(fit.weights).items(), (units, inputs), strict=True):
        kept[name] = torch.zeros_like(norms, dtype=torch.bool).index_fill(0, norms.topk(n).indices, True)
    return kept


def agreement(world: World, kept: dict[str, Tensor]) -> dict[str, float]:
    """Precision and recall of the mask of W_x and W_i entries, and whether it is the truth."""
    state, inputs = kept["state"], kept["input"]
    found = torch.cat([state[:, None] & state, state[:, None] & inputs], 1)
    state = torch.arange(world.units) < world.true_units
    truth = torch.cat([state[:, None] & state, state[:, None] & (torch.arange(world.inputs) < world.true_inputs)], 1)
    hits = (found & truth).sum().item()
    return {
        "precision": hits / max(1, found.sum().item()),
        "recall": hits / truth.sum().item(),
        "exact": float(torch.equal(found, truth)),
        "units": float(kept["state"].sum()),
        "inputs": float(kept["input"].sum()),
    }


def bic_strength(world: World, data: Data, dense: Fit) -> float:
    """lambda = log(n) sigma^2 / n, sigma from the residuals of the unpenalised fit."""
    u, y = data.split["train"]
    n = world.steps * world.sequences
    n_weights = sum(value.numel() for value in data.truth.values())
    residual = (predict(dense.weights, u) - y).square().sum().item()
    return math.log(n) * residual / (n * world.units - n_weights) / n


def one_seed(world: World, seed: int) -> dict[str, dict[str, float]]:
    """Results of each method on the data of one seed."""
    data = Data(world, seed)
    dense = lasso(world, data, seed, 0.0)
    strength = bic_strength(world, data, dense)
    rows = {}
    for name, dynamic in (("bayes, dynamic", True), ("bayes, last", False)):
        rows[name] = agreement(world, bayes(world, data, seed, strength, dynamic).alive)
    fits = [lasso(world, data, seed, grid) for grid in GRID]
    rows["lasso"] = agreement(world, min(fits, key=lambda fit: fit.held_out()).alive)
    # the best that any lambda of the grid would have given, judged by the truth
    rows["lasso, best"] = max((agreement(world, fit.alive) for fit in fits), key=lambda a: a["precision"] * a["recall"])
    rows["magnitude"] = agreement(world, largest(dense, world.true_units, world.true_inputs))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--noise", type=float, default=World.noise)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    world, began = World(noise=options.noise), time.monotonic()
    seeds = [one_seed(world, seed) for seed in range(options.seeds)]
    if options.json:
        print(json.dumps({"world": asdict(world), "seeds": seeds}))
        return
    print(f"{'':<16}{'precision':>10}{'recall':>8}{'exact':>7}{'units':>7}{'inputs':>8}")
    for name in seeds[0]:
        mean = {key: statistics.fmean(row[name][key] for row in seeds) for key in seeds[0][name]}
        exact = f"{sum(row[name]['exact'] for row in seeds):.0f}/{len(seeds)}"
        line = f"{name:<16}{mean['precision']:>10.3f}{mean['recall']:>8.3f}{exact:>7}"
        print(f"{line}{mean['units']:>7.2f}{mean['inputs']:>8.2f}")
    print(f"truth: {world.true_units} of {world.units} units, {world.true_inputs} of {world.inputs} inputs")
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
