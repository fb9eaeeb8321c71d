"""Forward and backward passes of the recurrent cell over a whole segment, in torch operations, backward by hand.

`reference` defines what is right; this is the same algebra for a device where launching a kernel costs more than most
kernels do. It runs anywhere, so that everything but the recording of graphs (`graphs.py`) is tested on a CPU:

    all time steps' input projections in one product, and every weight gradient in one product over all time steps;
    one product per time step and node, of the states that the node reads with its weight;
    P s + sigmoid(c) (sum_k p_k f_k(a) - P s) for each edge, P the total weight of its operations.

Kept for backward: the products [c, a], the states, and the deviations of batch norm. Activations are computed again.
Backward writes the gradients of the products over the products, so a tape serves once.

The two passes know nodes that read sources, mix them and give them gradients back. What differs between a fixed path, a
path given as values and a mixture is a `Wiring`. Operations that exist as one kernel (x + y z, a derivative times a
gradient) are called as one.

Shapes: T time, B batch, H width, N nodes after node 0, M weights of nodes, E edges (see `reference`), L edges into one
node, K operation codes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lmnas.nn.kernels.reference import FUNCTIONS, OPS, BatchNorm, Program, first_edge

EPSILON = 1e-5
"""Constant added to the variance in batch norm, as in `reference.normalise`."""


class Arguments(NamedTuple):
    """The values that a pass reads, each contiguous; None where its wiring has no such thing.

    Attributes:
        inputs: (T, B, H).
        state: (B, H).
        w_input: (2H, 2H).
        w_nodes: (M, H, 2H).
        p_input: (K,), weights of node 0's operations; one-hot for `SampledPath`.
        p_edges: (E, K); (N, K), one-hot, for `SampledPath`.
        shares: (N + 1,), weights of the nodes in h_t; None for `FixedPath`.
        sources: (N,) int64 for `SampledPath`: the node that node 1..N reads.
        mask_x, mask_h: (B, H).
    """

    inputs: Tensor
    state: Tensor
    w_input: Tensor
    w_nodes: Tensor
    p_input: Tensor | None = None
    p_edges: Tensor | None = None
    shares: Tensor | None = None
    sources: Tensor | None = None
    mask_x: Tensor | None = None
    mask_h: Tensor | None = None


class Wants(NamedTuple):
    """Flags of the gradients to compute, in the order of `Arguments`."""

    inputs: bool = False
    state: bool = False
    w_input: bool = False
    w_nodes: bool = False
    p_input: bool = False
    p_edges: bool = False
    shares: bool = False


class Wiring(ABC):
    """Inputs and operations of the nodes of a segment, for one pass."""

    def __init__(self, plan: "Plan", x: Arguments, wants: Wants):
        self.plan, self.x, self.wants = plan, x, wants
        self.d_p_input: Tensor | None = None
        self.d_p_edges: Tensor | None = None
        self.d_shares: Tensor | None = None

    @staticmethod
    def n_edges(node: int) -> int:
        """L of a node after node 0."""
        return 1

    def rows(self, node: int) -> int | slice:
        """Index of the node's weights among the M: one (H, 2H) for all its edges, or a slice with one for each."""
        return node - 1

    @abstractmethod
    def reads(self, states: Tensor, node: int) -> Tensor:
        """The states (..., L, B, H) that a node reads, of all states (..., N + 1, B, H)."""

    @abstractmethod
    def add(self, d_states: Tensor, node: int, d_reads: Tensor) -> None:
        """Add d_reads (L, B, H) to the gradients (N + 1, B, H) of the states that the node reads."""

    @abstractmethod
    def gate(self, node: int, pre: Tensor, s: Tensor) -> Tensor:
        """(B, H), the node's state from pre = [c, a] of (L, B, 2H) and what it reads, s (L, B, H)."""

    @abstractmethod
    def gate_backward(self, node: int, pre: Tensor, s: Tensor, g: Tensor) -> Tensor:
        """The gradient of s from g (B, H) of the node's state; that of pre is written over it."""

    @abstractmethod
    def output(self, states: Tensor) -> Tensor:
        """(B, H), h_t before batch norm, from states (N + 1, B, H)."""

    @abstractmethod
    def output_backward(self, states: Tensor, g: Tensor) -> Tensor:
        """(N + 1, B, H), the gradients of the states from that of h_t."""


