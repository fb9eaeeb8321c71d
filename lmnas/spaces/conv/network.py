"""Networks of convolutional cells, of the spaces `darts-conv` and `enas-micro`.

    images -> stem (3x3 convolution, batch norm) -> cells -> mean over pixels

A cell reads the outputs of the two before it (its nodes 0 and 1, after a 1x1 convolution each); every further node is
the sum of two operations on earlier nodes; chosen nodes' channels are concatenated. A reduction cell doubles the
channels, and its operations on nodes 0 and 1 have stride 2. The stand-alone network and the supernet share all code but
the choice of operations: `Network` runs one program, `SupernetNetwork` holds every operation of every edge.

Where a genotype decides which nodes are concatenated (loose ends), the supernet's 1x1 convolutions have weights for all
nodes and a path takes part with the slices of those concatenated: the 1x1 convolution with per-node weights of ENAS.

Shapes: B batch, C channels of a cell, S pixels along a side, E edges of a table, K its operations.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmnas.core.contracts import Body, Choice, ImageBody, Masks, Supernet
from lmnas.core.errors import UserError
from lmnas.core.genotype import Genotype
from lmnas.nn.ops.conv import (
    AvgPool,
    ConvNorm,
    DepthwiseSeparable,
    FactorizedReduction,
    MaxPool,
    Norm,
    SeparableConv,
    initialise,
)
from lmnas.nn.ops.dropout import draw_mask

OPERATIONS: dict[str, Callable[[int, int, Norm, Norm | None], nn.Module]] = {
    "max_pool_3x3": lambda c, stride, norm, pool_norm: MaxPool(c, stride, pool_norm),
    "avg_pool_3x3": lambda c, stride, norm, pool_norm: AvgPool(c, stride, pool_norm),
    "skip_connect": lambda c, stride, norm, _: FactorizedReduction(c, c, norm) if stride > 1 else nn.Identity(),
    "sep_conv_3x3": lambda c, stride, norm, _: SeparableConv(c, c, 3, norm, stride),
    "sep_conv_5x5": lambda c, stride, norm, _: SeparableConv(c, c, 5, norm, stride),
    "dil_conv_3x3": lambda c, stride, norm, _: DepthwiseSeparable(c, c, 3, norm, stride, dilation=2),
    "dil_conv_5x5": lambda c, stride, norm, _: DepthwiseSeparable(c, c, 5, norm, stride, dilation=2),
    "identity": lambda c, stride, norm, _: FactorizedReduction(c, c, norm, relu=False) if stride > 1 else nn.Identity(),
}
"""Name -> (channels, stride, norm, norm after a pool) -> module. ENAS' `identity` differs from DARTS' `skip_connect` in
having no ReLU where it reduces."""

KINDS = ("normal", "reduce")
NORMS_UNDO = "the batch norms of convolutional cells undo any scale of the switches into a node"


@dataclass(frozen=True)
class CellProgram:
    """A cell to be run: per node 2, 3, ... its two (earlier node, operation), and the nodes that are concatenated."""

    nodes: tuple[tuple[tuple[int, str], ...], ...]
    outputs: tuple[int, ...]

    @property
    def reads(self) -> set[int]:
        return {source for node in self.nodes for source, _ in node}


Programs = Mapping[str, CellProgram]
"""Kind of cell (`normal`, `reduce`) -> program."""


@dataclass(frozen=True)
class Layout:
    """The network around the cells.

    Attributes:
        cells: number of cells.
        reductions: positions of the reduction cells.
        auxiliary: position of the cell whose output an auxiliary head reads.
        second_twice: node 1 has a second 1x1 ReLU-conv-BN before it (ENAS).
        final_relu: a ReLU precedes the mean over pixels (ENAS).
        path_grows: the drop-path rate grows linearly with depth (ENAS).
    """

    cells: int
    reductions: tuple[int, ...]
    auxiliary: int
    second_twice: bool = False
    final_relu: bool = False
    path_grows: bool = False

    def kind(self, position: int) -> str:
        return "reduce" if position in self.reductions else "normal"


@dataclass(frozen=True)
class Place:
    """A cell's place: its channels C, those of its two inputs, and whether the one before the last was larger."""

    kind: str
    channels: int
    first: int
    second: int
    after_reduction: bool


