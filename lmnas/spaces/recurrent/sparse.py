"""The recurrent cell with any number of operations on any edge: the architecture of a pruned supernet.

As DARTS' cell (`recurrent_cell`), but a node is the mean over all of its living (predecessor, operation)s, and h_t the
mean over the living nodes:

    s_i = mean over (j, o) in inputs of i of [s_j + sigmoid(c_ij) * (o(a_ij) - s_j)],   [c_ij, a_ij] = (s_j * m_h) W_i

A node lives if it reads a living one; node 0, which reads x and h, always does, and is h_t itself where no other lives.
A dead node has no weights. BayesNAS keeps all surviving operations (Zhou et al., 2019, released cells: up to four on an
edge); that inputs and nodes count alike is our choice.
"""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from lmnas.core.contracts import Body, Choice, Diagram, Masks, Mixture
from lmnas.core.decisions import Decisions, OneOf, Subset
from lmnas.core.genotype import Genotype
from lmnas.nn.kernels import OPS, Operands, edges, first_edge, recurrent_mixture
from lmnas.spaces.recurrent.cell import Cell, CellSupernet, RecurrentCell, activation_name

MOST_SAMPLED = 3
"""Inputs of a node in a sampled cell, at most."""

Inputs = tuple[tuple[tuple[int, str], ...], ...]
"""For node 1, 2, ...: its (predecessor, operation) pairs."""


def inputs_name(node: int) -> str:
    return f"node_{node}.inputs"


class RecurrentSparse(RecurrentCell):
    """Decisions: node 0's activation; then, for each node, which (earlier node, activation) pairs it averages."""

    name = "recurrent-sparse"

    def __init__(
        self,
        *,
        n_nodes: Annotated[int, Field(ge=1, le=64)] = 8,
        activations: Annotated[tuple[str, ...], Field(min_length=1)] = OPS,
        input_activation: str = "tanh",
    ):
        """
        Args:
            n_nodes: nodes after node 0, living or not.
            activations: what an edge may apply.
            input_activation: node 0's activation, or `searched`.
        """
        super().__init__(
            n_nodes=n_nodes,
            activations=activations,
            input_activation=input_activation,
            batch_norm="none",
            none=False,
        )
        first = self.activations if input_activation == "searched" else (input_activation,)
        self.decisions = Decisions(
            [
                OneOf(activation_name(0), first, node=0),
                *(Subset(inputs_name(i), self._options(i), node=i) for i in range(1, n_nodes + 1)),
            ]
        )

    def _options(self, node: int) -> tuple[str, ...]:
        return tuple(f"{j}:{op}" for j in range(node) for op in self.activations)

    @classmethod
    def covering(cls, genotype: Genotype) -> "RecurrentSparse":
        n_nodes = sum(name.endswith(".inputs") for name in genotype.choices)
        return cls(n_nodes=max(n_nodes, 1), input_activation="searched")

    def sample(self, rng: Any) -> Genotype:
        """Every node reads one to three pairs, as many as each other number."""
        choices: dict[str, Any] = {activation_name(0): self.decisions.sample(rng)[activation_name(0)]}
        for i in range(1, self.n_nodes + 1):
            options = self._options(i)
            taken = set(rng.sample(options, min(rng.randint(1, MOST_SAMPLED), len(options))))
            choices[inputs_name(i)] = [option for option in options if option in taken]
        return Genotype(self.name, choices)

    def inputs(self, genotype: Genotype) -> Inputs:
        """Inputs of every node that lives; none of a dead one, and none that is dead."""
        living, found = {0}, []
        for i in range(1, self.n_nodes + 1):
            pairs = [option.split(":") for option in genotype.choices[inputs_name(i)]]
            taken = tuple((int(j), op) for j, op in pairs if int(j) in living)
            living |= {i} if taken else set()
            found.append(taken)
        return tuple(found)

    def build(self, genotype: Genotype, width: int) -> "SparseCell":
        self.check(genotype)
        return SparseCell(genotype.choices[activation_name(0)], self.inputs(genotype), width)

    def supernet(self, width: int) -> "SparseSupernet":
        return SparseSupernet(self, width)

    def derive(self, mixture: Mixture) -> Genotype:
        """Every operation of a weight above zero; a strategy that does not prune keeps them all."""
        first = self.input_activation
        if first == "searched":
            first = self.activations[int(mixture["input"][0].argmax())]
        choices: dict[str, Any] = {activation_name(0): first}
        for i in range(1, self.n_nodes + 1):
            kept = (mixture["nodes"][first_edge(i) : first_edge(i + 1)] > 0).flatten().tolist()
            choices[inputs_name(i)] = [option for option, keep in zip(self._options(i), kept, strict=True) if keep]
        swept = self.inputs(Genotype(self.name, choices))
        for i, taken in enumerate(swept, start=1):
            choices[inputs_name(i)] = [f"{j}:{op}" for j, op in taken]
        return Genotype(self.name, choices)

    def diagram(self, genotype: Genotype) -> Diagram:
        inputs = self.inputs(genotype)
        nodes = [("x", "x[t]", "input"), ("h", "h[t-1]", "input")]
        nodes.append(("0", f"0: {genotype.choices[activation_name(0)]}", "op"))
        links = [("x", "0", ""), ("h", "0", "")]
        for i, taken in enumerate(inputs, start=1):
            if taken:
                nodes.append((str(i), f"{i}: mean", "op"))
            for j in dict.fromkeys(j for j, _ in taken):
                links.append((str(j), str(i), ", ".join(op for source, op in taken if source == j)))
        nodes.append(("out", "h[t]", "output"))
        living = [i for i, taken in enumerate(inputs, start=1) if taken] or [0]
        links += [(str(i), "out", "") for i in living]
        return Diagram(f"{self.name}, mean of living nodes", tuple(nodes), tuple(links))


