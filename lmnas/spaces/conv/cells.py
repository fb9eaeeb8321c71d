"""Convolutional cells on images: those of DARTS and those of ENAS (micro).

Both choose a normal and a reduction cell in which every node is the sum of two operations on earlier nodes, and stack
them in one kind of network (`lmnas.spaces.conv.network`). They differ in the two inputs that a node may have, in the
operations, in the nodes that are concatenated and in a few details of the network.

DARTS: Liu et al., 2019, arXiv 1806.09055, sections 2.1, 2.4 and 3.1; positions, pools and stem as in the authors' code.
Batch norm of the supernet uses batch statistics always (the paper; its code keeps running averages for evaluation).

ENAS: Pham et al., 2018, arXiv 1802.03268, section 2.4; the network is the authors' final one, for search too: users
found that their two differ. So, against their search network, reduction cells have stride 2 on operations on nodes 0
and 1 (theirs reduces in front of a stride-1 cell), and the 1x1 convolution with per-node weights stands before the
cells that read instead of behind the cell that writes. Further: one operation on one edge has one weight, whichever of
the node's two inputs it is (theirs: two); a 1x1 convolution stands before an input even where its channels fit; an
input that no node reads is left out (theirs concatenates it with the loose ends); a reducing identity is dropped by
drop-path like any other operation. Gradient search on this space is ours.
"""

from abc import abstractmethod
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from lmnas.core.contracts import Diagram, EdgeTable, Mixture, Relaxed
from lmnas.core.decisions import Decision, Decisions, OneOf, Subset
from lmnas.core.errors import UserError, nearest
from lmnas.core.genotype import Genotype
from lmnas.nn.ops.conv import Norm
from lmnas.spaces.conv.network import (
    KINDS,
    NORMS_UNDO,
    OPERATIONS,
    CellProgram,
    Layout,
    Network,
    Norms,
    Programs,
    SupernetNetwork,
    edges,
    first_edge,
)

