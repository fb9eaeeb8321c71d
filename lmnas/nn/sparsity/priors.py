"""Sparse Bayesian learning of scalar switches: priors, evidence, and the updates that never raise it.

A switch w_e has a zero-mean normal prior whose variance gamma_e is itself learned (automatic relevance determination,
MacKay 1995; Tipping 2001). With the likelihood exp(-E / lambda) and a Laplace approximation of diagonal curvature
H_e = d2E/dw_e2, h_e = H_e / lambda, type-II maximum likelihood is

    min over w, s    2 E(w) / lambda + sum_e w_e^2 / gamma_e + sum_e log(1 + gamma_e h_e)

with the posterior variance C_e = 1 / (1 / gamma_e + h_e).

BayesNAS (Zhou, Yang, Wang, Pan, ICML 2019, arXiv 1905.04919) uses it to prune architectures: several priors on one
switch multiply, so their precisions add,

    1 / gamma_e = sum over the terms t of e of 1 / V_t,        V_t = sum over the base variances s_i in t

and the base variances s are what is learned. `Prior` states terms and members; the recurrent cell's dependency prior is
one of them. The updates are majorise-minimise (Jensen for 1 / V_t, a tangent for the concave log term), with the base
variances separable:

    d_t = sum over e of the slope of the log term by V_t,     kappa_i = sum over t with i in t of d_t
    theta_ti = s_i / V_t,     q_i = sum over t with i in t of theta_ti^2 sum over e of w_e^2
    s_i <- sqrt(q_i / kappa_i)

and the training cost for fixed kappa and theta is lambda * sum_i sqrt(kappa_i q_i(w)): an overlapping group lasso.

Shapes: E switches, C terms of a switch at most, T terms, P base variances. float64 throughout.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

LOWEST, HIGHEST = 1e-10, 1e10
"""Clamp of every variance."""
THRESHOLD = 1 / (2 * math.pi * math.e)
"""0.05855: a normal prior of this variance has entropy 0; below it a switch is pruned."""
ITERATIONS = 50
"""Updates of the variances at fixed w and h; 50 reach the limit to about 1e-7 where there is one."""

Convention = Literal["normalised", "product"]


# ------------------------------------------------------------------------------------------------------ the formulas


def slope(gamma: Tensor, h: Tensor) -> Tensor:
    """alpha = d log(1 + gamma h) / d gamma = h / (1 + gamma h).

    Equal to 1 / gamma - C / gamma^2, which the authors' code has and which cancels: in float32, gamma = 1e-6 and h = 2
    give 2.0625 there, 1.999996 here.
    """
    return h / (1 + gamma * h)


def posterior(gamma: Tensor, h: Tensor) -> Tensor:
    """C = 1 / (1 / gamma + h), the posterior variance."""
    return gamma / (1 + gamma * h)


def omega(gamma: Tensor, h: Tensor, dim: int | None = None) -> Tensor:
    """Penalty weight sqrt(sum of |alpha|) of one group that shares gamma, the sum over `dim`; None: every switch alone.

    The cost of a group is lambda * omega * |w|, and its next variance |w| / omega.
    """
    alpha = slope(gamma, h).abs()
    return (alpha if dim is None else alpha.sum(dim)).sqrt()


# ------------------------------------------------------------------------------------------------------------ priors


@dataclass(frozen=True)
class Prior:
    """Assignment of variances to the switches that they bound.

    Attributes:
        terms: for every switch the terms whose precisions add up to its own.
        members: for every term the base variances that it sums.
        convention: `normalised` is the objective above; `product` leaves the product of the priors un-normalised, as
            the authors' code does: sum_t log V_t over a switch's terms replaces log gamma_e.
    """

    terms: tuple[tuple[int, ...], ...]
    members: tuple[tuple[int, ...], ...]
    convention: Convention = "normalised"

    @property
    def n_variances(self) -> int:
        return 1 + max(i for members in self.members for i in members)

    @cached_property
    def _terms(self) -> Tensor:
        """(E, C) indices, padded with T: a term of infinite variance."""
        width = max(len(terms) for terms in self.terms)
        return torch.tensor([[*terms, *[len(self.members)] * (width - len(terms))] for terms in self.terms])

    @cached_property
    def _members(self) -> Tensor:
        """(T, P) of 0 and 1."""
        matrix = torch.zeros(len(self.members), self.n_variances, dtype=torch.float64)
        for t, members in enumerate(self.members):
            matrix[t, list(members)] = 1.0
        return matrix

    def initial(self) -> Tensor:
        """(P,) base variances before any update: 1."""
        return torch.ones(self.n_variances, dtype=torch.float64)

    def variances(self, s: Tensor) -> Tensor:
        """(T,) V_t."""
        return self._members @ s

    def gamma(self, s: Tensor) -> Tensor:
        """(E,) effective variances, in their clamp."""
        return self._gamma(self.variances(s)).clamp(LOWEST, HIGHEST)

    def _per_switch(self, v: Tensor) -> Tensor:
        """(E, C) variances of each switch's terms."""
        return torch.cat([v, v.new_full((1,), math.inf)])[self._terms]

    def _gamma(self, v: Tensor) -> Tensor:
        return 1 / (1 / self._per_switch(v)).sum(1)

    def _sum_by_term(self, values: Tensor) -> Tensor:
        """(T,) sums of (E, C) values by the term that they belong to."""
        total = values.new_zeros(len(self.members) + 1)
        return total.index_add(0, self._terms.flatten(), values.flatten())[:-1]

    def objective(self, w: Tensor, h: Tensor, s: Tensor) -> Tensor:
        """Objective that the updates lower at fixed w: w^2 / gamma plus the log terms, summed over switches; a scalar.

        Args:
            w, h: (E,) switches and H / lambda, h not negative.
            s: (P,).
        """
        v = self.variances(s)
        gamma = self._gamma(v)
        if self.convention == "normalised":
            return (w.square() / gamma + torch.log1p(gamma * h)).sum()
        each = self._per_switch(v)
        logs = torch.where(each.isinf(), torch.ones_like(each), each).log().sum(1)
        return (w.square() / gamma + logs - posterior(gamma, h).log()).sum()

    def slopes(self, h: Tensor, s: Tensor) -> Tensor:
        """(T,) derivatives of the log terms by each V_t, in forms that do not cancel.

        For a switch e with the term t: (gamma / V_t)^2 h / (1 + gamma h), which is (gamma - C) / V_t^2; in the product
        convention (V_t - C) / V_t^2 = C / V_t (h + the precisions of e's other terms).
        """
        v = self.variances(s)
        gamma, each = self._gamma(v), self._per_switch(v)
        if self.convention == "normalised":
            return self._sum_by_term((gamma[:, None] / each).square() * slope(gamma, h)[:, None])
        precisions = 1 / each
        others = precisions @ (1 - torch.eye(each.shape[1], dtype=each.dtype))
        return self._sum_by_term(posterior(gamma, h)[:, None] * precisions * (h[:, None] + others))

    def penalty(self, h: Tensor, s: Tensor) -> "Penalty":
        """Training cost of this prior, frozen at `s` (P,) and `h` (E,)."""
        shares = self._members * (s / self.variances(s)[:, None]).square()
        rows = torch.cat([shares, shares.new_zeros(1, shares.shape[1])])
        return Penalty(self._members.t() @ self.slopes(h, s), rows[self._terms].sum(1))

    def first_penalty(self) -> "Penalty":
        """The cost before any update, all weights 1: the lasso sum_e |w_e|, or the norms of groups that are shared."""
        own = torch.tensor([self.members[terms[0]][0] for terms in self.terms])
        shares = torch.nn.functional.one_hot(own, self.n_variances).double()
        return Penalty(shares.any(0).double(), shares)

    def update(self, w: Tensor, h: Tensor, s: Tensor) -> Tensor:
        """(P,) base variances after one majorise-minimise step at fixed w and h; the objective does not rise.

        A variance that no switch bounds from either side (w and h both zero) stays.
        """
        penalty = self.penalty(h, s)
        q, kappa = penalty.squares(w), penalty.kappa
        updated = torch.where((q == 0) & (kappa == 0), s.square(), q / kappa).sqrt()
        return updated.clamp(LOWEST, HIGHEST)

    def fit(self, w: Tensor, h: Tensor, s: Tensor, iterations: int = ITERATIONS, fixed: Tensor | None = None) -> Tensor:
        """(P,) variances after `iterations` of `update`; those that are `fixed`, (P,) bool, stay as they are."""
        for _ in range(iterations):
            updated = self.update(w, h, s)
            s = updated if fixed is None else torch.where(fixed, s, updated)
        return s


