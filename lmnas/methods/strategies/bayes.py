"""BayesNAS: architectures by sparse Bayesian learning, after one pass of training (Zhou et al., ICML 2019, 1905.04919).

Every (edge, operation) of the space's relaxation has a scalar switch r, 1 at the start, without a softmax. The supernet
runs the mixture r / (K j), with K operations and j edges into the node, so that all switches at 1 are a mean. `none`
has no switch: its weight is 0, and an edge whose switches are all 0 is what `none` stands for.

    warm-up     weights alone
    then        weights and switches together: the switches by proximal gradient steps on the training loss plus lambda
                times the penalty of their prior (`nn.sparsity.priors`), a lasso at first, reweighted at every update
    an update   curvature H = d2E/dr2 over a few batches, h = H / lambda; variances gamma by majorise-minimise; switches
                that are 0, have gamma <= 1 / (2 pi e) or a dead source are 0 for good from then on

Tables are graphs of their own: a node without a switch into it in the same table is given. Of the paper's recurrent
extension (Li, MSc thesis, TU Delft, 2019) the abstract alone is known; prior, update and curvature through time are
our derivation. Departures from the released code for images: gamma is updated before the penalty's weights are (the
authors' notes and later code have that order), the curvature is an average over batches of the mean loss, variances
start at 1 instead of at random, and the proximal step makes exact zeros, where a gradient step of the penalty leaves a
switch swinging about zero: its curvature is tiny there, so its variance |r| / omega is large, and it would survive.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lmnas.core.contracts import EdgeTable, LearnStep, Mixture, Objective, Proposal, SharingStrategy, Space, relaxed
from lmnas.core.errors import Emptied, UserError
from lmnas.core.genotype import Genotype
from lmnas.core.seeds import generator
from lmnas.nn.sparsity import priors as evidence
from lmnas.nn.sparsity.priors import PRIORS, Convention, Penalty, Prior, Switches

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]

DIGITS = 5
"""Significant digits of numbers in the records."""
MEMORY = 0.95
"""Decay of the mean slope of the loss, from which a smaller lambda is suggested."""


@dataclass
class _Graph:
    """The switches of one table: (E, K) values, K without `none`.

    Attributes:
        columns: where the K operations stand in the table.
        scale: (E, 1), what a switch is multiplied by in the mixture.
        values: r.
        s: (P,) base variances of the prior.
        h: (E K,) curvature by lambda of the last update.
        gamma: variances; of a dead switch the one with which it died.
        alive: bool.
        slope: (E, K) moving average of the loss' gradient by the switches.
    """

    table: EdgeTable
    columns: list[int]
    scale: Tensor
    switches: Switches
    prior: Prior
    values: Tensor
    s: Tensor
    h: Tensor
    gamma: Tensor
    alive: Tensor
    slope: Tensor
    penalty: Penalty

    def rows(self, values: Tensor) -> Tensor:
        """(E K,) as (E, K)."""
        return values.view(self.alive.shape)


class Bayes(SharingStrategy):
    """Proposes the one architecture that survives its sparse prior.

    Settings:
        strength: lambda, nats per prediction. A switch stays where r^2 H exceeds it: lambda / 2 is the loss that may
            be paid for dropping one.
        prior: `dependency` (a switch needs something that leads into its source), `edge-cap` (an edge's variance bounds
            its operations) or `independent`.
        convention: of the prior's objective: `normalised`, or `product` as the authors' code has it.
        groups: which switches share a variance: each its own (`switch`), or all of an edge (`edge`).
        updates: outer iterations, spread evenly over the steps after the warm-up; 1 is the paper's regime.
        warm_up: share of all steps in which only weights are trained.
        iterations: updates of the variances at each outer iteration.
        curvature: how H is found (`lmnas.nn.curvature`), over `curvature_batches` training batches without dropout.
            `sampled` is the nearest to the second derivative for its price (docs/curvature.md), `recursion` the way of
            the papers.
        learning_rate: of the switches. 1 / (learning_rate * strength) steps bring a switch that nothing holds to zero.
        longest_step: how far a gradient moves a switch at once: the first ones may be a thousand times the last.
        threshold: variance at which a switch is pruned; the default has entropy 0.
        ranking: which living switch a node takes where it may have one: of the largest prior variance (`gamma`), or of
            the largest r^2 H, twice the loss that its removal costs to second order (`influence`).
    """

    needs = frozenset({"shared-weights", "mixture"})
    joint = True
    learn_passes = 0

    def __init__(
        self,
        space: Space,
        objective: Objective,
        seed: int,
        *,
        strength: Positive = 0.001,
        prior: Literal["dependency", "edge-cap", "independent"] = "dependency",
        convention: Convention = "normalised",
        groups: Literal["switch", "edge"] = "switch",
        updates: Count = 1,
        warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        iterations: Count = evidence.ITERATIONS,
        curvature: Literal["sampled", "recursion", "gauss-newton", "hutchinson", "exact"] = "sampled",
        curvature_batches: Count = 4,
        learning_rate: Positive = 10.0,
        longest_step: Positive = 0.5,
        threshold: Positive = evidence.THRESHOLD,
        ranking: Literal["gamma", "influence"] = "gamma",
    ):
        self.space = relaxed(space, "strategy 'bayes'")
        if self.space.no_switches is not None:
            raise UserError(f"strategy 'bayes': {self.space.no_switches}")
        self.strength = strength
        self.updates, self.warm_up, self.iterations = updates, warm_up, iterations
        self.curvature, self.curvature_batches = curvature, curvature_batches
        self.threshold = threshold
        self.ranking = ranking
        self.graphs = {table.name: _graph(table, prior, convention, groups) for table in self.space.tables()}
        self.learning_rate, self.longest_step = learning_rate, longest_step
        # the last word between switches that are equal in all else, as they are before the first update
        self.ties = {name: _order(graph, seed) for name, graph in self.graphs.items()}
        self.history: list[dict[str, Any]] = []
        self.proposed = False

    # ------------------------------------------------------------------------------------------------------- learning

    def choice(self, step: int) -> Mixture:
        mixture = {}
        for name, graph in self.graphs.items():
            table = torch.zeros(len(graph.table.edges), len(graph.table.ops))
            table[:, graph.columns] = (graph.values * graph.scale).to(table)
            mixture[name] = table
        return mixture

    def learn(self, step: LearnStep) -> None:
        """One step of the switches, after the warm-up; an update of the prior where one is due."""
        if step.progress > self.warm_up:
            for name, gradient in self._gradients(step).items():
                graph = self.graphs[name]
                slope = gradient[:, graph.columns].double() * graph.scale
                graph.slope = MEMORY * graph.slope + (1 - MEMORY) * slope
                moved = graph.penalty.descend(
                    graph.values.flatten(), slope.flatten(), self.learning_rate, self.strength, self.longest_step
                )
                graph.values = graph.rows(moved) * graph.alive
        due = self.warm_up + (1 - self.warm_up) * (len(self.history) + 1) / self.updates
        if step.progress >= min(due, 1.0) and len(self.history) < self.updates:
            self._update(step)

    def _gradients(self, step: LearnStep) -> Mixture:
        """d loss / d mixture: of the weights' own update where there was one, else of one more pass."""
        if step.train_gradient is not None:
            return {name: gradient.detach().cpu() for name, gradient in step.train_gradient.items()}
        like = next(iter(step.weights.values()))
        mixture = {name: table.to(like).requires_grad_() for name, table in self.choice(step.step).items()}
        weights = {name: weight.detach() for name, weight in step.weights.items()}
        gradients = torch.autograd.grad(step.train_loss(weights, mixture), list(mixture.values()))
        return {name: gradient.cpu() for name, gradient in zip(mixture, gradients, strict=True)}

    def _update(self, step: LearnStep) -> None:
        """Curvature, variances, pruning, and the next interval's penalty.

        Raises:
            Emptied: nothing is left alive.
        """
        if step.curvature is None:
            raise UserError("strategy: it needs an estimator that gives curvature (`LearnStep.curvature`)")
        curvatures = step.curvature(self.choice(step.step), self.curvature, self.curvature_batches)
        note: dict[str, Any] = {"step": step.step, "progress": step.progress, "tables": {}}
        for name, graph in self.graphs.items():
            found = curvatures[name].detach().cpu().double()[:, graph.columns] * graph.scale**2
            w = graph.values.flatten()
            # a negative curvature says that the mixture is not at a minimum; the approximation has no use for it
            h = found.flatten().clamp_min(0.0) / self.strength
            buried = ~graph.alive.flatten()
            fixed = _dead_variances(graph.prior, buried)
            s = torch.where(fixed, torch.full_like(graph.s, evidence.LOWEST), graph.s)
            before = graph.prior.objective(w, h, s)
            graph.s = graph.prior.fit(w, h, s, self.iterations, fixed)
            after = graph.prior.objective(w, h, graph.s)
            gamma = graph.prior.gamma(graph.s)
            graph.gamma = torch.where(graph.alive, graph.rows(gamma), graph.gamma)
            candidates = torch.where(buried | (w == 0), torch.zeros_like(gamma), gamma)
            graph.alive = graph.rows(evidence.survivors(graph.switches, candidates, self.threshold))
            graph.values = graph.values * graph.alive
            graph.h = h
            graph.penalty = graph.prior.penalty(h, graph.s)
            influence = graph.rows(w.square() * h)
            note["tables"][name] = {
                "gamma": _plain(graph.gamma),
                "w2h": _plain(influence),
                "values": _plain(graph.rows(w)),
                "alive": graph.alive.tolist(),
                "objective": [before.item(), after.item()],
            }
        note["alive"] = sum(int(graph.alive.sum()) for graph in self.graphs.values())
        self.history.append(note)
        if not all(graph.alive.any() for graph in self.graphs.values()):
            # a lasso's switches all stay at zero where no slope of the loss exceeds lambda; but slopes fade with the
            # switches, so less than a tenth would be too timid
            steepest = max(graph.slope.abs().max().item() for graph in self.graphs.values())
            suggested = min(self.strength / 2, max(self.strength / 10, 0.9 * steepest))
            raise Emptied(
                f"every switch died at update {len(self.history)}: strategy.strength {self.strength:g} (lambda) is "
                f"more than any is worth here (the loss' largest slope by one is {steepest:.2g}); try {suggested:.2g}"
            )

    # ------------------------------------------------------------------------------------------------------- deriving

    def ask(self, n: int) -> list[Proposal]:
        """The derived architecture, once."""
        if self.proposed or n < 1:
            return []
        self.proposed = True
        return [Proposal(self.derived())]

    def derived(self) -> Genotype:
        """One operation a node: the largest gamma, ties by r^2 h (or, by `ranking`, the other way round).

        A node that died cannot be left out of a cell of fixed size. It takes the switch from a living node at which the
        loss is steepest: the first to come back, were lambda smaller. What still ties, as all do before the first
        update, is decided by lot.
        """
        mixture = {}
        for name, graph in self.graphs.items():
            given = {source for _, source in graph.table.edges} - graph.switches.fed
            live = given | {
                node for (node, _), row in zip(graph.table.edges, graph.alive.tolist(), strict=True) if any(row)
            }
            sound = torch.tensor([[source in live] for _, source in graph.table.edges]).expand_as(graph.alive)
            influence = graph.rows(graph.values.flatten().square() * graph.h)
            ranked = (graph.gamma * graph.alive, influence)
            ranked = ranked if self.ranking == "gamma" else ranked[::-1]
            keys = (graph.alive, sound, *ranked, graph.slope.abs(), self.ties[name])
            order = sorted(range(graph.alive.numel()), key=lambda i, k=keys: [key.flatten()[i].item() for key in k])  # type: ignore[misc]
            # above zero what lives, for spaces that keep all of it
            ranks = torch.empty(len(order))
            ranks[order] = torch.arange(1.0, len(order) + 1) - (~graph.alive).sum()
            table = torch.zeros(len(graph.table.edges), len(graph.table.ops))
            table[:, graph.columns] = graph.rows(ranks)
            mixture[name] = table
        return self.space.derive(mixture)

    def survivors(self) -> dict[str, list[dict[str, Any]]]:
        """All living switches by table, several on an edge allowed: the sparse architecture itself."""
        return {
            name: [
                {
                    "node": graph.table.edges[row][0],
                    "input": graph.table.edges[row][1],
                    "op": graph.table.ops[graph.columns[k]],
                    "value": _plain(graph.values[row, k]),
                    "gamma": _plain(graph.gamma[row, k]),
                }
                for row, k in graph.alive.nonzero().tolist()
            ]
            for name, graph in self.graphs.items()
        }

    # -------------------------------------------------------------------------------------------------------- records

    def statistics(self) -> dict[str, Any]:
        """`lambda`; `alive` of `switches`; `mixture` and `ops` by table; `updates`: what every update found, by table
        `gamma`, `w2h` (r^2 H / lambda), `values`, `alive` as rows of (edge, operation), `objective` before and after;
        `edges` and `operations`: what those rows and columns are; `survivors`."""
        return {
            "lambda": self.strength,
            "threshold": self.threshold,
            "alive": sum(int(graph.alive.sum()) for graph in self.graphs.values()),
            "switches": sum(graph.alive.numel() for graph in self.graphs.values()),
            "mixture": {name: table.tolist() for name, table in self.choice(0).items()},
            "ops": {name: list(graph.table.ops) for name, graph in self.graphs.items()},
            "edges": {name: [list(edge) for edge in graph.table.edges] for name, graph in self.graphs.items()},
            "operations": {
                name: [graph.table.ops[column] for column in graph.columns] for name, graph in self.graphs.items()
            },
            "updates": self.history,
            "survivors": self.survivors(),
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "graphs": {
                name: {
                    "values": graph.values.clone(),
                    "s": graph.s.clone(),
                    "h": graph.h.clone(),
                    "gamma": graph.gamma.clone(),
                    "alive": graph.alive.clone(),
                    "slope": graph.slope.clone(),
                }
                for name, graph in self.graphs.items()
            },
            "history": list(self.history),
            "proposed": self.proposed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, saved in state["graphs"].items():
            graph = self.graphs[name]
            graph.values = saved["values"].clone()
            graph.s, graph.h = saved["s"].clone(), saved["h"].clone()
            graph.gamma, graph.alive = saved["gamma"].clone(), saved["alive"].clone()
            graph.slope = saved["slope"].clone()
            if state["history"]:
                graph.penalty = graph.prior.penalty(graph.h, graph.s)
        self.history = list(state["history"])
        self.proposed = state["proposed"]


def _graph(table: EdgeTable, prior: str, convention: Convention, groups: str) -> _Graph:
    columns = [column for column, op in enumerate(table.ops) if op != "none"]
    incoming = [sum(node == other for other, _ in table.edges) for node, _ in table.edges]
    switches = Switches(
        tuple(edge for edge in table.edges for _ in columns),
        tuple(row if groups == "edge" else (row, k) for row in range(len(table.edges)) for k in columns),
    )
    made = PRIORS[prior](switches, convention)
    shape = (len(table.edges), len(columns))
    s = made.initial()
    return _Graph(
        table=table,
        columns=columns,
        scale=1.0 / (len(columns) * torch.tensor(incoming, dtype=torch.float64)[:, None]),
        switches=switches,
        prior=made,
        values=torch.ones(shape, dtype=torch.float64),
        s=s,
        h=torch.zeros(len(switches.edges), dtype=torch.float64),
        gamma=torch.ones(shape, dtype=torch.float64),
        alive=torch.ones(shape, dtype=torch.bool),
        slope=torch.zeros(shape, dtype=torch.float64),
        penalty=made.first_penalty(),
    )


def _order(graph: _Graph, seed: int) -> Tensor:
    """(E, K) a random order of the switches."""
    order = torch.randperm(graph.alive.numel(), generator=generator(seed, "ties", graph.table.name))
    return graph.rows(order)


def _dead_variances(prior: Prior, buried: Tensor) -> Tensor:
    """(P,) bool: base variances that belong to dead switches alone and have no effect any more."""
    owned = torch.zeros(prior.n_variances, dtype=torch.bool)
    for dead, terms in zip(buried.tolist(), prior.terms, strict=True):
        for i in prior.members[terms[0]]:
            owned[i] |= not dead
    first = torch.zeros(prior.n_variances, dtype=torch.bool)
    first[[i for terms in prior.terms for i in prior.members[terms[0]]]] = True
    return first & ~owned


def _plain(values: Tensor) -> Any:
    """Numbers for the record, to a few digits."""

    def rounded(value: Any) -> Any:
        return [rounded(v) for v in value] if isinstance(value, list) else float(f"{value:.{DIGITS}g}") + 0.0

    return rounded(values.tolist())