def places(layout: Layout, width: int, n_outputs: Mapping[str, int]) -> Iterator[Place]:
    """The cells' places for a first cell of `width` channels; `n_outputs`: nodes concatenated, by kind."""
    first = second = 3 * width
    channels = width
    after_reduction = False
    for position in range(layout.cells):
        kind = layout.kind(position)
        channels *= 2 if kind == "reduce" else 1
        yield Place(kind, channels, first, second, after_reduction)
        first, second = second, channels * n_outputs[kind]
        after_reduction = kind == "reduce"


@dataclass(frozen=True)
class Norms:
    """Batch norms of the cells, of the stem, and after pools (None: none there)."""

    cells: Norm
    stem: Norm
    pools: Norm | None


class CellSpace(Protocol):
    """Members of a space that its supernet reads."""

    n_nodes: int
    operations: tuple[str, ...]
    loose_ends: bool

    def programs(self, genotype: Genotype) -> Programs: ...
    def build(self, genotype: Genotype, width: int) -> "Network": ...


State = tuple[Tensor, Tensor | None]
"""A cell's output (B, n, S, S), and which of its channels these are (n,); None: all."""


def _sum_of_paths(states: list[Tensor], nodes: Sequence[Sequence[tuple[int, nn.Module]]], mask: Tensor | None) -> None:
    """Append to `states` each node's sum of its operations.

    Args:
        states: (B, C, S, S) each; nodes 0 and 1 are given, N are appended.
        nodes: for each node its (earlier node, operation) pairs.
        mask: (N, 2, B, 1, 1, 1) for the two operations of each node; an identity is never dropped.
    """
    for i, operations in enumerate(nodes):
        terms = []
        for slot, (source, operation) in enumerate(operations):
            term = operation(states[source])
            dropped = mask is not None and not isinstance(operation, nn.Identity)
            terms.append(term * mask[i, slot] if mask is not None and dropped else term)
        states.append(sum(terms[1:], terms[0]))


class _Inputs(nn.Module):
    """Nodes 0 and 1 of a cell: the last two cells' outputs at the cell's own channels and size.

    Args:
        reads: which of the two the cell uses; the other has no weights.
    """

    def __init__(self, place: Place, layout: Layout, norm: Norm, reads: set[int]):
        super().__init__()
        self.first = self.second = self.again = None
        c = place.channels
        if 0 in reads:
            self.first = (
                FactorizedReduction(place.first, c, norm)
                if place.after_reduction
                else ConvNorm(place.first, c, 1, norm)
            )
        if 1 in reads:
            self.second = ConvNorm(place.second, c, 1, norm)
            self.again = ConvNorm(c, c, 1, norm) if layout.second_twice else None

    def forward(self, first: State, second: State, reads: set[int]) -> list[Tensor]:
        """Compute the nodes in `reads`, (B, C, S, S) each; another node holds the input unchanged."""
        nodes = [first[0], second[0]]
        if 0 in reads and self.first is not None:
            nodes[0] = self.first(*first)
        if 1 in reads and self.second is not None:
            nodes[1] = self.second(*second)
            nodes[1] = nodes[1] if self.again is None else self.again(nodes[1])
        return nodes


def _stride(place: Place, source: int) -> int:
    return 2 if place.kind == "reduce" and source < 2 else 1


