"""The recurrent cell over a whole segment in torch operations: forward, and backward by hand, of S seeds at once.

`reference` defines what is right; this is the same algebra for a device where launching a kernel costs more than most
kernels do. It runs anywhere, so that everything but the recording of graphs (`graphs.py`) is tested on a CPU:

    all time steps' input projections in one product, and every weight gradient in one product over all time steps;
    one product per time step and node: of a source with all its readers' weights where all seeds run one program, of a
    node's weight with all its predecessors in a mixture, of a node's weight with each seed's own source where programs
    differ from seed to seed;
    P s + sigmoid(c) (sum_k p_k f_k(a) - P s) for each edge, P the total weight of its operations.

Kept for backward: the products [c, a], the states, and the deviations of batch norm. Activations are computed again.
Backward writes the gradients of the products over the products, so a tape serves once.

Seeds share the shapes and nothing else: no operation mixes values of two seeds, so each one's result is its solo run's.

Shapes: S seeds, T time, B batch, H width, N nodes after node 0, M weights of nodes, E edges (see `reference`), L edges
into one node, R readers of a source, K operation codes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from lmnas.core.errors import UserError, nearest
from lmnas.nn.kernels.reference import _FUNCTIONS, OPS, BatchNorm, Program, first_edge

Products = Literal["full", "bf16"]
"""`bf16` rounds the operands of a path's products to bfloat16 where it runs in float32; sums, results and states stay
float32."""

EPSILON = 1e-5
"""Of batch norm, as in `reference.normalise`."""

_products: Products = "full"
_compiled = False


def set_products(products: Products) -> None:
    """Choose for this process how precisely a path multiplies (a mixture always in full: batch norm at the small
    initial weights turns bfloat16 gradients into noise).

    Raises:
        UserError: unknown.
    """
    global _products
    if products not in get_args(Products):
        raise UserError(f"products {products!r} are unknown. {nearest(products, get_args(Products))}")
    _products = products


def set_compiled(compiled: bool) -> None:
    """Whether `torch.compile` fuses what stands between two products; every new shape costs seconds once."""
    global _compiled
    _compiled = compiled


@dataclass(frozen=True)
class Plan:
    """What a segment computes, shapes and values apart: with them, the key of a recorded graph.

    Attributes:
        kind: `mixture`; `path`, one program for all seeds; or `paths`, each seed's program given as values.
        program: of a `path`.
        per_edge: whether every edge of a mixture has its own weight.
    """

    kind: Literal["mixture", "path", "paths"]
    n_nodes: int
    batch_norm: BatchNorm
    program: Program | None = None
    per_edge: bool = False
    products: Products = "full"
    compiled: bool = False

    def readers(self) -> list[list[int]]:
        """Nodes that read source 0..N of a `path`."""
        assert self.program is not None
        readers: list[list[int]] = [[] for _ in range(self.n_nodes + 1)]
        for node, source in enumerate(self.program.inputs, start=1):
            readers[source].append(node)
        return readers


class Arguments(NamedTuple):
    """The values a segment reads; None where its kind has no such thing.

    Attributes:
        inputs: (S, T, B, H).
        state: (S, B, H).
        w_input: (S, 2H, 2H).
        w_nodes: (S, M, H, 2H).
        p_input: (S, K), weights of node 0's operations; one-hot for `paths`.
        p_edges: (S, E, K); (S, N, K), one-hot, for `paths`.
        shares: (S, N + 1), weights of the nodes in h_t; None for `path`.
        sources: (S, N) int64 for `paths`: the node that node 1..N reads.
        mask_x, mask_h: (S, B, H).
    """

    inputs: Tensor
    state: Tensor
    w_input: Tensor
    w_nodes: Tensor
    p_input: Tensor | None
    p_edges: Tensor | None
    shares: Tensor | None
    sources: Tensor | None
    mask_x: Tensor | None
    mask_h: Tensor | None


class Wants(NamedTuple):
    """Which gradients are wanted, in the order of `Arguments`."""

    inputs: bool = False
    state: bool = False
    w_input: bool = False
    w_nodes: bool = False
    p_input: bool = False
    p_edges: bool = False
    shares: bool = False


class Tape(NamedTuple):
    """What forward writes and backward reads. T' is T, or 1 where nothing is kept.

    Time comes first: what a step reads lies together and looks the same in segments of every length.

    Attributes:
        pre_input: (T, S, B, 2H), [c, a] of node 0.
        pre: [c, a] of the other nodes: by source (T', S, B, R 2H) for a `path`, else by node (T', S, L, B, 2H).
        states: (T', S, N + 1, B, H).
        deviations: (T', S, N + 1, H) with batch norm of nodes, (T', S, 1, H) of the output.
        hs: (T, S, B, H).
    """

    pre_input: Tensor
    pre: tuple[Tensor | None, ...]
    states: Tensor
    deviations: Tensor | None
    hs: Tensor


Allocate = Callable[[tuple[int, ...]], Tensor]


def lay_tape(plan: Plan, shape: Sequence[int], keep: bool, allocate: Allocate) -> Tape:
    """A tape for inputs of `shape` (S, T, B, H), its parts taken from `allocate` in a fixed order."""
    s, t, b, h = shape
    kept, n = t if keep else 1, plan.n_nodes
    pre: list[Tensor | None]
    if plan.kind == "path":
        pre = [allocate((kept, s, b, len(readers) * 2 * h)) if readers else None for readers in plan.readers()]
    else:
        widths = [i if plan.kind == "mixture" else 1 for i in range(1, n + 1)]
        pre = [None, *(allocate((kept, s, length, b, 2 * h)) for length in widths)]
    normalised = {"none": 0, "nodes": n + 1, "output": 1}[plan.batch_norm]
    return Tape(
        allocate((t, s, b, 2 * h)),
        tuple(pre),
        allocate((kept, s, n + 1, b, h)),
        allocate((kept, s, normalised, h)) if normalised else None,
        allocate((t, s, b, h)),
    )


# ------------------------------------------------------------------------------------------------ products


def _rounded(a: Tensor, products: Products) -> Tensor:
    return a.bfloat16() if products == "bf16" else a


def _multiply(a: Tensor, w: Tensor, products: Products) -> Tensor:
    """(S, R, I) times (S, I, O) for each seed. One seed takes the plain product, whose kernels are chosen better."""
    a, w = _rounded(a, products), _rounded(w, products)
    if products == "bf16" and a.device.type == "cuda":
        return torch.bmm(a, w, out_dtype=torch.float32)
    if products == "bf16":  # a product of two bfloat16 is exact in float32: these are the same sums
        a, w = a.float(), w.float()
    return torch.mm(a[0], w[0])[None] if len(a) == 1 else torch.bmm(a, w)


def _multiply_into(out: Tensor, a: Tensor, w: Tensor, products: Products, accumulate: bool = False) -> None:
    """out (S, R, O) = a w, or += it; no copy is made where `out` is a slice of a tape."""
    if products == "bf16":
        result = _multiply(a, w, products)
        _ = out.add_(result) if accumulate else out.copy_(result)
    elif len(a) == 1:
        _ = out[0].addmm_(a[0], w[0]) if accumulate else torch.mm(a[0], w[0], out=out[0])
    else:
        _ = out.baddbmm_(a, w) if accumulate else torch.bmm(a, w, out=out)


def _masked(states: Tensor, mask: Tensor | None) -> Tensor:
    """states (S, ..., B, H) times mask (S, B, H)."""
    if mask is None:
        return states
    return states * mask.view(mask.shape[0], *(1,) * (states.dim() - 3), *mask.shape[1:])


def _add_masked(x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """x + y * mask for x and y of (S, ..., B, H)."""
    if mask is None:
        return x + y
    return torch.addcmul(x, y, mask.view(mask.shape[0], *(1,) * (x.dim() - 3), *mask.shape[1:]))


# ------------------------------------------------------------------------------------------------ between products


# Each operation is a kernel: what exists as one (x + y z, a derivative times a gradient) is called as one.


def _derived(op: int, through: Tensor, a: Tensor, value: Tensor) -> Tensor:
    """through * f'(a), with value = f(a)."""
    if OPS[op] == "tanh":
        return torch.ops.aten.tanh_backward(through, value)
    if OPS[op] == "relu":
        return torch.ops.aten.threshold_backward(through, a, 0)
    if OPS[op] == "sigmoid":
        return torch.ops.aten.sigmoid_backward(through, value)
    return through


def gate(pre: Tensor, s: Tensor, op: int) -> Tensor:
    """s + sigmoid(c) * (f(a) - s) with pre = [c, a] of (S, B, 2H)."""
    c, a = pre.chunk(2, dim=-1)
    return torch.lerp(s, _FUNCTIONS[op](a), torch.sigmoid(c))


def gate_backward(pre: Tensor, s: Tensor, g: Tensor, op: int) -> Tensor:
    """The gradient of s; that of pre is written over it. g: of the output."""
    c, a = pre.chunk(2, dim=-1)
    value, sigma = _FUNCTIONS[op](a), torch.sigmoid(c)
    through = g * sigma
    dc = torch.ops.aten.sigmoid_backward(g * (value - s), sigma)
    a.copy_(_derived(op, through, a, value))
    c.copy_(dc)
    return g - through


def totals(p: Tensor) -> Tensor:
    """(S, L, K + 2, 1, 1): weights of operations, their sum, and the slope that does not depend on a."""
    return torch.cat([p, p.sum(-1, keepdim=True), p[..., :1] + p[..., 3:]], -1)[..., None, None]


def mixed(pre: Tensor, s: Tensor, w: Tensor) -> Tensor:
    """(S, B, H): sum_j P_j s_j + sigmoid(c_j) * (sum_k p_jk f_k(a_j) - P_j s_j) over the L edges into a node.

    Args:
        pre: (S, L, B, 2H).
        s: (S, L, B, H).
        w: `totals` of p (S, L, K).
    """
    c, a = pre.chunk(2, dim=-1)
    f = w[:, :, 0] * torch.tanh(a)
    f = torch.addcmul(f, w[:, :, 1], torch.relu(a))
    f = torch.addcmul(f, w[:, :, 2], torch.sigmoid(a))
    f = torch.addcmul(f, w[:, :, 3], a)
    edges = torch.lerp(w[:, :, 4] * s, f, torch.sigmoid(c))
    return edges[:, 0] if edges.shape[1] == 1 else edges.sum(1)


def mixed_backward(pre: Tensor, s: Tensor, w: Tensor, g: Tensor, wants_p: bool) -> tuple[Tensor, Tensor | None]:
    """The gradients of s (S, L, B, H) and p (S, L, K); that of pre is written over it. g: (S, B, H), of the output."""
    c, a = pre.chunk(2, dim=-1)
    g = g[:, None]
    tanh, relu, sigmoid, sigma = torch.tanh(a), torch.relu(a), torch.sigmoid(a), torch.sigmoid(c)
    weighted_tanh, weighted_sigmoid = w[:, :, 0] * tanh, w[:, :, 2] * sigmoid
    f = torch.addcmul(weighted_tanh + weighted_sigmoid, w[:, :, 1], relu)
    f = torch.addcmul(f, w[:, :, 3], a)
    through = g * sigma
    kept = g - through
    d_p = None
    if wants_p:
        values = torch.stack([(through * value).sum((2, 3)) for value in (tanh, relu, sigmoid, a)], -1)
        d_p = values + (kept * s).sum((2, 3))[..., None]
    # p_0 (1 - tanh^2) + p_1 [a > 0] + p_2 (sigmoid - sigmoid^2) + p_3
    slope = torch.addcmul(w[:, :, 5], weighted_tanh, tanh, value=-1)
    slope = torch.addcmul(slope + weighted_sigmoid, weighted_sigmoid, sigmoid, value=-1)
    slope = slope + torch.ops.aten.threshold_backward(w[:, :, 1].expand_as(a), a, 0)
    dc = torch.ops.aten.sigmoid_backward(g * torch.addcmul(f, w[:, :, 4], s, value=-1), sigma)
    a.copy_(through * slope)
    c.copy_(dc)
    return kept * w[:, :, 4], d_p


def normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Batch norm of (S, B, H) by each seed's own batch, and 1 / sqrt(variance + epsilon), (S, H)."""
    variance, mean = torch.var_mean(x, 1, correction=0)
    deviation = torch.rsqrt(variance + EPSILON)
    return (x - mean[:, None]) * deviation[:, None], deviation


def normalise_backward(g: Tensor, y: Tensor, deviation: Tensor) -> Tensor:
    """The gradient of x from that of y = normalise(x)."""
    centred = g - g.mean(1, keepdim=True)
    return deviation[:, None] * torch.addcmul(centred, y, (g * y).mean(1, keepdim=True), value=-1)


class _Pointwise:
    """The functions above, fused by `torch.compile` where a plan asks for it.

    The last node of an ENAS cell reads eleven others and the first reads one, each a shape of its own: more than the
    compiler takes for one function, so every shape is given a function of its own.
    """

    def __init__(self, compiled: bool):
        self.compiled = compiled

    def __call__(self, function: Callable, *arguments: Any) -> Any:
        if not self.compiled:
            return function(*arguments)
        shapes = tuple((v.shape, v.stride(), v.dtype) if isinstance(v, Tensor) else v for v in arguments)
        return _compile(function, shapes)(*arguments)


@cache
def _compile(function: Callable, shapes: tuple) -> Callable:
    # the compiler counts recompilations by code object
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(copy, dynamic=False, fullgraph=True)


# ------------------------------------------------------------------------------------------------ forward


def _packed(plan: Plan, w_nodes: Tensor) -> list[Tensor | None]:
    """By source of a `path`: the weights of its readers side by side, (S, H, R 2H)."""
    return [
        torch.cat([w_nodes[:, node - 1] for node in readers], dim=-1) if readers else None for readers in plan.readers()
    ]


def _slots(plan: Plan) -> list[int]:
    """Where node 1..N stands among the readers of its source."""
    assert plan.program is not None
    readers = plan.readers()
    return [readers[source].index(node) for node, source in enumerate(plan.program.inputs, start=1)]


def _source_rows(sources: Tensor, steps: int, nodes: int) -> Tensor:
    """(T', N, S): rows of states (T' S (N + 1), B, H) that node 1..N of each seed reads at each step."""
    first = torch.arange(len(sources) * steps, device=sources.device).view(steps, len(sources), 1) * nodes
    return (first + sources).transpose(1, 2).contiguous()


def _pieces(outputs: tuple[int, ...]) -> list[slice]:
    """Slices that make up these nodes and no others: those that do not count are not read, as they may be infinite.

    An index list would have to be sent to the device, which cannot be recorded.
    """
    if outputs == tuple(range(outputs[0], outputs[-1] + 1)):
        return [slice(outputs[0], outputs[-1] + 1)]
    return [slice(node, node + 1) for node in outputs]


def forward(plan: Plan, x: Arguments, tape: Tape) -> None:
    """Write h after every step into `tape.hs`."""
    s, t_all, b, h = x.inputs.shape
    keep = len(tape.states) == t_all
    run, nodes = _Pointwise(plan.compiled), plan.n_nodes + 1
    w_h = x.w_input[:, h:]
    # one product of (S, T B, .); for one seed the tape has that order already
    reads = _masked(x.inputs, x.mask_x).reshape(s, t_all * b, h)
    if s == 1:
        _multiply_into(tape.pre_input.view(1, t_all * b, 2 * h), reads, x.w_input[:, :h], plan.products)
    else:
        projected = _multiply(reads, x.w_input[:, :h], plan.products)
        tape.pre_input.copy_(projected.view(s, t_all, b, 2 * h).transpose(0, 1))
    if plan.kind == "path":
        packed, slots = _packed(plan, x.w_nodes), _slots(plan)
    else:
        w_first, w_edges = _weights(x)
    if plan.kind == "paths":
        assert x.sources is not None
        rows = _source_rows(x.sources, len(tape.states), nodes)
    # a node's masked state, for all that read it
    masked = None if x.mask_h is None or plan.kind != "mixture" else torch.empty_like(tape.states[0])

    def keep_state(k: int, node: int, value: Tensor) -> Tensor:
        state = tape.states[k, :, node]
        if plan.batch_norm == "nodes":
            assert tape.deviations is not None
            value, deviation = run(normalise, value)
            tape.deviations[k, :, node].copy_(deviation)
        return state.copy_(value)

    previous = x.state
    for t in range(t_all):
        k = t if keep else 0
        pre, states = tape.pre_input[t], tape.states[k]
        _multiply_into(pre, _masked(previous, x.mask_h), w_h, plan.products, accumulate=True)
        for node in range(nodes):
            if plan.kind == "path":
                assert plan.program is not None
                source = previous
                if node > 0:
                    source, product = states[:, plan.program.inputs[node - 1]], tape.pre[plan.program.inputs[node - 1]]
                    assert product is not None
                    pre = product[k, :, :, slots[node - 1] * 2 * h : (slots[node - 1] + 1) * 2 * h]
                state = keep_state(k, node, run(gate, pre, source, plan.program.ops[node]))
                weights, product = packed[node], tape.pre[node]
                if weights is not None and product is not None:
                    _multiply_into(product[k], _masked(state, x.mask_h), weights, plan.products)
                continue
            if node == 0:
                sources, pre, w = previous[:, None], pre[:, None], w_first
            else:
                product = tape.pre[node]
                assert product is not None
                pre = product[k]
                if plan.kind == "paths":
                    sources, w = tape.states.view(-1, b, h).index_select(0, rows[k, node - 1])[:, None], w_edges[node]
                    _multiply_into(pre[:, 0], _masked(sources[:, 0], x.mask_h), x.w_nodes[:, node - 1], plan.products)
                else:
                    first = first_edge(node)
                    sources, w = states[:, :node], w_edges[node]
                    read = sources if masked is None else masked[:, :node]
                    if plan.per_edge:
                        pre.copy_(read @ x.w_nodes[:, first : first + node])
                    else:
                        _multiply_into(pre.flatten(1, 2), read.flatten(1, 2), x.w_nodes[:, node - 1], plan.products)
            state = keep_state(k, node, run(mixed, pre, sources, w))
            if masked is not None and x.mask_h is not None:
                torch.mul(state, x.mask_h, out=masked[:, node])
        if plan.kind == "path":
            assert plan.program is not None
            pieces = [states[:, piece] for piece in _pieces(plan.program.outputs)]
            value = (pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)).mean(1)
        else:
            assert x.shares is not None
            value = torch.bmm(x.shares[:, None], states.flatten(2)).view(s, b, h)
        if plan.batch_norm == "output":
            assert tape.deviations is not None
            value, deviation = run(normalise, value)
            tape.deviations[k, :, 0].copy_(deviation)
        previous = tape.hs[t].copy_(value)