class FixedPath(Wiring):
    """One program, which is part of the plan: each node reads one state and applies one operation."""

    @property
    def program(self) -> Program:
        assert self.plan.program is not None
        return self.plan.program

    def reads(self, states: Tensor, node: int) -> Tensor:
        source = self.program.inputs[node - 1]
        return states[..., source : source + 1, :, :]

    def add(self, d_states: Tensor, node: int, d_reads: Tensor) -> None:
        d_states[self.program.inputs[node - 1]] += d_reads[0]

    def gate(self, node: int, pre: Tensor, s: Tensor) -> Tensor:
        c, a = pre[0].chunk(2, dim=-1)
        return torch.lerp(s[0], FUNCTIONS[self.program.ops[node]](a), torch.sigmoid(c))

    def gate_backward(self, node: int, pre: Tensor, s: Tensor, g: Tensor) -> Tensor:
        op = self.program.ops[node]
        c, a = pre.chunk(2, dim=-1)
        value, sigma = FUNCTIONS[op](a), torch.sigmoid(c)
        through = g * sigma
        dc = torch.ops.aten.sigmoid_backward(g * (value - s), sigma)
        a.copy_(_derived(op, through, a, value))
        c.copy_(dc)
        return g - through

    # nodes that do not count are not read: they may be infinite

    def output(self, states: Tensor) -> Tensor:
        return torch.stack([states[node] for node in self.program.outputs]).mean(0)

    def output_backward(self, states: Tensor, g: Tensor) -> Tensor:
        d_states = torch.zeros_like(states)
        share = g / len(self.program.outputs)
        for node in self.program.outputs:
            d_states[node].copy_(share)
        return d_states


def _derived(op: int, through: Tensor, a: Tensor, value: Tensor) -> Tensor:
    """through * f'(a), with value = f(a)."""
    if OPS[op] == "tanh":
        return torch.ops.aten.tanh_backward(through, value)
    if OPS[op] == "relu":
        return torch.ops.aten.threshold_backward(through, a, 0)
    if OPS[op] == "sigmoid":
        return torch.ops.aten.sigmoid_backward(through, value)
    return through


