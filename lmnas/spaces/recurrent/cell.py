"""The recurrent cell of ENAS and DARTS as one space.

Settings choose the variant: DARTS (8 nodes after a fixed tanh node 0, mean of all nodes, one weight per node shared by
its predecessors; Liu et al., 2019, arXiv 1806.09055) or ENAS (11 nodes after a node 0 with a chosen activation, mean of
the loose ends, one weight pair per (node, predecessor); Pham et al., 2018, arXiv 1802.03268, section 2).

The authors' search code of ENAS (https://github.com/melodyguan/enas) has a weight pair per (node, predecessor,
activation); here, as in the paper, activations share it.

Departures: batch norm uses batch statistics always (the DARTS paper; its code mixes running averages of all nodes). In
a mixture, `loose-ends` is relaxed: a node counts by the probability that nobody reads it, which is exact for one-hot
weights. Neither paper runs a mixture over loose ends.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lmnas.core.contracts import Body, Choice, Diagram, EdgeTable, Masks, Mixture, Relaxed
from lmnas.core.decisions import Decisions, OneOf
from lmnas.core.errors import UserError, nearest
from lmnas.core.genotype import Genotype
from lmnas.nn.curvature import RecurrentSupernet
from lmnas.nn.kernels import (
    OPS,
    BatchNorm,
    Operands,
    Program,
    edges,
    first_edge,
    recurrent_mixture,
    recurrent_path,
)
from lmnas.nn.ops.dropout import draw_mask
from lmnas.spaces.recurrent import RECURRENT

Output = Literal["all-nodes", "loose-ends"]


def input_name(node: int) -> str:
    return f"node_{node}.input"


def activation_name(node: int) -> str:
    return f"node_{node}.activation"


class RecurrentCell(Relaxed):
    """Decisions: node 0's activation; then, for each node, which earlier node it reads and its activation."""

    name = "recurrent-cell"
    makes = RECURRENT
    kernels = frozenset({"fused", "segment"})
    noun = "cell"

    def __init__(
        self,
        *,
        n_nodes: Annotated[int, Field(ge=1, le=64)] = 8,
        activations: Annotated[tuple[str, ...], Field(min_length=1)] = OPS,
        input_activation: str = "tanh",
        output: Output = "all-nodes",
        sharing: Literal["node", "edge"] = "node",
        batch_norm: BatchNorm = "nodes",
        none: bool = True,
    ):
        """
        Args:
            n_nodes: nodes after node 0 (DARTS: 8; ENAS' N = 12 counts node 0, so 11).
            activations: what a node may apply.
            input_activation: node 0's activation, or `searched` (ENAS).
            output: which nodes' mean is h_t.
            sharing: supernet weights, one per `node` (DARTS) or one per `edge` (ENAS).
            batch_norm: of the supernet only; a stand-alone cell has none.
            none: offer the zero operation in a mixture (DARTS).
        """
        for activation in (*activations, *(() if input_activation == "searched" else (input_activation,))):
            if activation not in OPS:
                raise UserError(f"space: activation {activation!r} is unknown. " + nearest(activation, OPS))
        if len(set(activations)) != len(activations):
            raise UserError(f"space.activations: each may stand once, got {', '.join(activations)}")
        self.n_nodes = n_nodes
        self.activations = tuple(activations)
        self.input_activation = input_activation
        self.output: Output = output
        self.sharing = sharing
        self.batch_norm: BatchNorm = batch_norm
        self.batch_normed = batch_norm != "none"
        self.none = none
        first = self.activations if input_activation == "searched" else (input_activation,)
        self.decisions = Decisions(
            [
                OneOf(activation_name(0), first, node=0),
                *(
                    decision
                    for i in range(1, n_nodes + 1)
                    for decision in (
                        OneOf(input_name(i), tuple(range(i)), node=i, reads_node=True),
                        OneOf(activation_name(i), self.activations, node=i),
                    )
                ),
                OneOf("output", (output,)),
            ]
        )

    @classmethod
    def covering(cls, genotype: Genotype) -> "RecurrentCell":
        """The widest space of this kind that may hold `genotype`, to build or draw a cell found elsewhere."""
        n_nodes = sum(name.endswith(".input") for name in genotype.choices)
        output = genotype.choices.get("output", "all-nodes")
        if output not in ("all-nodes", "loose-ends"):
            raise UserError(f"genotype {genotype.id}: output: {output!r} is not one of all-nodes, loose-ends")
        return cls(n_nodes=max(n_nodes, 1), input_activation="searched", output=output)

    @property
    def no_switches(self) -> str | None:
        if self.batch_norm != "none":
            return (
                f"space.batch_norm {self.batch_norm!r}: expected 'none', as a norm after a node undoes any scale of "
                f"the switches into it, and their penalty would shrink them at no cost"
            )
        if self.output != "all-nodes":
            return (
                f"space.output {self.output!r}: expected 'all-nodes', as the relaxation of other outputs takes weights "
                f"for probabilities, and switches are none"
            )
        return None

    def program(self, genotype: Genotype) -> Program:
        """The encoded path."""
        choices = genotype.choices
        inputs = tuple(choices[input_name(i)] for i in range(1, self.n_nodes + 1))
        ops = tuple(OPS.index(choices[activation_name(i)]) for i in range(self.n_nodes + 1))
        if self.output == "all-nodes":
            outputs = tuple(range(1, self.n_nodes + 1))
        else:
            outputs = tuple(i for i in range(self.n_nodes + 1) if i not in inputs)
        return Program(ops, inputs, outputs)

    def build(self, genotype: Genotype, width: int) -> Body:
        """The stand-alone cell, without batch norm."""
        self.check(genotype)
        return Cell(self.program(genotype), width)

    def supernet(self, width: int) -> "CellSupernet":
        return CellSupernet(self, width)

    def tables(self) -> tuple[EdgeTable, ...]:
        nodes = EdgeTable("nodes", tuple(edges(self.n_nodes)), (*(("none",) if self.none else ()), *self.activations))
        if self.input_activation != "searched":
            return (nodes,)
        return (EdgeTable("input", ((0, -1),), self.activations), nodes)

    def derive(self, mixture: Mixture) -> Genotype:
        """Per node the (predecessor, operation) with the largest weight, `none` left out (DARTS section 2.4, k = 1).

        `none` is dropped because every node needs its one edge; ties go to the earlier row and operation.
        """
        n_none = int(self.none)
        first = self.input_activation
        if first == "searched":
            first = self.activations[int(mixture["input"][0].argmax())]
        choices: dict[str, Any] = {activation_name(0): first}
        for i in range(1, self.n_nodes + 1):
            weights = mixture["nodes"][first_edge(i) : first_edge(i + 1), n_none:]
            source, op = divmod(int(weights.argmax()), len(self.activations))
            choices[input_name(i)] = source
            choices[activation_name(i)] = self.activations[op]
        return Genotype(self.name, {**choices, "output": self.output})

    def diagram(self, genotype: Genotype) -> Diagram:
        program = self.program(genotype)
        nodes = [("x", "x[t]", "input"), ("h", "h[t-1]", "input")]
        links = [("x", "0", ""), ("h", "0", "")]
        for i, op in enumerate(program.ops):
            nodes.append((str(i), f"{i}: {OPS[op]}", "op"))
            if i > 0:
                links.append((str(program.inputs[i - 1]), str(i), ""))
        nodes.append(("out", "h[t]", "output"))
        links += [(str(i), "out", "") for i in program.outputs]
        return Diagram(f"{self.name}, mean of {self.output.replace('-', ' ')}", tuple(nodes), tuple(links))