def _weights(x: Arguments) -> tuple[Tensor, list[Tensor]]:
    """`totals` of node 0, and by node 1..N (the first is not used)."""
    assert x.p_input is not None and x.p_edges is not None
    everything = totals(x.p_edges)
    if x.sources is not None:
        return totals(x.p_input[:, None]), [everything, *everything.split(1, 1)]
    n_nodes = 0
    while first_edge(n_nodes + 1) < x.p_edges.shape[1]:
        n_nodes += 1
    return totals(x.p_input[:, None]), [everything, *everything.split(list(range(1, n_nodes + 1)), 1)]


# ------------------------------------------------------------------------------------------------ backward


def backward(plan: Plan, x: Arguments, tape: Tape, gradient: Tensor, wants: Wants) -> tuple[Tensor | None, ...]:
    """Gradients in the order of `Wants`, None where not wanted. Uses the tape up.

    Args:
        gradient: (S, T, B, H), of the result.
    """
    s, t_all, b, h = x.inputs.shape
    run, nodes = _Pointwise(plan.compiled), plan.n_nodes + 1
    wants_p = wants.p_input or wants.p_edges
    w_h_back = x.w_input[:, h:].transpose(1, 2)
    d_p_input = None if x.p_input is None else torch.zeros_like(x.p_input)
    d_p_edges = None if x.p_edges is None else torch.zeros_like(x.p_edges)
    d_shares = None if x.shares is None else torch.zeros_like(x.shares)
    if plan.kind == "path":
        packed, slots = _packed(plan, x.w_nodes), _slots(plan)
    else:
        w_first, w_edges = _weights(x)
    if plan.kind == "paths":
        assert x.sources is not None
        rows = _source_rows(x.sources, t_all, nodes)

    d_h = torch.zeros_like(x.state)
    for t in range(t_all - 1, -1, -1):
        states = tape.states[t]
        g = d_h + gradient[:, t]
        if plan.batch_norm == "output":
            assert tape.deviations is not None
            g = run(normalise_backward, g, tape.hs[t], tape.deviations[t, :, 0])
        if plan.kind == "path":
            assert plan.program is not None
            outputs = plan.program.outputs
            d_states = states.new_zeros(s, nodes, b, h)
            share = (g / len(outputs))[:, None]
            for piece in _pieces(outputs):
                d_states[:, piece] = share
        else:
            assert x.shares is not None and d_shares is not None
            d_states = x.shares[:, :, None, None] * g[:, None]
            if wants.shares:
                d_shares += torch.bmm(states.flatten(2), g.flatten(1)[..., None])[..., 0]

        previous = x.state if t == 0 else tape.hs[t - 1]
        for node in range(nodes - 1, -1, -1):
            g = d_states[:, node]
            if plan.kind == "path" and packed[node] is not None:
                weights, product = packed[node], tape.pre[node]
                assert weights is not None and product is not None
                g = _add_masked(g, _multiply(product[t], weights.transpose(1, 2), plan.products), x.mask_h)
            if plan.batch_norm == "nodes":
                assert tape.deviations is not None
                g = run(normalise_backward, g, states[:, node], tape.deviations[t, :, node])
            if plan.kind == "path":
                assert plan.program is not None
                op = plan.program.ops[node]
                if node == 0:
                    d_h = run(gate_backward, tape.pre_input[t], previous, g, op)
                    continue
                source, slot = plan.program.inputs[node - 1], slots[node - 1]
                product = tape.pre[source]
                assert product is not None
                pre = product[t, :, :, slot * 2 * h : (slot + 1) * 2 * h]
                d_states[:, source] += run(gate_backward, pre, states[:, source], g, op)
                continue
            assert d_p_input is not None and d_p_edges is not None
            if node == 0:
                d_sources, d_p = run(mixed_backward, tape.pre_input[t][:, None], previous[:, None], w_first, g, wants_p)
                d_h = d_sources[:, 0]
                if d_p is not None:
                    d_p_input += d_p[:, 0]
                continue
            product = tape.pre[node]
            assert product is not None
            pre = product[t]
            if plan.kind == "paths":
                sources = tape.states.view(-1, b, h).index_select(0, rows[t, node - 1])[:, None]
                d_sources, _ = run(mixed_backward, pre, sources, w_edges[node], g, False)
                back = _multiply(pre[:, 0], x.w_nodes[:, node - 1].transpose(1, 2), plan.products)
                # each row at most once: the order of additions is fixed
                d_states.view(-1, b, h).index_add_(0, rows[0, node - 1], _add_masked(d_sources[:, 0], back, x.mask_h))
                continue
            first = first_edge(node)
            d_sources, d_p = run(mixed_backward, pre, states[:, :node], w_edges[node], g, wants_p)
            if d_p is not None:
                d_p_edges[:, first : first + node] += d_p
            if plan.per_edge:
                back = pre @ x.w_nodes[:, first : first + node].transpose(-1, -2)
            else:
                back = _multiply(pre.flatten(1, 2), x.w_nodes[:, node - 1].transpose(1, 2), plan.products)
                back = back.view(s, node, b, h)
            d_states[:, :node] += _add_masked(d_sources, back, x.mask_h)
        if t > 0 or wants.state:
            d_h = _add_masked(d_h, _multiply(tape.pre_input[t], w_h_back, plan.products), x.mask_h)

    d_pre = tape.pre_input.transpose(0, 1)
    d_inputs = d_w_input = d_w_nodes = None
    if wants.inputs:
        d_inputs = _multiply(d_pre.reshape(s, t_all * b, 2 * h), x.w_input[:, :h].transpose(1, 2), plan.products).view(
            s, t_all, b, h
        )
        d_inputs = _masked(d_inputs, x.mask_x)
    if wants.w_input:
        history = torch.cat([x.state[:, None], tape.hs[:-1].transpose(0, 1)], 1)
        reads = torch.cat([_masked(x.inputs, x.mask_x), _masked(history, x.mask_h)], -1)
        d_w_input = _over_time(reads, d_pre, plan.products)
    if wants.w_nodes:
        d_w_nodes = _weight_gradients(plan, x, tape)
    return (
        d_inputs,
        d_h if wants.state else None,
        d_w_input,
        d_w_nodes,
        d_p_input if wants.p_input else None,
        d_p_edges if wants.p_edges else None,
        d_shares if wants.shares else None,
    )


