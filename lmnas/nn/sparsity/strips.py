"""Strips of weights that die together, and sparse Bayesian learning of their variances.

A strip holds every weight that touches one unit: rows of what computes it, columns of what reads it. Removing strip n
of a family leaves a dense network of the same kind with one unit less. After the note on compressing plain recurrent
networks that came with BayesNAS (Zhou, Yang, Wang, Pan, ICML 2019), whose strips are rows of a state-space matrix:

    state  [W_x, W_x^T, W_i, W_o^T] row n     everything that touches unit n
    input  W_i^T row m                        everything that leaves input m

A weight between units n and m lies in both of their strips. Precisions add, 1 / gamma_e = sum_g 1 / s_g over its
strips, and with h = H / lambda (`lmnas.nn.sparsity.priors`) the updates at fixed weights are

    alpha_e = h_e / (1 + gamma_e h_e),   omega_g^2 = sum_{e in g} (gamma_e / s_g)^2 alpha_e,   s_g <- |w_g| / omega_g

(the note's omega_g = sqrt(sum |alpha|) where a weight has one strip alone). The training cost is
lambda * sum_g omega_g |w_g|, a group lasso whose groups overlap. Departures: a weight counts once in a strip, where the
note's table counts some blocks of two layers twice; biases of a unit are in its strip, since one that nothing reads
would otherwise keep being moved by its constant output.

Shapes: N strips of a family.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lmnas.nn.sparsity.priors import HIGHEST, ITERATIONS, LOWEST, slope

Weights = Mapping[str, Tensor]
"""Tensors by the weight's name."""
PerFamily = dict[str, Tensor]
"""Family -> (N,), a number for each strip."""


@dataclass(frozen=True)
class Piece:
    """The part of a family's strips that lies in one weight: slices along `axis`.

    Attributes:
        name: of the weight, a vector or a matrix.
        blocks: number of times that the units repeat along the axis (4 gates of an LSTM, one below the other).
        diagonal: False leaves out what unit n has in its own row, where the same family's rows hold that already.
    """

    name: str
    axis: int
    blocks: int = 1
    diagonal: bool = True

    def _own(self, shape: torch.Size) -> Tensor:
        """(rows, columns) bool: entries that unit n has in a row of its own."""
        rows, columns = torch.arange(shape[0]), torch.arange(shape[1])
        return (rows[:, None] % shape[1]) == columns

    def sums(self, values: Tensor) -> Tensor:
        """(N,): each strip's sum of `values`, which have the weight's shape."""
        if not self.diagonal:
            values = values.masked_fill(self._own(values.shape).to(values.device), 0.0)
        if values.dim() > 1:
            values = values.sum(1 - self.axis)
        return values.view(self.blocks, -1).sum(0)

    def spread(self, each: Tensor, like: Tensor, neutral: float) -> Tensor:
        """Number of each strip at the weight's entries.

        Args:
            each: (N,).
            like: of the weight's shape.
            neutral: value at entries without a strip.

        Returns:
            (N · blocks,) for a vector; for a matrix a tensor that broadcasts to it.
        """
        each = each.repeat(self.blocks).to(like)
        if like.dim() == 1:
            return each
        each = each[:, None] if self.axis == 0 else each[None, :]
        return each if self.diagonal else torch.where(self._own(like.shape).to(like.device), neutral, each)


@dataclass(frozen=True)
class Family:
    """`size` strips of one sort: the units of a layer, or inputs."""

    name: str
    size: int
    pieces: tuple[Piece, ...]