def _encode(first: str, inputs: Inputs, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(K,) p_input, (E, K) p_edges and (N + 1,) output_weights of the N living nodes, numbered anew."""
    living = [0, *(i for i, taken in enumerate(inputs, start=1) if taken)]
    rows = {edge: row for row, edge in enumerate(edges(len(living) - 1))}
    p_edges = like.new_zeros(len(rows), len(OPS))
    for new, node in enumerate(living[1:], start=1):
        taken = inputs[node - 1]
        for j, op in taken:
            p_edges[rows[new, living.index(j)], OPS.index(op)] = 1.0 / len(taken)
    output_weights = like.new_full((len(living),), 1.0 / max(1, len(living) - 1))
    output_weights[0] = float(len(living) == 1)
    return like.new_tensor([float(op == first) for op in OPS]), p_edges, output_weights


class SparseCell(Body):
    """A stand-alone sparse cell: (T, B, H) -> (T, B, H), weights of living nodes only."""

    def __init__(self, first: str, inputs: Inputs, width: int):
        super().__init__(width)
        self.first, self.inputs = first, inputs
        self.w_input = nn.Parameter(torch.empty(2 * width, 2 * width))
        self.w_nodes = nn.ParameterList(torch.empty(width, 2 * width) for taken in inputs if taken)

    initialise = Cell.initialise
    initial_state = Cell.initial_state
    draw_masks = Cell.draw_masks

    def forward(self, inputs: Tensor, state: Tensor, masks: Masks, choice: Choice = None) -> Any:
        """`choice` is ignored: a stand-alone cell can do one thing."""
        x = Operands(inputs, state, self.w_input, list(self.w_nodes), masks.get("x"), masks.get("hidden"))
        hs = recurrent_mixture(x, *_encode(self.first, self.inputs, self.w_input))
        return hs, hs[-1]


class SparseSupernet(CellSupernet):
    """The weights of every sparse cell; a path takes those of its living nodes."""

    space: RecurrentSparse

    def _rows(self, genotype: Genotype) -> list[int]:
        return [row for row, taken in enumerate(self.space.inputs(genotype)) if taken]

    def forward(self, inputs: Tensor, state: Tensor, masks: Any, choice: Choice = None) -> Any:
        if not isinstance(choice, Genotype):
            return super().forward(inputs, state, masks, choice)
        first = choice.choices[activation_name(0)]
        weights = [self.w_nodes[row] for row in self._rows(choice)]
        x = Operands(inputs, state, self.w_input, weights, masks.get("x"), masks.get("hidden"))
        hs = recurrent_mixture(x, *_encode(first, self.space.inputs(choice), self.w_input))
        return hs, hs[-1]

    def inherit(self, genotype: Genotype) -> dict[str, Tensor]:
        """State of a stand-alone cell: copies of the weights on path `genotype`."""
        weights = {f"w_nodes.{i}": self.w_nodes[row].detach().clone() for i, row in enumerate(self._rows(genotype))}
        return {"w_input": self.w_input.detach().clone(), **weights}