class Mixture(Wiring):
    """Each node reads all before it and weighs the operations on each edge; h_t weighs the nodes."""

    def __init__(self, plan: "Plan", x: Arguments, wants: Wants):
        super().__init__(plan, x, wants)
        assert x.p_input is not None and x.p_edges is not None and x.shares is not None
        self.shares, self.wants_p = x.shares, wants.p_input or wants.p_edges
        counts = [self.n_edges(node) for node in range(1, plan.n_nodes + 1)]
        self.by_node = [_totals(x.p_input[None]), *_totals(x.p_edges).split(counts)]
        if wants.p_input:
            self.d_p_input = torch.zeros_like(x.p_input)
        if wants.p_edges:
            self.d_p_edges = torch.zeros_like(x.p_edges)
        if wants.shares:
            self.d_shares = torch.zeros_like(x.shares)

    @staticmethod
    def n_edges(node: int) -> int:
        return node

    def rows(self, node: int) -> int | slice:
        return slice(first_edge(node), first_edge(node + 1)) if self.plan.per_edge else node - 1

    def reads(self, states: Tensor, node: int) -> Tensor:
        return states[..., :node, :, :]

    def add(self, d_states: Tensor, node: int, d_reads: Tensor) -> None:
        d_states[:node] += d_reads

    def gate(self, node: int, pre: Tensor, s: Tensor) -> Tensor:
        """sum_j P_j s_j + sigmoid(c_j) * (sum_k p_jk f_k(a_j) - P_j s_j) over the L edges into the node."""
        c, a = pre.chunk(2, dim=-1)
        w = self.by_node[node]
        f = w[:, 0] * torch.tanh(a)
        f = torch.addcmul(f, w[:, 1], torch.relu(a))
        f = torch.addcmul(f, w[:, 2], torch.sigmoid(a))
        f = torch.addcmul(f, w[:, 3], a)
        edges = torch.lerp(w[:, 4] * s, f, torch.sigmoid(c))
        return edges[0] if len(edges) == 1 else edges.sum(0)

    def gate_backward(self, node: int, pre: Tensor, s: Tensor, g: Tensor) -> Tensor:
        c, a = pre.chunk(2, dim=-1)
        w = self.by_node[node]
        tanh, relu, sigmoid, sigma = torch.tanh(a), torch.relu(a), torch.sigmoid(a), torch.sigmoid(c)
        weighted_tanh, weighted_sigmoid = w[:, 0] * tanh, w[:, 2] * sigmoid
        f = torch.addcmul(weighted_tanh + weighted_sigmoid, w[:, 1], relu)
        f = torch.addcmul(f, w[:, 3], a)
        through = g * sigma
        kept = g - through
        if self.wants_p:
            values = torch.stack([(through * value).sum((1, 2)) for value in (tanh, relu, sigmoid, a)], -1)
            self._add_p(node, values + (kept * s).sum((1, 2))[:, None])
        # p_0 (1 - tanh^2) + p_1 [a > 0] + p_2 (sigmoid - sigmoid^2) + p_3
        slope = torch.addcmul(w[:, 5], weighted_tanh, tanh, value=-1)
        slope = torch.addcmul(slope + weighted_sigmoid, weighted_sigmoid, sigmoid, value=-1)
        slope = slope + torch.ops.aten.threshold_backward(w[:, 1].expand_as(a), a, 0)
        dc = torch.ops.aten.sigmoid_backward(g * torch.addcmul(f, w[:, 4], s, value=-1), sigma)
        a.copy_(through * slope)
        c.copy_(dc)
        return kept * w[:, 4]

    def _add_p(self, node: int, d_p: Tensor) -> None:
        """d_p: (L, K)."""
        if node == 0 and self.d_p_input is not None:
            self.d_p_input += d_p[0]
        elif node > 0 and self.d_p_edges is not None:
            self.d_p_edges[first_edge(node) : first_edge(node + 1)] += d_p

    def output(self, states: Tensor) -> Tensor:
        return (self.shares @ states.flatten(1)).view(states.shape[1:])

    def output_backward(self, states: Tensor, g: Tensor) -> Tensor:
        if self.d_shares is not None:
            self.d_shares += states.flatten(1) @ g.flatten()
        return self.shares[:, None, None] * g


class SampledPath(Mixture):
    """One program, given as values: a mixture of one edge a node, one-hot, so that a recording serves every program."""

    @staticmethod
    def n_edges(node: int) -> int:
        return 1

    def _source(self, node: int) -> Tensor:
        assert self.x.sources is not None
        return self.x.sources[node - 1 : node]

    def reads(self, states: Tensor, node: int) -> Tensor:
        return states.index_select(-3, self._source(node))

    def add(self, d_states: Tensor, node: int, d_reads: Tensor) -> None:
        d_states.index_add_(0, self._source(node), d_reads)


def _totals(p: Tensor) -> Tensor:
    """(L, K + 2, 1, 1): weights p (L, K) of operations, their sum, and the slope that does not depend on a."""
    return torch.cat([p, p.sum(-1, keepdim=True), p[:, :1] + p[:, 3:]], -1)[..., None, None]


@dataclass(frozen=True)
class Plan:
    """Computation of a segment without shapes and values; with the shapes, the key of a recorded graph.

    Attributes:
        program: of a `FixedPath`.
        per_edge: every edge of a mixture has its own weight.
    """

    wiring: type[Wiring]
    n_nodes: int
    batch_norm: BatchNorm
    program: Program | None = None
    per_edge: bool = False


# ------------------------------------------------------------------------------------------------ tape


class Tape(NamedTuple):
    """Buffers that forward writes and backward reads. T' is T, or 1 where nothing is kept.

    Attributes:
        pre_input: (T, B, 2H), [c, a] of node 0.
        pre: N of (T', L, B, 2H), [c, a] of the other nodes.
        states: (T', N + 1, B, H).
        deviations: (T', N + 1, H) with batch norm of nodes, (T', 1, H) of the output.
        hs: (T, B, H).
    """

    pre_input: Tensor
    pre: tuple[Tensor, ...]
    states: Tensor
    deviations: Tensor | None
    hs: Tensor