class Layout:
    """The families of strips of one network. At most one family cuts an axis of a weight."""

    def __init__(self, families: tuple[Family, ...]):
        self.families = families
        self.by_weight: dict[str, list[tuple[str, Piece]]] = {}
        for family in families:
            for piece in family.pieces:
                self.by_weight.setdefault(piece.name, []).append((family.name, piece))

    def full(self, value: float) -> PerFamily:
        """`value` for all strips, (N,) for each family."""
        return {family.name: torch.full((family.size,), value, dtype=torch.float64) for family in self.families}

    def squares(self, weights: Weights) -> PerFamily:
        """Sum of squares of every strip, (N,) for each family."""
        return self.sums({name: weights[name].detach().double().square() for name in self.by_weight})

    def sums(self, values: Weights) -> PerFamily:
        """Sum over every strip of `values`, which have the weights' shapes: (N,) for each family."""
        return {
            family.name: torch.stack([piece.sums(values[piece.name]).cpu() for piece in family.pieces]).sum(0)
            for family in self.families
        }

    def norms(self, weights: Weights) -> PerFamily:
        """Euclidean norm of every strip, (N,) for each family."""
        return {name: squares.sqrt() for name, squares in self.squares(weights).items()}

    def counts(self, weights: Weights) -> PerFamily:
        """Number of weights of every strip, (N,) for each family."""
        return self.sums({name: torch.ones_like(weights[name], dtype=torch.float64) for name in self.by_weight})

    # ------------------------------------------------------------------------------------------------------ training

    def cost(self, weights: Weights, omega: PerFamily) -> Tensor:
        """sum_g omega_g |w_g|, a scalar."""
        norms = self.norms(weights)
        return torch.stack([(omega[name] * norm).sum() for name, norm in norms.items()]).sum()

    @torch.no_grad()
    def shrink(self, weights: Weights, thresholds: PerFamily) -> None:
        """A proximal step of sum_g t_g |w_g|, in place: every strip times max(0, 1 - t / |w|), a strip of zeros stays.

        Exact where strips share no weight. A weight of two strips takes both factors, each from the norms before the
        step: the two proximal maps after one another, but for terms of second order in t (Bertsekas, 2011, has the
        incremental proximal method). Strips whose norm is below their threshold become exactly zero either way.
        """
        norms = self.norms(weights)
        factors = {
            name: torch.where(norm > thresholds[name], 1 - thresholds[name] / norm, torch.zeros_like(norm))
            for name, norm in norms.items()
        }
        for name, pieces in self.by_weight.items():
            for family, piece in pieces:
                weights[name].mul_(piece.spread(factors[family], weights[name], 1.0))

    # ----------------------------------------------------------------------------------------------------- variances

    def gamma(self, name: str, s: PerFamily, like: Tensor) -> Tensor:
        """Effective variances of the entries of weight `name`, of the shape of `like`."""
        precision = torch.zeros_like(like)
        for family, piece in self.by_weight[name]:
            precision = precision + piece.spread(1 / s[family], like, 0.0)
        return 1 / precision

    def omega(self, h: Weights, s: PerFamily) -> PerFamily:
        """Penalty weights at variances `s`, (N,) for each family; `h`: curvature / lambda of every weight, of its
        shape, not negative."""
        total = self.full(0.0)
        for name, pieces in self.by_weight.items():
            values = h[name].double()
            gamma = self.gamma(name, s, values)
            scaled = gamma.square() * slope(gamma, values)
            for family, piece in pieces:
                total[family] += piece.sums(scaled).cpu() / s[family].square()
        return {family: squares.sqrt() for family, squares in total.items()}

    def update(self, weights: Weights, h: Weights, s: PerFamily, iterations: int = ITERATIONS) -> PerFamily:
        """Variances after `iterations` majorise-minimise steps at fixed weights: no step raises `objective`."""
        norms = self.norms(weights)
        for _ in range(iterations):
            omega = self.omega(h, s)
            s = {
                # where neither norm nor curvature speaks, a variance stays
                name: torch.where((norms[name] == 0) & (omega[name] == 0), s[name], norms[name] / omega[name]).clamp(
                    LOWEST, HIGHEST
                )
                for name in s
            }
        return s

    def objective(self, weights: Weights, h: Weights, s: PerFamily) -> Tensor:
        """sum_e w_e^2 / gamma_e + log(1 + gamma_e h_e), a scalar: the objective that the updates lower."""
        total = torch.zeros((), dtype=torch.float64)
        for name in self.by_weight:
            values = h[name].double()
            gamma = self.gamma(name, s, values)
            total += (weights[name].detach().double().square() / gamma + torch.log1p(gamma * values)).sum().cpu()
        return total

    def gain(self, weights: Weights, h: Weights, s: PerFamily) -> PerFamily:
        """Twice the log evidence that every strip adds: sum over e of w^2 h (1 - 1 / (1 + gamma h)) - log(1 + gamma h).

        The integral of exp(-h (v - w)^2 / 2) over v of variance gamma, against its value at v = 0. Not positive: the
        network without the strip is the likelier one, although its variance may be a local optimum.
        """
        each = {}
        for name in self.by_weight:
            values = h[name].double()
            scaled = self.gamma(name, s, values) * values
            misfit = weights[name].detach().double().square() * values
            each[name] = misfit * scaled / (1 + scaled) - torch.log1p(scaled)
        return self.sums(each)

    # ------------------------------------------------------------------------------------------------------- cutting

    def cut(self, weights: Weights, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The smaller network's weights: without the strips that are not in `kept`, (N,) bool for each family."""
        result = {name: tensor.detach().clone() for name, tensor in weights.items()}
        for family in self.families:
            alive = kept[family.name].nonzero()[:, 0]
            for piece in family.pieces:
                starts = torch.arange(piece.blocks)[:, None] * family.size
                index = (starts + alive).flatten().to(result[piece.name].device)
                result[piece.name] = result[piece.name].index_select(piece.axis, index)
        return result


def plain_layout(n_units: int, n_inputs: int, diagonal_output: bool = False) -> Layout:
    """The note's one-layer table: weights `w_x` (N, N), `w_i` (N, M), `w_o` (O, N); or `w_o` (N,), a factor a unit."""
    state = (
        Piece("w_x", 0),
        Piece("w_x", 1, diagonal=False),
        Piece("w_i", 0),
        Piece("w_o", 0 if diagonal_output else 1),
    )
    return Layout((Family("state", n_units, state), Family("input", n_inputs, (Piece("w_i", 1),))))