def _over_time(reads: Tensor, d_pre: Tensor, products: Products) -> Tensor:
    """(S, I, O): sum over everything but seeds of reads (S, ..., I) times d_pre (S, ..., O)."""
    seeds = len(reads)
    rows = reads.reshape(seeds, -1, reads.shape[-1]).transpose(1, 2)
    return _multiply(rows, d_pre.reshape(seeds, -1, d_pre.shape[-1]), products)


def _weight_gradients(plan: Plan, x: Arguments, tape: Tape) -> Tensor:
    """(S, M, H, 2H)."""
    s, t_all, b, h = x.inputs.shape
    result = torch.empty_like(x.w_nodes)
    states = tape.states.transpose(0, 1)
    if plan.kind == "path":
        for source, readers in enumerate(plan.readers()):
            product = tape.pre[source]
            if product is None:
                continue
            reads = _masked(states[:, :, source], x.mask_h)
            whole = _over_time(reads, product.transpose(0, 1), plan.products)
            for slot, node in enumerate(readers):
                result[:, node - 1] = whole[..., slot * 2 * h : (slot + 1) * 2 * h]
        return result
    if plan.kind == "paths":
        assert x.sources is not None
        rows = _source_rows(x.sources, t_all, plan.n_nodes + 1)
    for node in range(1, plan.n_nodes + 1):
        product = tape.pre[node]
        assert product is not None
        d_pre = product.transpose(0, 1)
        if plan.kind == "paths":
            reads = tape.states.view(-1, b, h).index_select(0, rows[:, node - 1].t().flatten())
            reads = _masked(reads.view(s, t_all, b, h), x.mask_h)
            result[:, node - 1] = _over_time(reads, d_pre, plan.products)
        elif plan.per_edge:
            reads = _masked(states[:, :, :node], x.mask_h).transpose(1, 2).reshape(s, node, t_all * b, h)
            d_pre = d_pre.transpose(1, 2).reshape(s, node, t_all * b, 2 * h)
            result[:, first_edge(node) : first_edge(node + 1)] = reads.transpose(-1, -2) @ d_pre
        else:
            reads = _masked(states[:, :, :node], x.mask_h)
            result[:, node - 1] = _over_time(reads, d_pre, plan.products)
    return result


