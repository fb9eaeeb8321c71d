"""Plain PyTorch formulation of the recurrent cell: the definition of what is right for every faster kernel.

One cell serves ENAS (Pham et al., 2018, section 2, highway form; arXiv 1802.03268) and DARTS (Liu et al., 2019,
section 2 and appendix A; arXiv 1806.09055). Node 0 reads x_t and h_{t-1}; node i reads one earlier node:

    [c_0, a_0] = [x_t * m_x ; h_{t-1} * m_h] W_0      s_0 = h_{t-1} + sigmoid(c_0) * (f_0(a_0) - h_{t-1})
    [c_i, a_i] = (s_p * m_h) W_i                      s_i = s_p + sigmoid(c_i) * (f_i(a_i) - s_p)

The kernels know encoded programs (operation codes, input indices), never spaces.

Shapes: T time, B batch, H width, N nodes after node 0, E edges (node i has i of them, rows in the order (1,0), (2,0),
(2,1), (3,0), ...), K operation codes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lmnas.nn.kernels.cross_entropy import linear_cross_entropy

OPS = ("tanh", "relu", "sigmoid", "identity")
"""Operation codes are indices into this tuple. `none` has no code: it adds nothing."""

FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (torch.tanh, torch.relu, torch.sigmoid, lambda a: a)

BatchNorm = Literal["none", "nodes", "output"]


@dataclass(frozen=True)
class Program:
    """An encoded path.

    Attributes:
        ops: operation code of node 0..N.
        inputs: node that node 1..N reads (N entries).
        outputs: nodes whose mean is h_t.
    """

    ops: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Operands:
    """Arguments of every kernel of the cell, for a path or a mixture.

    Attributes:
        inputs: (T, B, H).
        state: (B, H), h before the segment.
        w_input: (2H, 2H), W_0.
        w_nodes: matrices of (H, 2H); their number is given where they are used.
        mask_x, mask_h: (B, H), already scaled; None: no dropout. `mask_h` serves h and every node's input.
        batch_norm: `nodes` after every node (DARTS search), `output` on the mean (ENAS paper), or `none`.
    """

    inputs: Tensor
    state: Tensor
    w_input: Tensor
    w_nodes: Sequence[Tensor]
    mask_x: Tensor | None = None
    mask_h: Tensor | None = None
    batch_norm: BatchNorm = "none"

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return (self.w_input, *self.w_nodes)

    @property
    def masks(self) -> tuple[Tensor, ...]:
        return tuple(mask for mask in (self.mask_x, self.mask_h) if mask is not None)


def edges(n_nodes: int) -> list[tuple[int, int]]:
    """(node, predecessor) of every edge row."""
    return [(node, predecessor) for node in range(1, n_nodes + 1) for predecessor in range(node)]


def first_edge(node: int) -> int:
    """Row of the edge (node, 0)."""
    return node * (node - 1) // 2


def normalise(states: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Affine-free batch norm of (B, H) with the statistics of this batch, in training and in evaluation alike.

    Search only. The papers' code keeps running averages over all nodes and time steps and uses them in evaluation,
    which makes a supernet's validation perplexity meaningless (hundreds); batch statistics follow the DARTS paper.
    """
    mean = states.mean(0)
    variance = states.var(0, correction=0)
    return (states - mean) * torch.rsqrt(variance + epsilon)