def lay_tape(plan: Plan, shape: Sequence[int], keep: bool, allocate: Callable[[tuple[int, ...]], Tensor]) -> Tape:
    """A tape for inputs of `shape` (T, B, H), its parts taken from `allocate` in a fixed order."""
    t, b, h = shape
    kept, n = t if keep else 1, plan.n_nodes
    normalised = {"none": 0, "nodes": n + 1, "output": 1}[plan.batch_norm]
    return Tape(
        allocate((t, b, 2 * h)),
        tuple(allocate((kept, plan.wiring.n_edges(node), b, 2 * h)) for node in range(1, n + 1)),
        allocate((kept, n + 1, b, h)),
        allocate((kept, normalised, h)) if normalised else None,
        allocate((t, b, h)),
    )


# ------------------------------------------------------------------------------------------------ products


def _masked(states: Tensor, mask: Tensor | None) -> Tensor:
    """states (..., B, H) times mask (B, H)."""
    return states if mask is None else states * mask


def _add_masked(x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """x + y * mask for x and y of (..., B, H)."""
    return x + y if mask is None else torch.addcmul(x, y, mask)


def _multiply(a: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """(L, B, I) times (I, O) or (L, I, O). No copy is made where `out` is a part of a tape."""
    if w.dim() == 3:
        return torch.bmm(a, w, out=out)
    rows = torch.mm(a.reshape(-1, a.shape[-1]), w, out=None if out is None else out.view(-1, out.shape[-1]))
    return rows.view(*a.shape[:-1], -1)


def _over_time(reads: Tensor, d_pre: Tensor) -> Tensor:
    """(I, O): sum over everything of reads (..., I) times d_pre (..., O)."""
    return reads.reshape(-1, reads.shape[-1]).t() @ d_pre.reshape(-1, d_pre.shape[-1])


def _normalise(x: Tensor, deviation: Tensor) -> Tensor:
    """Batch norm of (B, H); 1 / sqrt(variance + epsilon) is written into `deviation` (H,)."""
    variance, mean = torch.var_mean(x, 0, correction=0)
    return (x - mean) * deviation.copy_(torch.rsqrt(variance + EPSILON))


def _normalise_backward(g: Tensor, y: Tensor, deviation: Tensor) -> Tensor:
    """The gradient of x from that of y = batch norm of x."""
    return deviation * torch.addcmul(g - g.mean(0), y, (g * y).mean(0), value=-1)


# ------------------------------------------------------------------------------------------------ passes


def forward(plan: Plan, x: Arguments, tape: Tape) -> None:
    """Write h after every step into `tape.hs`."""
    t_all, b, h = x.inputs.shape
    keep = len(tape.states) == t_all
    wiring = plan.wiring(plan, x, Wants())
    reads = _masked(x.inputs, x.mask_x).view(t_all * b, h)
    torch.mm(reads, x.w_input[:h], out=tape.pre_input.view(t_all * b, 2 * h))
    previous = x.state
    for t in range(t_all):
        k = t if keep else 0
        states = tape.states[k]
        tape.pre_input[t].addmm_(_masked(previous, x.mask_h), x.w_input[h:])
        for node in range(plan.n_nodes + 1):
            if node == 0:
                pre, sources = tape.pre_input[t][None], previous[None]
            else:
                pre, sources = tape.pre[node - 1][k], wiring.reads(states, node)
                _multiply(_masked(sources, x.mask_h), x.w_nodes[wiring.rows(node)], out=pre)
            value = wiring.gate(node, pre, sources)
            if plan.batch_norm == "nodes" and tape.deviations is not None:
                value = _normalise(value, tape.deviations[k, node])
            states[node].copy_(value)
        value = wiring.output(states)
        if plan.batch_norm == "output" and tape.deviations is not None:
            value = _normalise(value, tape.deviations[k, 0])
        previous = tape.hs[t].copy_(value)


def backward(plan: Plan, x: Arguments, tape: Tape, gradient: Tensor, wants: Wants) -> tuple[Tensor | None, ...]:
    """Gradients in the order of `Wants`, None where not wanted. Uses the tape up.

    Args:
        gradient: (T, B, H), of the result.
    """
    t_all, h = len(x.inputs), x.inputs.shape[-1]
    wiring = plan.wiring(plan, x, wants)
    d_h = torch.zeros_like(x.state)
    for t in range(t_all - 1, -1, -1):
        states, previous = tape.states[t], x.state if t == 0 else tape.hs[t - 1]
        g = d_h + gradient[t]
        if plan.batch_norm == "output" and tape.deviations is not None:
            g = _normalise_backward(g, tape.hs[t], tape.deviations[t, 0])
        d_states = wiring.output_backward(states, g)
        for node in range(plan.n_nodes, -1, -1):
            g = d_states[node]
            if plan.batch_norm == "nodes" and tape.deviations is not None:
                g = _normalise_backward(g, states[node], tape.deviations[t, node])
            if node == 0:
                d_h = wiring.gate_backward(0, tape.pre_input[t][None], previous[None], g)[0]
                continue
            pre = tape.pre[node - 1][t]
            d_reads = wiring.gate_backward(node, pre, wiring.reads(states, node), g)
            back = _multiply(pre, x.w_nodes[wiring.rows(node)].transpose(-1, -2))
            wiring.add(d_states, node, _add_masked(d_reads, back, x.mask_h))
        if t > 0 or wants.state:
            d_h = _add_masked(d_h, tape.pre_input[t] @ x.w_input[h:].t(), x.mask_h)

    d_inputs = d_w_input = None
    if wants.inputs:
        d_inputs = _masked(_multiply(tape.pre_input, x.w_input[:h].t()), x.mask_x)
    if wants.w_input:
        history = torch.cat([x.state[None], tape.hs[:-1]])
        d_w_input = _over_time(torch.cat([_masked(x.inputs, x.mask_x), _masked(history, x.mask_h)], -1), tape.pre_input)
    d_w_nodes = _weight_gradients(wiring, x, tape) if wants.w_nodes else None
    d_state = d_h if wants.state else None
    return d_inputs, d_state, d_w_input, d_w_nodes, wiring.d_p_input, wiring.d_p_edges, wiring.d_shares


def _weight_gradients(wiring: Wiring, x: Arguments, tape: Tape) -> Tensor:
    """(M, H, 2H)."""
    result = torch.empty_like(x.w_nodes)
    for node, d_pre in enumerate(tape.pre, start=1):
        reads, rows = _masked(wiring.reads(tape.states, node), x.mask_h), wiring.rows(node)
        if isinstance(rows, int):
            result[rows] = _over_time(reads, d_pre)
        else:  # (T, L, B, .) -> (L, T B, .)
            by_edge = (v.transpose(0, 1).flatten(1, 2) for v in (reads, d_pre))
            result[rows] = next(by_edge).transpose(1, 2) @ next(by_edge)
    return result


# ------------------------------------------------------------------------------------------------ running


class Runner(Protocol):
    """Executes passes: immediately (`Eager`) or by replaying a recording (`graphs.Recorded`)."""

    def forward(self, plan: Plan, x: Arguments, wants: Wants) -> tuple[Tensor, Any]:
        """The result (T, B, H), which is the caller's to keep, and a ticket for `backward`."""
        ...

    def backward(
        self, plan: Plan, x: Arguments, ticket: Any, gradient: Tensor, wants: Wants
    ) -> tuple[Tensor | None, ...]:
        """Gradients in the order of `Wants`; `ticket` None: its tape was used up."""
        ...


class Eager:
    """Operation by operation."""

    def _forward(self, plan: Plan, x: Arguments, keep: bool) -> Tape:
        tape = lay_tape(plan, x.inputs.shape, keep, x.inputs.new_empty)
        forward(plan, x, tape)
        return tape

    def forward(self, plan: Plan, x: Arguments, wants: Wants) -> tuple[Tensor, Tape | None]:
        tape = self._forward(plan, x, any(wants))
        # a copy: the tape stays what it is whatever becomes of the result
        return tape.hs.clone(), tape if any(wants) else None

    def backward(
        self, plan: Plan, x: Arguments, ticket: Tape | None, gradient: Tensor, wants: Wants
    ) -> tuple[Tensor | None, ...]:
        return backward(plan, x, self._forward(plan, x, True) if ticket is None else ticket, gradient, wants)