@dataclass(frozen=True)
class Penalty:
    """sum_i sqrt(kappa_i q_i(w)), q_i = sum_e a_ei w_e^2: an overlapping group lasso with weights and shares frozen.

    Attributes:
        kappa: (P,) weight of each group, squared.
        shares: (E, P) a, how much of each switch a group holds.
    """

    kappa: Tensor
    shares: Tensor

    def squares(self, w: Tensor) -> Tensor:
        """(P,) q_i(w)."""
        return self.shares.t() @ w.square()

    def __call__(self, w: Tensor) -> Tensor:
        """The cost, a scalar."""
        return (self.kappa * self.squares(w)).sqrt().sum()

    def slopes(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Slopes that drive a switch to zero, as (smooth, kink), (E,) each.

        A group in which a switch stands alone, all others being zero, is sqrt(kappa a) |w_e| to it: `kink` sums these
        factors, for a soft threshold. `smooth` is the gradient of all other groups.
        """
        held, moves = self.shares > 0, (w != 0)[:, None]
        others = (held & moves).sum(0) - (held & moves).int()
        alone = held & (others == 0)
        q = self.squares(w)
        weights = self.kappa.sqrt() / torch.where(q > 0, q, torch.ones_like(q)).sqrt()
        smooth = ((self.shares * ~alone) @ weights) * w
        return smooth, ((self.kappa * self.shares).sqrt() * alone).sum(1)

    def descend(
        self, w: Tensor, gradient: Tensor, rate: float, strength: float, longest: float | None = None
    ) -> Tensor:
        """(E,) switches after one proximal step on loss + strength * cost, `gradient` being that of the loss.

        `longest` bounds how far the gradient moves a switch.

        Exact zeros come from it. For a lasso it is the iterative soft threshold (Daubechies et al., 2004); where groups
        overlap, each switch's threshold is taken with the others held.
        """
        smooth, kink = self.slopes(w)
        step = rate * (gradient + strength * smooth)
        moved = w - (step if longest is None else step.clamp(-longest, longest))
        return moved.sign() * (moved.abs() - rate * strength * kink).clamp_min(0)


@dataclass(frozen=True)
class Switches:
    """Positions of the switches of one graph: `edges` as (node, predecessor), one entry per switch.

    A predecessor that no switch leads into is given (the cell's input) and never dies.
    """

    edges: tuple[tuple[int, int], ...]
    groups: tuple[Hashable, ...]
    """Switches of one group share a base variance."""

    @cached_property
    def fed(self) -> frozenset[int]:
        """Nodes that live by their switches."""
        return frozenset(node for node, _ in self.edges)

    def bases(self) -> tuple[int, ...]:
        """(E,) index of each switch's base variance, groups numbered as they first appear."""
        numbers = {group: i for i, group in enumerate(dict.fromkeys(self.groups))}
        return tuple(numbers[group] for group in self.groups)


def independent(switches: Switches, convention: Convention = "normalised") -> Prior:
    """Every group its own variance: 1 / gamma_e = 1 / s_e."""
    bases = switches.bases()
    return Prior(tuple((b,) for b in bases), tuple((b,) for b in range(max(bases) + 1)), convention)


def edge_cap(switches: Switches, convention: Convention = "normalised") -> Prior:
    """An edge has a variance too, which caps those of its operations: 1 / gamma_e = 1 / s_e + 1 / s_edge.

    Once the edge's goes to zero all of its operations die, which is how `none` wins.
    """
    bases = switches.bases()
    first = max(bases) + 1
    edges = {edge: first + i for i, edge in enumerate(dict.fromkeys(switches.edges))}
    terms = tuple((b, edges[edge]) for b, edge in zip(bases, switches.edges, strict=True))
    return Prior(terms, tuple((i,) for i in range(first + len(edges))), convention)


def dependency(switches: Switches, convention: Convention = "normalised") -> Prior:
    """A switch out of node j matters as far as something leads into j: 1 / gamma_e = 1 / s_e + 1 / S_j, where S_j sums
    the variances of the groups into j. Given nodes have S_j infinite."""
    bases = switches.bases()
    incoming: dict[int, list[int]] = {}
    for (node, _), base in zip(switches.edges, bases, strict=True):
        if base not in incoming.setdefault(node, []):
            incoming[node].append(base)
    sources = [source for source in dict.fromkeys(source for _, source in switches.edges) if source in incoming]
    first = max(bases) + 1
    numbers = {source: first + i for i, source in enumerate(sources)}
    terms = tuple(
        (base, numbers[source]) if source in numbers else (base,)
        for (_, source), base in zip(switches.edges, bases, strict=True)
    )
    members = (*((b,) for b in range(first)), *(tuple(incoming[source]) for source in sources))
    return Prior(terms, members, convention)


PRIORS: dict[str, Callable[[Switches, Convention], Prior]] = {
    "independent": independent,
    "edge-cap": edge_cap,
    "dependency": dependency,
}


# ----------------------------------------------------------------------------------------------------------- pruning


def sweep(switches: Switches, kept: Sequence[bool]) -> list[bool]:
    """`kept` without what hangs from a dead node: from the first node on, one without a living switch into it is dead,
    and so are all switches out of it."""
    kept = list(kept)
    for node in sorted(switches.fed):
        if not any(keep for keep, (into, _) in zip(kept, switches.edges, strict=True) if into == node):
            kept = [keep and source != node for keep, (_, source) in zip(kept, switches.edges, strict=True)]
    return kept


def survivors(switches: Switches, gamma: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """(E,) bool: switches whose prior variance is above the threshold and whose source lives."""
    return torch.tensor(sweep(switches, (gamma > threshold).tolist()))