# ------------------------------------------------------------------------------------------------ running


class Runner(Protocol):
    """How forward and backward are executed: at once (`Eager`), or by replaying a recording (`graphs.Recorded`)."""

    def forward(self, plan: Plan, x: Arguments, wants: Wants) -> tuple[Tensor, Any]:
        """The result, which is the caller's to keep, and a ticket for `backward`."""
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
        return result_of(tape), tape if any(wants) else None

    def backward(
        self, plan: Plan, x: Arguments, ticket: Tape | None, gradient: Tensor, wants: Wants
    ) -> tuple[Tensor | None, ...]:
        return backward(plan, x, self._forward(plan, x, True) if ticket is None else ticket, gradient, wants)


def result_of(tape: Tape) -> Tensor:
    """(S, T, B, H), a copy: the tape stays what it is whatever becomes of the result."""
    return tape.hs.transpose(0, 1).clone(memory_format=torch.contiguous_format)


class _Segment(torch.autograd.Function):
    @staticmethod
    def forward(context, runner: Runner, plan: Plan, sources, mask_x, mask_h, *tensors) -> Tensor:
        x = Arguments._make((*tensors, sources, mask_x, mask_h))
        wants = Wants(*context.needs_input_grad[5:])
        hs, ticket = runner.forward(plan, x, wants)
        if any(wants):
            context.runner, context.plan, context.wants, context.ticket = runner, plan, wants, ticket
            context.save_for_backward(*x)  # also notices weights that were changed in place
        return hs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient: Tensor):
        x = Arguments._make(None if value is None else value.detach() for value in context.saved_tensors)
        ticket, context.ticket = context.ticket, None  # a graph that is retained comes again
        return (None,) * 5 + context.runner.backward(context.plan, x, ticket, gradient, context.wants)