class Cell(nn.Module):
    """One cell that runs one program."""

    def __init__(self, place: Place, layout: Layout, program: CellProgram, norms: Norms):
        super().__init__()
        self.place = place
        self.program = program
        self.inputs = _Inputs(place, layout, norms.cells, program.reads)
        self.ops = nn.ModuleList(
            OPERATIONS[name](place.channels, _stride(place, source), norms.cells, norms.pools)
            for node in program.nodes
            for source, name in node
        )

    def forward(self, first: State, second: State, mask: Tensor | None, choice: None) -> State:
        """Outputs of the last two cells -> (B, outputs · C, S, S); `mask` (N, 2, B, 1, 1, 1) of drop-path."""
        states = self.inputs(first, second, self.program.reads)
        operations = iter(self.ops)
        nodes = [[(source, next(operations)) for source, _ in node] for node in self.program.nodes]
        _sum_of_paths(states, nodes, mask)
        return torch.cat([states[node] for node in self.program.outputs], 1), None


class Network(ImageBody):
    """The body (B, 3, S, S) -> (B, F) of one architecture; F = `n_features`."""

    def __init__(self, programs: Programs, width: int, layout: Layout, norms: Norms):
        super().__init__(width)
        n_outputs = {kind: len(program.outputs) for kind, program in programs.items()}
        self._frame(width, layout, norms, n_outputs)
        self.cells = nn.ModuleList(
            Cell(place, layout, programs[place.kind], norms) for place in places(layout, width, n_outputs)
        )
        self.n_nodes = len(programs["normal"].nodes)

    def _frame(self, width: int, layout: Layout, norms: Norms, n_outputs: Mapping[str, int]) -> None:
        self.layout = layout
        channels = [place.channels * n_outputs[place.kind] for place in places(layout, width, n_outputs)]
        self.n_features = channels[-1]
        self.auxiliary_channels = channels[layout.auxiliary]
        self.stem = ConvNorm(3, 3 * width, 3, norms.stem, relu=False)

    def initialise(self, generator: torch.Generator, init_range: float) -> None:
        """He normal by fan in; `init_range` is for bodies without batch norm."""
        initialise(self, generator)

    def draw_masks(self, batch_size: int, rates: Mapping[str, float], generator: torch.Generator) -> Masks:
        """`path_i` (N, 2, B, 1, 1, 1) for cell i: drop-path for its nodes' operations at `rates["path"]`.

        Whole images of an operation's output are dropped (Larsson et al., FractalNet, 2016, as DARTS and ENAS use it).
        """
        rate = rates.get("path", 0.0)
        if rate <= 0:
            return {}
        like = self.stem.conv.weight
        grown = [(i + 1) / self.layout.cells if self.layout.path_grows else 1.0 for i in range(self.layout.cells)]
        shape = (self.n_nodes, 2, batch_size, 1, 1, 1)
        return {f"path_{i}": draw_mask(shape, rate * share, generator, like) for i, share in enumerate(grown)}

    def maps(self, inputs: Tensor, masks: Masks, choice: Choice = None) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) -> the last cell's channels (B, F), averaged over the pixels, and the map that an auxiliary head
        reads, (B, auxiliary_channels, S', S')."""
        # the layout that convolutions, pools and norms are fastest in; what follows keeps it
        stem: State = (self.stem(inputs.contiguous(memory_format=torch.channels_last)), None)
        states, auxiliary = (stem, stem), stem
        choices = self._by_kind(choice)
        for i, cell in enumerate(self.cells):
            states = states[1], cell(*states, masks.get(f"path_{i}"), choices[self.layout.kind(i)])
            if i == self.layout.auxiliary:
                auxiliary = states[1]
        last, columns = states[1]
        pooled = (F.relu(last) if self.layout.final_relu else last).mean((2, 3))
        return _spread(pooled, columns, self.n_features), _spread(*auxiliary, self.auxiliary_channels)

    def _by_kind(self, choice: Choice) -> Mapping[str, Any]:
        """Choice of the cells, by kind; `choice` is ignored: a stand-alone network can do one thing."""
        return dict.fromkeys(KINDS)


def _spread(values: Tensor, columns: Tensor | None, n: int) -> Tensor:
    """(B, n, ...) with `values` (B, m, ...) at channels `columns` (m,), zeros elsewhere; without columns `values`."""
    if columns is None:
        return values
    return values.new_zeros(values.shape[0], n, *values.shape[2:]).index_copy(1, columns, values)


class SupernetCell(nn.Module):
    """One cell with every operation on every edge; edge e of a table is row e of `ops`."""

    def __init__(self, place: Place, layout: Layout, space: CellSpace, norms: Norms):
        super().__init__()
        self.place = place
        self.space = space
        self.inputs = _Inputs(place, layout, norms.cells, {0, 1})
        self.ops = nn.ModuleList(
            OPERATIONS[name](place.channels, _stride(place, source), norms.cells, norms.pools)
            for _, source in edges(space.n_nodes)
            for name in space.operations
        )

    def forward(self, first: State, second: State, mask: Tensor | None, choice: CellProgram | Tensor) -> State:
        """Run one program, with `mask` (N, 2, B, 1, 1, 1) of drop-path, or the mixture of (E, K) weights."""
        if isinstance(choice, CellProgram):
            return self.path(choice, first, second, mask)
        return self.mixture(choice, first, second)

    def index(self, i: int, source: int, name: str) -> int:
        """Index in `ops` of the operation of the i-th node on an earlier one."""
        return (first_edge(i) + source) * len(self.space.operations) + self.space.operations.index(name)

    def path(self, program: CellProgram, first: State, second: State, mask: Tensor | None) -> State:
        """Run the operations of one program: (B, outputs · C, S, S), and which of all nodes' channels these are.

        Args:
            mask: (N, 2, B, 1, 1, 1) of drop-path; None: none.
        """
        states = self.inputs(first, second, program.reads)
        nodes = [
            [(source, self.ops[self.index(i, source, name)]) for source, name in node]
            for i, node in enumerate(program.nodes)
        ]
        _sum_of_paths(states, nodes, mask)
        columns = None
        if len(program.outputs) < len(program.nodes):
            columns = torch.tensor(output_columns(program, self.place.channels), device=states[-1].device)
        return torch.cat([states[node] for node in program.outputs], 1), columns

    def mixture(self, weights: Tensor, first: State, second: State) -> State:
        """Run all operations, weighted by (E, K): (B, N · C, S, S). `weights` may have a leading column for `none`,
        which adds nothing."""
        weights = weights[:, weights.shape[1] - len(self.space.operations) :]
        states = self.inputs(first, second, {0, 1})
        weightless: dict[tuple[int, str], Tensor] = {}  # pools and identities: the same for every node that reads one
        for i in range(self.space.n_nodes):
            total: Tensor | None = None
            for source in range(i + 2):
                for k, name in enumerate(self.space.operations):
                    operation = self.ops[self.index(i, source, name)]
                    value = weightless.get((source, name))
                    if value is None:
                        value = operation(states[source])
                        if next(operation.parameters(), None) is None:
                            weightless[source, name] = value
                    term = weights[first_edge(i) + source, k] * value
                    total = term if total is None else total + term
            assert total is not None
            states.append(total)
        nodes = states[2:]
        if self.space.loose_ends:
            shares = loose_ends(weights.sum(1), self.space.n_nodes)
            nodes = [share * node for share, node in zip(shares, nodes, strict=True)]
        return torch.cat(nodes, 1), None


class SupernetNetwork(Network, Supernet):
    """The weights of every architecture of a space; runs one path (a Genotype) or a mixture.

    Its features and map have the channels of all nodes, zeros where a path does not concatenate a node; `columns` says
    which a path has.
    """

    def __init__(self, space: CellSpace, width: int, layout: Layout, norms: Norms):
        Body.__init__(self, width)
        n_outputs = dict.fromkeys(KINDS, space.n_nodes)
        self._frame(width, layout, norms, n_outputs)
        self.space = space
        self.n_nodes = space.n_nodes
        self.cells = nn.ModuleList(
            SupernetCell(place, layout, space, norms) for place in places(layout, width, n_outputs)
        )

    def _by_kind(self, choice: Choice) -> Mapping[str, Any]:
        if choice is None:
            raise ValueError("a supernet needs a choice: a genotype or a mixture")
        return self.space.programs(choice) if isinstance(choice, Genotype) else choice

    def _cell(self, position: int) -> SupernetCell:
        cell = self.cells[position]
        assert isinstance(cell, SupernetCell)
        return cell

    def columns(self, genotype: Genotype) -> list[int]:
        """Indices of the stand-alone network's features among the supernet's, in the stand-alone order."""
        place = self._cell(-1).place
        return output_columns(self.space.programs(genotype)[place.kind], place.channels)

    def inherit(self, genotype: Genotype) -> dict[str, Tensor]:
        """State of the stand-alone network of the supernet's depth: copies of the weights on path `genotype`, running
        statistics as they begin.

        Raises:
            UserError: the space builds networks of another depth.
        """
        programs = self.space.programs(genotype)
        body = self.space.build(genotype, self.width)
        if len(body.cells) != len(self.cells):
            raise UserError("weights can be inherited only where the space's cells and search_cells are the same")
        own = self.state_dict()
        like = self.stem.conv.weight
        inherited = {}
        for key, value in body.to(like.device, like.dtype).state_dict().items():
            found = own.get(self._source(key, programs), value)
            if found.shape != value.shape:  # a 1x1 convolution that reads the nodes of another cell
                _, position, _, name, *_ = key.split(".")
                place = self._cell(int(position) - (2 if name == "first" else 1)).place
                found = found[:, output_columns(programs[place.kind], place.channels)]
            inherited[key] = found.detach().clone()
        return inherited

    def _source(self, key: str, programs: Programs) -> str:
        """The supernet's name of a stand-alone network's weight: cells.CELL.ops.INDEX, the index in its own list."""
        parts = key.split(".")
        if parts[0] != "cells" or parts[2] != "ops":
            return key
        cell = self._cell(int(parts[1]))
        operations = [(i, *edge) for i, node in enumerate(programs[cell.place.kind].nodes) for edge in node]
        return ".".join([*parts[:3], str(cell.index(*operations[int(parts[3])])), *parts[4:]])


def edges(n_nodes: int) -> list[tuple[int, int]]:
    """(node, earlier node) of every edge of a cell; nodes count from 2, after the two inputs."""
    return [(i + 2, source) for i in range(n_nodes) for source in range(i + 2)]


def first_edge(i: int) -> int:
    """Row of the first edge into the i-th node (i from 0): 0, 2, 5, 9, ..."""
    return i * (i + 3) // 2


def output_columns(program: CellProgram, channels: int) -> list[int]:
    """Indices of the concatenated nodes' channels among those of all nodes one after the other."""
    return [(node - 2) * channels + c for node in program.outputs for c in range(channels)]


def loose_ends(mass: Tensor, n_nodes: int) -> list[Tensor]:
    """Scalar per node: probability that no later one reads it, where each reads two by the (E,) `mass` of its edges.

    An edge of share r among a node's is taken for one of the two with probability min(1, 2 r): exact for two equal
    masses and zeros elsewhere, and for equal masses.
    """
    loose = [mass.new_ones(()) for _ in range(n_nodes)]
    for i in range(n_nodes):
        row = mass[first_edge(i) : first_edge(i + 1)]
        reads = (2 * row / row.sum().clamp_min(torch.finfo(row.dtype).tiny)).clamp(max=1.0)
        for j in range(i):
            loose[j] = loose[j] * (1.0 - reads[j + 2])
    return loose