DARTS_OPERATIONS = (
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
ENAS_OPERATIONS = ("sep_conv_3x3", "sep_conv_5x5", "avg_pool_3x3", "max_pool_3x3", "identity")

Cells = Annotated[int, Field(ge=3, le=1000)]
Nodes = Annotated[int, Field(ge=1, le=16)]


def node_name(kind: str, node: int) -> str:
    return f"{kind}.node_{node}"


class _ConvCells(Relaxed):
    """Base of both spaces. Nodes 0 and 1 are a cell's inputs, chosen ones count from 2."""

    makes = frozenset({"image"})
    noun = "cell"
    no_switches = NORMS_UNDO
    loose_ends: bool

    def __init__(self, n_nodes: int, operations: tuple[str, ...], cells: int, search_cells: int | None):
        for operation in operations:
            if operation not in OPERATIONS:
                raise UserError(f"space: operation {operation!r} is unknown. " + nearest(operation, OPERATIONS))
        if len(set(operations)) != len(operations):
            raise UserError(f"space.operations: each may stand once, got {', '.join(operations)}")
        self.n_nodes = n_nodes
        self.operations = tuple(operations)
        self.cells = cells
        self.search_cells = cells if search_cells is None else search_cells
        self.decisions = Decisions(
            decision
            for kind in KINDS
            for node in range(2, n_nodes + 2)
            for decision in self._node_decisions(kind, node, node_name(kind, node))
        )

    @abstractmethod
    def _node_decisions(self, kind: str, node: int, prefix: str) -> tuple[Decision, ...]:
        """Decisions of one node."""

    @abstractmethod
    def _node(self, choices: Any, prefix: str) -> tuple[tuple[int, str], ...]:
        """The node's two (earlier node, operation)."""

    @abstractmethod
    def _node_choices(self, prefix: str, pairs: list[tuple[int, str]]) -> dict[str, Any]:
        """Choices that `_node` reads back as `pairs`, whose earlier nodes are in order."""

    @abstractmethod
    def _layout(self, cells: int) -> Layout:
        """Layout of the network with `cells` cells."""

    @abstractmethod
    def _norms(self, stand_alone: bool) -> Norms:
        """Batch norms of the stand-alone network or the supernet."""

    def programs(self, genotype: Genotype) -> Programs:
        """The two cells to be run."""
        programs = {}
        for kind in KINDS:
            nodes = tuple(self._node(genotype.choices, node_name(kind, n)) for n in range(2, self.n_nodes + 2))
            read = {source for node in nodes for source, _ in node} if self.loose_ends else set()
            programs[kind] = CellProgram(nodes, tuple(n for n in range(2, self.n_nodes + 2) if n not in read))
        return programs

    def build(self, genotype: Genotype, width: int) -> Network:
        """The stand-alone network of `cells` cells, `width` channels in the first."""
        self.check(genotype)
        return Network(self.programs(genotype), width, self._layout(self.cells), self._norms(stand_alone=True))

    def supernet(self, width: int) -> SupernetNetwork:
        """Supernet of `search_cells` cells."""
        return SupernetNetwork(self, width, self._layout(self.search_cells), self._norms(stand_alone=False))

    def tables(self) -> tuple[EdgeTable, ...]:
        rows = tuple(edges(self.n_nodes))
        return tuple(EdgeTable(kind, rows, self._columns(), inputs=2) for kind in KINDS)

    def _columns(self) -> tuple[str, ...]:
        return self.operations

    def derive(self, mixture: Mixture) -> Genotype:
        """Per node the two edges with the largest weights, each with its best operation, `none` left out (DARTS section
        2.4, k = 2); ties go to the earlier edge and operation."""
        choices = {}
        for kind in KINDS:
            weights = mixture[kind][:, len(self._columns()) - len(self.operations) :]
            for i in range(self.n_nodes):
                pairs = self._strongest(weights[first_edge(i) : first_edge(i + 1)])
                choices.update(self._node_choices(node_name(kind, i + 2), pairs))
        return Genotype(self.name, choices)

    def _strongest(self, weights: Tensor) -> list[tuple[int, str]]:
        """(earlier node, operation) of the two rows with the largest entries; `weights`: (edges of a node, K)."""
        best, columns = weights.max(1)
        ranked = sorted(range(len(weights)), key=lambda row: (-best[row].item(), row))
        return [(row, self.operations[int(columns[row])]) for row in sorted(ranked[:2])]

    def diagram(self, genotype: Genotype) -> Diagram:
        nodes, links = [], []
        for kind, program in self.programs(genotype).items():
            key = lambda node, kind=kind: f"{kind} {node}"  # noqa: E731
            nodes += [(key(0), f"{kind}\nc[k-2]", "input"), (key(1), f"{kind}\nc[k-1]", "input")]
            nodes = [node for node in nodes if node[0] not in {key(n) for n in {0, 1} - program.reads}]
            for i, pairs in enumerate(program.nodes, start=2):
                nodes.append((key(i), str(i), "op"))
                links += [(key(source), key(i), operation) for source, operation in pairs]
            nodes.append((key("out"), f"{kind}\nc[k]", "output"))
            links += [(key(node), key("out"), "") for node in program.outputs]
        return Diagram(f"{self.name}: normal and reduction cell", tuple(nodes), tuple(links))


class DartsConv(_ConvCells):
    """DARTS' convolutional cells: per node two earlier nodes, an operation on each; all nodes are concatenated."""

    name = "darts-conv"
    loose_ends = False

    def __init__(
        self,
        *,
        n_nodes: Nodes = 4,
        operations: Annotated[tuple[str, ...], Field(min_length=1)] = DARTS_OPERATIONS,
        none: bool = True,
        cells: Cells = 20,
        search_cells: Cells | None = None,
        pool_norm: Literal["search", "always", "never"] = "search",
    ):
        """
        Args:
            n_nodes: of a cell, its two inputs not counted.
            operations: what a node may apply.
            none: offer the zero operation in a mixture.
            cells: depth of the stand-alone network.
            search_cells: depth of the supernet; default: the same.
            pool_norm: batch norm without scale and shift after pools: in the supernet only (DARTS), in the stand-alone
                network too, or nowhere.
        """
        self.none = none
        self.pool_norm = pool_norm
        super().__init__(n_nodes, operations, cells, search_cells)

    @classmethod
    def covering(cls, genotype: Genotype) -> "DartsConv":
        return cls(n_nodes=_count_nodes(genotype, ".inputs"))

    def _columns(self) -> tuple[str, ...]:
        return (*(("none",) if self.none else ()), *self.operations)

    def _node_decisions(self, kind: str, node: int, prefix: str) -> tuple[Decision, ...]:
        return (
            Subset(f"{prefix}.inputs", tuple(range(node)), node=node, reads_node=True, graph=kind, size=2),
            OneOf(f"{prefix}.op_1", self.operations, node=node, graph=kind),
            OneOf(f"{prefix}.op_2", self.operations, node=node, graph=kind),
        )

    def _node(self, choices: Any, prefix: str) -> tuple[tuple[int, str], ...]:
        first, second = choices[f"{prefix}.inputs"]
        return (first, choices[f"{prefix}.op_1"]), (second, choices[f"{prefix}.op_2"])

    def _node_choices(self, prefix: str, pairs: list[tuple[int, str]]) -> dict[str, Any]:
        (first, op_1), (second, op_2) = pairs
        return {f"{prefix}.inputs": [first, second], f"{prefix}.op_1": op_1, f"{prefix}.op_2": op_2}

    def _layout(self, cells: int) -> Layout:
        return Layout(cells, (cells // 3, 2 * cells // 3), auxiliary=2 * cells // 3)

    def _norms(self, stand_alone: bool) -> Norms:
        if stand_alone:
            return Norms(Norm(), Norm(), Norm(affine=False) if self.pool_norm == "always" else None)
        plain = Norm(affine=False, running=False)
        return Norms(plain, Norm(running=False), None if self.pool_norm == "never" else plain)


class EnasMicro(_ConvCells):
    """ENAS' micro cells: per node two earlier nodes (or twice one), an operation on each; loose ends are concatenated.

    A node's two halves in either order are two genotypes and two of the sequences that the paper counts.
    """

    name = "enas-micro"
    loose_ends = True

    def __init__(
        self,
        *,
        n_nodes: Nodes = 5,
        operations: Annotated[tuple[str, ...], Field(min_length=1)] = ENAS_OPERATIONS,
        cells: Cells = 17,
        search_cells: Cells | None = None,
    ):
        """
        Args:
            n_nodes: of a cell, its two inputs not counted (the paper's B = 7 counts them).
            operations: what a node may apply.
            cells: depth of the stand-alone network, its two reduction cells counted (the authors' 15 + 2).
            search_cells: depth of the supernet (the authors': 6 + 2); default: the same.
        """
        super().__init__(n_nodes, operations, cells, search_cells)

    @classmethod
    def covering(cls, genotype: Genotype) -> "EnasMicro":
        return cls(n_nodes=_count_nodes(genotype, ".input_1"))

    def _node_decisions(self, kind: str, node: int, prefix: str) -> tuple[Decision, ...]:
        return (
            OneOf(f"{prefix}.input_1", tuple(range(node)), node=node, reads_node=True, graph=kind),
            OneOf(f"{prefix}.input_2", tuple(range(node)), node=node, reads_node=True, graph=kind),
            OneOf(f"{prefix}.op_1", self.operations, node=node, graph=kind),
            OneOf(f"{prefix}.op_2", self.operations, node=node, graph=kind),
        )

    def _node(self, choices: Any, prefix: str) -> tuple[tuple[int, str], ...]:
        return tuple((choices[f"{prefix}.input_{slot}"], choices[f"{prefix}.op_{slot}"]) for slot in (1, 2))

    def _node_choices(self, prefix: str, pairs: list[tuple[int, str]]) -> dict[str, Any]:
        inputs = {f"{prefix}.input_{slot}": source for slot, (source, _) in enumerate(pairs, start=1)}
        return inputs | {f"{prefix}.op_{slot}": name for slot, (_, name) in enumerate(pairs, start=1)}

    def _layout(self, cells: int) -> Layout:
        third = (cells - 2) // 3
        last = 2 * third + 1
        return Layout(
            cells,
            (third, last),
            auxiliary=min(last + 1, cells - 1),
            second_twice=True,
            final_relu=True,
            path_grows=True,
        )

    def _norms(self, stand_alone: bool) -> Norms:
        norm = Norm(running=stand_alone)
        return Norms(norm, norm, None)


def _count_nodes(genotype: Genotype, suffix: str) -> int:
    """Nodes of the normal cell, at least one and at most what a space may have: `check` says what is wrong."""
    named = sum(name.startswith("normal.") and name.endswith(suffix) for name in genotype.choices)
    return min(max(named, 1), 16)