def run(runner: Runner, plan: Plan, x: Arguments) -> Tensor:
    """(S, T, B, H), differentiable once."""
    *tensors, sources, mask_x, mask_h = (None if value is None else value.contiguous() for value in x)
    if not torch.is_grad_enabled():  # autograd would tell `forward` that gradients are needed all the same
        tensors = [None if value is None else value.detach() for value in tensors]
    return _Segment.apply(runner, plan, sources, mask_x, mask_h, *tensors)


def recurrent_path_many(
    inputs: Tensor,
    state: Tensor,
    w_input: Tensor,
    w_nodes: Sequence[Tensor],
    programs: Program | Sequence[Program],
    mask_x: Tensor | None = None,
    mask_h: Tensor | None = None,
    batch_norm: BatchNorm = "none",
    runner: Runner | None = None,
) -> Tensor:
    """`reference.recurrent_path` of S seeds.

    Args:
        inputs: (S, T, B, H).
        state: (S, B, H).
        w_input: (S, 2H, 2H).
        w_nodes: N of (S, H, 2H).
        programs: one for all seeds; or one for each, of equal numbers of nodes. Those are values to a recorded graph,
            so that paths sampled anew at every step need no new recording.
        mask_x, mask_h: (S, B, H).

    Returns:
        (S, T, B, H).

    Raises:
        ValueError: not S programs, or of different numbers of nodes.
    """
    stacked = torch.stack(list(w_nodes), 1)
    runner = runner or Eager()
    products: Products = _products if inputs.dtype == torch.float32 else "full"
    if isinstance(programs, Program):
        plan = Plan("path", len(programs.inputs), batch_norm, programs, products=products, compiled=_compiled)
        return run(runner, plan, Arguments(inputs, state, w_input, stacked, None, None, None, None, mask_x, mask_h))
    lengths = {len(program.inputs) for program in programs}
    if len(programs) != len(inputs) or len(lengths) != 1:
        raise ValueError(f"{len(programs)} programs of {sorted(lengths)} nodes for {len(inputs)} seeds")
    n_nodes = lengths.pop()
    values = torch.zeros(len(programs), n_nodes + 1, len(OPS) + 1, dtype=torch.float64)  # made on the CPU, sent once
    for row, program in enumerate(programs):
        for node, op in enumerate(program.ops):
            values[row, node, op] = 1.0
        values[row, list(program.outputs), -1] = 1.0 / len(program.outputs)
    sources = torch.tensor([program.inputs for program in programs]).to(inputs.device, non_blocking=True)
    values = values.to(inputs.device, inputs.dtype, non_blocking=True)
    ops, shares = values[..., :-1], values[..., -1]
    plan = Plan("paths", n_nodes, batch_norm, products=products, compiled=_compiled)
    x = Arguments(inputs, state, w_input, stacked, ops[:, 0], ops[:, 1:], shares, sources, mask_x, mask_h)
    return run(runner, plan, x)