def _gate(state: Tensor, pre: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """s + sigmoid(c) * (f(a) - s) with pre = [c, a] of (..., 2H)."""
    c, a = pre.chunk(2, dim=-1)
    return state + torch.sigmoid(c) * (function(a) - state)


def _input_projection(x: Operands) -> Tensor:
    """(T, B, 2H): the part of node 0 that does not wait for h, all time steps in one product."""
    width = x.inputs.shape[-1]
    return (x.inputs if x.mask_x is None else x.inputs * x.mask_x) @ x.w_input[:width]


def recurrent_path(x: Operands, program: Program) -> Tensor:
    """Run one architecture over a segment: (T, B, H), h after every step.

    Args:
        x: w_nodes are N of (H, 2H), W_i of the edge that the path takes into node i.
    """
    width, mask_h = x.inputs.shape[-1], x.mask_h
    x_projection = _input_projection(x)
    w_hidden = x.w_input[width:]
    h, hs = x.state, []
    for projected in x_projection:
        s = _gate(h, projected + (h if mask_h is None else h * mask_h) @ w_hidden, FUNCTIONS[program.ops[0]])
        states = [normalise(s) if x.batch_norm == "nodes" else s]
        for op, source, weight in zip(program.ops[1:], program.inputs, x.w_nodes, strict=True):
            s = states[source]
            s = _gate(s, (s if mask_h is None else s * mask_h) @ weight, FUNCTIONS[op])
            states.append(normalise(s) if x.batch_norm == "nodes" else s)
        h = torch.stack([states[i] for i in program.outputs]).mean(0)
        if x.batch_norm == "output":
            h = normalise(h)
        hs.append(h)
    return torch.stack(hs)


def recurrent_mixture(x: Operands, p_input: Tensor, p_edges: Tensor, output_weights: Tensor) -> Tensor:
    """Run the weighted mixture of all architectures over a segment (DARTS eq. 2 with the recurrent cell's gates).

        s_i = sum_{j<i} sum_k p_k^{(j,i)} [s_j + sigmoid(c_ij) * (f_k(a_ij) - s_j)]

    Args:
        x: w_nodes are N of (H, 2H), W_i shared by all predecessors of node i (DARTS); or E, one per edge (ENAS).
        p_input: (K,) weights of node 0's operations.
        p_edges: (E, K) weights; what `none` would have got is simply missing from a row's sum.
        output_weights: (N + 1,) weights of the nodes in h_t, summing to one.

    Returns:
        (T, B, H), h after every step.
    """
    width, mask_h, w_nodes = x.inputs.shape[-1], x.mask_h, x.w_nodes
    n_nodes = output_weights.shape[0] - 1
    per_edge = len(w_nodes) != n_nodes  # with one node there is one edge, and the two are the same
    x_projection = _input_projection(x)
    w_hidden = x.w_input[width:]

    # (i, H, 2H) where every edge has its own weights, (H, 2H) where a node's edges share them
    weights = [
        torch.stack(list(w_nodes[first_edge(i) : first_edge(i + 1)])) if per_edge else w_nodes[i - 1]
        for i in range(1, n_nodes + 1)
    ]
    rows = [p_edges[first_edge(i) : first_edge(i + 1)] for i in range(1, n_nodes + 1)]

    def mixed(s: Tensor, pre: Tensor, p: Tensor) -> Tensor:
        """sum_j P_j s_j + sigmoid(c_j) * (sum_k p_jk f_k(a_j) - P_j s_j), P_j = sum_k p_jk, over (j, B, H)."""
        c, a = pre.chunk(2, dim=-1)
        f = sum(p[:, k, None, None] * function(a) for k, function in enumerate(FUNCTIONS))
        carried = p.sum(1)[:, None, None] * s
        return (carried + torch.sigmoid(c) * (f - carried)).sum(0)

    h, hs = x.state, []
    for projected in x_projection:
        s = mixed(h[None], (projected + (h if mask_h is None else h * mask_h) @ w_hidden)[None], p_input[None])
        states = [normalise(s) if x.batch_norm == "nodes" else s]
        for weight, p in zip(weights, rows, strict=True):
            stacked = torch.stack(states)
            s = mixed(stacked, (stacked if mask_h is None else stacked * mask_h) @ weight, p)
            states.append(normalise(s) if x.batch_norm == "nodes" else s)
        h = torch.einsum("n,nbh->bh", output_weights, torch.stack(states))
        if x.batch_norm == "output":
            h = normalise(h)
        hs.append(h)
    return torch.stack(hs)


class Reference:
    """The functions above as a kernel, and the base of the others: what they leave out, they inherit.

    Attributes:
        runs_on: type of device -> name of what runs there; other devices run the reference.
        keeps_a_block: the cell's backward reads one block of memory, as `planned` lays it out.
    """

    runs_on: ClassVar[Mapping[str, str]] = {}
    keeps_a_block = False

    def unavailable(self) -> str | None:
        """Reason that the kernel is unavailable here, as far as known before compiling; None: it is available."""
        return None

    def must_compile(self) -> bool:
        """True if `prepare` would compile it first."""
        return False

    def prepare(self) -> None:
        """Make it ready in this process.

        Raises:
            UserError: it is unavailable.
        """

    def takes(self, x: Operands, weights: Sequence[Tensor]) -> bool:
        """True if these operands run here; the reference takes all the others. `weights`: all that a cell has."""
        return True

    def recurrent_path(self, x: Operands, program: Program, sampled: bool = False) -> Tensor:
        """(T, B, H). `sampled`: the next call will have another program."""
        return recurrent_path(x, program)

    def recurrent_mixture(self, x: Operands, p_input: Tensor, p_edges: Tensor, output_weights: Tensor) -> Tensor:
        """(T, B, H)."""
        return recurrent_mixture(x, p_input, p_edges, output_weights)

    def takes_softmax(self, hidden: Tensor, *others: Tensor) -> bool:
        """True if `linear_cross_entropy` takes these operands."""
        return True

    def linear_cross_entropy(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore: int = -100
    ) -> Tensor:
        """Scalar, as `cross_entropy.linear_cross_entropy`."""
        return linear_cross_entropy(hidden, weight, bias, targets, ignore)