def _draw_masks(body: nn.Module, width: int, batch_size: int, rates: Mapping[str, float], generator: torch.Generator):
    """Variational dropout (Gal & Ghahramani, 2016): one (B, H) mask a segment for x, one for h and all nodes."""
    like = next(body.parameters())
    return {
        name: draw_mask((batch_size, width), rates[name], generator, like)
        for name in ("x", "hidden")
        if rates.get(name, 0.0) > 0
    }


class Cell(Body):
    """A stand-alone recurrent cell: (T, B, H) -> (T, B, H), no biases, initial h = 0."""

    def __init__(self, program: Program, width: int, batch_norm: BatchNorm = "none"):
        super().__init__(width)
        self.program = program
        self.batch_norm: BatchNorm = batch_norm
        self.batch_normed = batch_norm != "none"
        self.w_input = nn.Parameter(torch.empty(2 * width, 2 * width))
        self.w_nodes = nn.ParameterList(torch.empty(width, 2 * width) for _ in program.inputs)

    def initialise(self, generator: torch.Generator, init_range: float) -> None:
        """Uniform in ±init_range (DARTS and ENAS: 0.04; ENAS search: 0.025)."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -init_range, init_range, generator=generator)

    def initial_state(self, batch_size: int) -> Tensor:
        return self.w_input.new_zeros(batch_size, self.width)

    def draw_masks(self, batch_size: int, rates: Mapping[str, float], generator: torch.Generator) -> Masks:
        return _draw_masks(self, self.width, batch_size, rates, generator)

    def forward(self, inputs: Tensor, state: Tensor, masks: Masks, choice: Choice = None) -> tuple[Tensor, Tensor]:
        """`choice` is ignored: a stand-alone cell can do one thing."""
        weights = self.w_input, list(self.w_nodes)
        x = Operands(inputs, state, *weights, masks.get("x"), masks.get("hidden"), self.batch_norm)
        hs = recurrent_path(x, self.program)
        return hs, hs[-1]


class CellSupernet(RecurrentSupernet):
    """The weights of every cell of a space; runs one path (a Genotype) or a mixture (table name -> weights)."""

    def __init__(self, space: RecurrentCell, width: int):
        super().__init__(width)
        self.space = space
        self.batch_norm, self.batch_normed, self.output = space.batch_norm, space.batch_norm != "none", space.output
        n_weights = space.n_nodes if space.sharing == "node" else first_edge(space.n_nodes + 1)
        self.w_input = nn.Parameter(torch.empty(2 * width, 2 * width))
        self.w_nodes = nn.ParameterList(torch.empty(width, 2 * width) for _ in range(n_weights))

    initialise = Cell.initialise
    initial_state = Cell.initial_state
    draw_masks = Cell.draw_masks

    def _path_rows(self, program: Program) -> list[int]:
        """Indices of the weights that the path uses into nodes 1..N."""
        if self.space.sharing == "node":
            return list(range(self.space.n_nodes))
        return [first_edge(i) + source for i, source in enumerate(program.inputs, start=1)]

    def forward(self, inputs: Tensor, state: Tensor, masks: Masks, choice: Choice = None) -> tuple[Tensor, Tensor]:
        dropped = masks.get("x"), masks.get("hidden"), self.space.batch_norm
        if isinstance(choice, Genotype):
            program = self.space.program(choice)
            weights = [self.w_nodes[row] for row in self._path_rows(program)]
            hs = recurrent_path(Operands(inputs, state, self.w_input, weights, *dropped), program, sampled=True)
        elif choice is not None:
            x = Operands(inputs, state, self.w_input, list(self.w_nodes), *dropped)
            hs = recurrent_mixture(x, *self.encode(choice))
        else:
            raise ValueError("a supernet needs a choice: a genotype or a mixture")
        return hs, hs[-1]

    def tables(self) -> tuple[EdgeTable, ...]:
        return self.space.tables()

    def encode(self, mixture: Mixture) -> tuple[Tensor, Tensor, Tensor]:
        """Weights by operation code, as the kernels take them: p_input (K,), p_edges (E, K), output_weights (N+1,)."""
        space = self.space
        table = mixture["nodes"]
        columns = [int(space.none) + space.activations.index(op) if op in space.activations else None for op in OPS]
        zero = table.new_zeros(table.shape[0])
        p_edges = torch.stack([zero if column is None else table[:, column] for column in columns], dim=1)
        if space.input_activation == "searched":
            given = mixture["input"][0]
            p_input = torch.stack(
                [given[space.activations.index(op)] if op in space.activations else given.new_zeros(()) for op in OPS]
            )
        else:
            p_input = table.new_tensor([float(op == space.input_activation) for op in OPS])
        if space.output == "all-nodes":
            output_weights = table.new_full((space.n_nodes + 1,), 1.0 / space.n_nodes)
            output_weights[0] = 0.0
        else:
            output_weights = _loose_ends(p_edges.sum(1), space.n_nodes)
        return p_input, p_edges, output_weights

    def inherit(self, genotype: Genotype) -> dict[str, Tensor]:
        """State of a stand-alone cell: copies of the weights on path `genotype`."""
        rows = self._path_rows(self.space.program(genotype))
        weights = {f"w_nodes.{i}": self.w_nodes[row].detach().clone() for i, row in enumerate(rows)}
        return {"w_input": self.w_input.detach().clone(), **weights}


def _loose_ends(mass: Tensor, n_nodes: int) -> Tensor:
    """(N + 1,) share of each node in h_t: the probability that no later node reads it, normalised.

    A node reads its predecessors with probability proportional to the (E,) `mass` of the edges; one-hot masses give the
    mean over loose ends exactly.
    """
    loose = [mass.new_ones(()) for _ in range(n_nodes + 1)]
    for i in range(1, n_nodes + 1):
        row = mass[first_edge(i) : first_edge(i + 1)]
        reads = row / row.sum().clamp_min(torch.finfo(row.dtype).tiny)
        for j in range(i):
            loose[j] = loose[j] * (1.0 - reads[j])
    shares = torch.stack(loose)
    return shares / shares.sum()