def recurrent_mixture_many(
    inputs: Tensor,
    state: Tensor,
    w_input: Tensor,
    w_nodes: Sequence[Tensor],
    p_input: Tensor,
    p_edges: Tensor,
    output_weights: Tensor,
    mask_x: Tensor | None = None,
    mask_h: Tensor | None = None,
    batch_norm: BatchNorm = "none",
    runner: Runner | None = None,
) -> Tensor:
    """`reference.recurrent_mixture` of S seeds.

    Args:
        inputs: (S, T, B, H).
        state: (S, B, H).
        w_input: (S, 2H, 2H).
        w_nodes: N, or one per edge, of (S, H, 2H).
        p_input: (S, K).
        p_edges: (S, E, K).
        output_weights: (S, N + 1).
        mask_x, mask_h: (S, B, H).

    Returns:
        (S, T, B, H).
    """
    n_nodes = output_weights.shape[1] - 1
    plan = Plan("mixture", n_nodes, batch_norm, per_edge=len(w_nodes) != n_nodes, compiled=_compiled)
    stacked = torch.stack(list(w_nodes), 1)
    x = Arguments(inputs, state, w_input, stacked, p_input, p_edges, output_weights, None, mask_x, mask_h)
    return run(runner or Eager(), plan, x)


def recurrent_path(
    inputs: Tensor,
    state: Tensor,
    w_input: Tensor,
    w_nodes: Sequence[Tensor],
    program: Program,
    mask_x: Tensor | None = None,
    mask_h: Tensor | None = None,
    batch_norm: BatchNorm = "none",
    runner: Runner | None = None,
    sampled: bool = False,
) -> Tensor:
    """`reference.recurrent_path`, differentiable once.

    Args:
        sampled: the next call will have another program: take it as a value.
    """
    return recurrent_path_many(
        inputs[None],
        state[None],
        w_input[None],
        [weight[None] for weight in w_nodes],
        [program] if sampled else program,
        _one(mask_x),
        _one(mask_h),
        batch_norm,
        runner,
    )[0]


def recurrent_mixture(
    inputs: Tensor,
    state: Tensor,
    w_input: Tensor,
    w_nodes: Sequence[Tensor],
    p_input: Tensor,
    p_edges: Tensor,
    output_weights: Tensor,
    mask_x: Tensor | None = None,
    mask_h: Tensor | None = None,
    batch_norm: BatchNorm = "none",
    runner: Runner | None = None,
) -> Tensor:
    """`reference.recurrent_mixture`, differentiable once."""
    return recurrent_mixture_many(
        inputs[None],
        state[None],
        w_input[None],
        [weight[None] for weight in w_nodes],
        p_input[None],
        p_edges[None],
        output_weights[None],
        _one(mask_x),
        _one(mask_h),
        batch_norm,
        runner,
    )[0]


def _one(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor[None]
