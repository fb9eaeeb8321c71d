"""The recursion through time for the switches of the recurrent supernet: curvature for about the price of a gradient.

After Botev, Ritter & Barber (2017), "Practical Gauss-Newton optimisation for deep learning": a backward sweep carries,
beside every gradient dE/ds, the diagonal of the second derivative by s. One edge from s to the node s' = ... + v, with
the gates of `lmnas.nn.kernels.reference`, is

    v = P s + c ∘ (g - P s),   c = σ(ĉ),  g = Σ_o w_o f_o(â),  P = Σ_o w_o,   [ĉ, â] = s [M_c, M_h]

and with q the diagonal of the second derivative by s', δ the gradient by it, c_1 = c (1 - c), a = c g',
b = c_1 (g - P s), d = P (1 - c), and m, ρ the diagonals of M_h, M_c, it hands to s

    M_h^∘2 (a² q + c g'' δ) + 2 (M_h∘M_c) (a b q + c_1 g' δ) + M_c^∘2 (b² q + c_1 (1 - 2c) (g - P s) δ)
      + d² q + 2 d (a m + b ρ) q - 2 P c_1 ρ δ,

which is exact where the second derivative by s' is a diagonal matrix. All operations of an edge go through at once, so
the terms between them are kept. A switch w_e of the operation's output u_e has Σ u_e² q.

Left out, with an error of either sign: what is off the diagonals (width > 1), what couples several readers of one
state (forks), and what couples two time steps of one switch (switches are tied over time). Exact, therefore, for one
step of a cell of width 1 whose nodes form a chain; over several steps it then is the trace of the Hessian of switches
that are free at every step.

Shapes: T time, B batch, H width, V vocabulary, N nodes after node 0, E edges, K operations, R = E + 1 edges with the
one from h_{t-1} into node 0 first.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lmnas.nn.kernels import OPS, first_edge

Head = Callable[[Tensor], tuple[Tensor, Tensor]]
"""(T, B, H) outputs of the cell -> gradient of the loss by each, and diagonal of its second derivative, as large."""
TANH, RELU, SIGMOID, IDENTITY = (OPS.index(name) for name in ("tanh", "relu", "sigmoid", "identity"))
HEAD_ELEMENTS = 2_000_000
"""Logits held at once."""


class CellCurvature(NamedTuple):
    """Second derivatives: `input` (K,), `edges` (E, K), and the diagonal by the carried state, (B, H)."""

    input: Tensor
    edges: Tensor
    state: Tensor


def softmax_head(weight: Tensor, bias: Tensor | None, targets: Tensor) -> Head:
    """Head of the mean cross-entropy of a linear layer, its curvature exact: [(W∘W)^T p - (W^T p)∘(W^T p)] / (T B).

    Args:
        weight: (V, H).
        bias: (V,) or None.
        targets: (T, B).
    """

    def head(hs: Tensor) -> tuple[Tensor, Tensor]:
        width = hs.shape[-1]
        hidden, labels = hs.reshape(-1, width), targets.flatten()
        gradient, curvature = torch.empty_like(hidden), torch.empty_like(hidden)
        both = torch.cat([weight, weight.square()], dim=1)
        rows = max(1, HEAD_ELEMENTS // len(weight))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            p = F.linear(hidden[part], weight, bias).softmax(-1)
            mean, square = (p @ both).split(width, dim=1)
            gradient[part] = mean - weight[labels[part]]
            curvature[part] = square - mean.square()
        count = len(hidden)
        return (gradient / count).view_as(hs), (curvature / count).view_as(hs)

    return head


class _Edges:
    """The weights of all edges, arranged for both sweeps; edges of one node stand together, node 0's first."""

    def __init__(self, w_hidden: Tensor, w_nodes: Sequence[Tensor], p_input: Tensor, p_edges: Tensor, n_nodes: int):
        width = len(w_hidden)
        per_edge = len(w_nodes) != n_nodes
        # (i, H, 2H) where every edge has its own weights, (H, 2H) where a node's edges share them
        self.forward = [w_hidden] + [
            torch.stack(list(w_nodes[first_edge(i) : first_edge(i + 1)])) if per_edge else w_nodes[i - 1]
            for i in range(1, n_nodes + 1)
        ]
        self.rows = [slice(0, 1)] + [slice(1 + first_edge(i), 1 + first_edge(i + 1)) for i in range(1, n_nodes + 1)]
        self.mixture = torch.cat([p_input[None], p_edges])  # (R, K)
        self.columns = [self.mixture[:, k, None, None] for k in range(len(OPS))]
        self.mass = self.mixture.sum(1)[:, None, None]
        self.gradient, self.curvature = [], []
        m: list[Tensor] = []
        rho: list[Tensor] = []
        for i, weight in enumerate(self.forward):
            m_c, m_h = weight.transpose(-1, -2).split(width, dim=-2)  # (..., H out, H in)
            self.gradient.append(weight.transpose(-1, -2))
            self.curvature.append(torch.cat([m_h.square(), 2 * m_h * m_c, m_c.square()], dim=-2))
            for found, matrix in ((m, m_h), (rho, m_c)):
                found.append(matrix.diagonal(dim1=-2, dim2=-1).expand(max(i, 1), width))
        self.m, self.rho = torch.cat(m)[:, None], torch.cat(rho)[:, None]  # (R, 1, H)
        device = w_hidden.device
        # sources among [h_{t-1}, s_0, ..., s_N], targets among [s_0, ..., s_N]
        self.sources = torch.tensor([0] + [1 + j for i in range(1, n_nodes + 1) for j in range(i)], device=device)
        self.targets = torch.tensor([0] + [i for i in range(1, n_nodes + 1) for _ in range(i)], device=device)


def _add_product(total: Tensor, rows: Tensor, matrix: Tensor) -> None:
    """total (i, B, H) += rows (i, B, n) @ matrix, (n, H) or (i, n, H)."""
    if matrix.dim() == 2:
        total.view(-1, total.shape[-1]).addmm_(rows.flatten(0, 1), matrix)
    else:
        total.baddbmm_(rows, matrix)


class _Kept(NamedTuple):
    """Values of a forward pass kept for the sweeps back: `states` (T, N + 2, B, H) are h_{t-1}, s_0, ..., s_N, `gates`
    (T, R, B, 2H) are [c, â], the rest (T, R, B, H) tanh(â), σ(â) and g - P s; `hs` (T, B, H)."""

    states: Tensor
    gates: Tensor
    tanh: Tensor
    sigmoid: Tensor
    gap: Tensor
    hs: Tensor


def _forward(inputs: Tensor, state: Tensor, w_input: Tensor, edges: _Edges, output_weights: Tensor) -> _Kept:
    steps, batch, width = inputs.shape
    n_nodes, n_rows = len(output_weights) - 1, len(edges.mixture)
    x_projection = inputs @ w_input[:width]
    states = inputs.new_empty(steps, n_nodes + 2, batch, width)
    gates = inputs.new_empty(steps, n_rows, batch, 2 * width)
    tanh, sigmoid, gap = (inputs.new_empty(steps, n_rows, batch, width) for _ in range(3))
    hs = torch.empty_like(inputs)
    h = state
    for t in range(steps):
        states[t, 0] = h
        for i, rows in enumerate(edges.rows):
            s = states[t, 0:1] if i == 0 else states[t, 1 : i + 1]
            gate = gates[t, rows]
            if edges.forward[i].dim() == 2:
                torch.mm(s.view(-1, width), edges.forward[i], out=gate.view(-1, 2 * width))
            else:
                torch.bmm(s, edges.forward[i], out=gate)
            if i == 0:
                gate += x_projection[t]
            c, a = gate.split(width, dim=-1)
            c.sigmoid_()
            weights = [column[rows] for column in edges.columns]
            g = torch.tanh(a, out=tanh[t, rows]) * weights[TANH]
            g.addcmul_(torch.sigmoid(a, out=sigmoid[t, rows]), weights[SIGMOID])
            g.addcmul_(a.relu(), weights[RELU]).addcmul_(a, weights[IDENTITY])
            carried = s * edges.mass[rows]
            torch.sub(g, carried, out=gap[t, rows])
            torch.sum(carried.addcmul_(c, gap[t, rows]), dim=0, out=states[t, i + 1])
        h = torch.mv(states[t, 1:].view(n_nodes + 1, -1).t(), output_weights).view(batch, width)
        hs[t] = h
    return _Kept(states, gates, tanh, sigmoid, gap, hs)


@torch.no_grad()
def recurrent_diagonal(
    inputs: Tensor,
    state: Tensor,
    w_input: Tensor,
    w_nodes: Sequence[Tensor],
    p_input: Tensor,
    p_edges: Tensor,
    output_weights: Tensor,
    head: Head,
) -> CellCurvature:
    """The recursion over one segment of `kernels.recurrent_mixture` without dropout or batch norm.

    Args:
        inputs, state, w_input, w_nodes, p_input, p_edges, output_weights: as there.
        head: the loss behind the cell; separable over T and B.

    The state is a constant, and what lies before the segment does not count (truncated BPTT).
    """
    steps, batch, width = inputs.shape
    n_nodes = len(output_weights) - 1
    edges = _Edges(w_input[width:], w_nodes, p_input, p_edges, n_nodes)
    n_rows = len(edges.mixture)

    states, gates, tanh, sigmoid, gap, hs = _forward(inputs, state, w_input, edges, output_weights)
    head_gradient, head_curvature = head(hs)
    shares = output_weights[:, None, None]
    found = torch.zeros_like(edges.mixture)
    later_gradient, later_curvature = (torch.zeros_like(state)[None] for _ in range(2))
    by_delta = inputs.new_empty(n_rows, batch, 7, width)
    by_q = inputs.new_empty(n_rows, batch, 4, width)
    w = edges.columns
    for t in reversed(range(steps)):
        # everything that does not wait for the sweep, all edges at once
        c, a = gates[t].split(width, dim=-1)
        tanh_1 = 1 - tanh[t].square()
        sigmoid_1 = sigmoid[t] * (1 - sigmoid[t])
        g_1 = (tanh_1 * w[TANH]).addcmul_(sigmoid_1, w[SIGMOID]).addcmul_((a > 0).to(a), w[RELU]).add_(w[IDENTITY])
        g_2 = sigmoid_1.mul_(1 - 2 * sigmoid[t]).mul_(w[SIGMOID])
        g_2.addcmul_(tanh_1.mul_(tanh[t]), w[TANH], value=-2)
        c_1 = c * (1 - c)
        along_h, along_c, direct = by_delta[:, :, 5], by_delta[:, :, 4], by_delta[:, :, 6]
        torch.mul(c, g_1, out=along_h)  # a
        torch.mul(c_1, gap[t], out=along_c)  # b
        torch.mul(1 - c, edges.mass, out=direct)  # d
        torch.mul(c, g_2, out=by_delta[:, :, 0])
        torch.mul(c_1, g_1, out=by_delta[:, :, 1])
        torch.mul(along_c, 1 - 2 * c, out=by_delta[:, :, 2])
        torch.mul(c_1, -2 * edges.mass * edges.rho, out=by_delta[:, :, 3])
        torch.mul(along_h, along_h, out=by_q[:, :, 0])
        torch.mul(along_h, along_c, out=by_q[:, :, 1])
        torch.mul(along_c, along_c, out=by_q[:, :, 2])
        both = (along_h * edges.m).addcmul_(along_c, edges.rho)
        torch.mul(direct, both.mul_(2).add_(direct), out=by_q[:, :, 3])

        gradients = shares * (head_gradient[t] + later_gradient)  # (N + 1, B, H), of s_0, ..., s_N
        curvatures = shares.square() * (head_curvature[t] + later_curvature)
        later_gradient, later_curvature = torch.zeros_like(later_gradient), torch.zeros_like(later_curvature)
        for i in reversed(range(n_nodes + 1)):
            rows = edges.rows[i]
            z = by_delta[rows] * gradients[i, :, None]
            z[:, :, :4].addcmul_(by_q[rows], curvatures[i, :, None])
            to_curvature = curvatures[:i] if i > 0 else later_curvature
            to_gradient = gradients[:i] if i > 0 else later_gradient
            flat = z.flatten(2)
            _add_product(to_curvature, flat[..., : 3 * width], edges.curvature[i])
            to_curvature += z[:, :, 3]
            _add_product(to_gradient, flat[..., 4 * width : 6 * width], edges.gradient[i])
            to_gradient += z[:, :, 6]

        kept = states[t][edges.sources].mul_(1 - c)
        q = curvatures[edges.targets].view(n_rows, -1, 1)
        for k, f in ((TANH, tanh[t]), (SIGMOID, sigmoid[t]), (RELU, a.relu()), (IDENTITY, a)):
            u = torch.addcmul(kept, c, f).square_()
            found[:, k] += torch.bmm(u.view(n_rows, 1, -1), q)[:, 0, 0]
    return CellCurvature(found[0], found[1:], later_curvature[0])


@torch.no_grad()
def recurrent_squared_gradients(
    inputs: Tensor,
    state: Tensor,
    w_input: Tensor,
    w_nodes: Sequence[Tensor],
    p_input: Tensor,
    p_edges: Tensor,
    output_weights: Tensor,
    gradient: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Squared gradient of each sequence by the mixture, summed over sequences: (K,) and (E, K).

    One sweep instead of a pass a sequence: of each gradient only the inner products with the operations' outputs are
    kept, (R, K, B).

    Args:
        inputs, state, w_input, w_nodes, p_input, p_edges, output_weights: as in `recurrent_diagonal`.
        gradient: (T, B, H) outputs of the cell -> gradient of the function by them.
    """
    width = inputs.shape[-1]
    n_nodes = len(output_weights) - 1
    edges = _Edges(w_input[width:], w_nodes, p_input, p_edges, n_nodes)
    kept = _forward(inputs, state, w_input, edges, output_weights)
    outer = gradient(kept.hs)
    shares = output_weights[:, None, None]
    found = inputs.new_zeros(len(OPS), len(edges.mixture), inputs.shape[1])
    later = torch.zeros_like(state)[None]
    by_delta = inputs.new_empty(len(edges.mixture), inputs.shape[1], 3, width)
    w = edges.columns
    for t in reversed(range(len(inputs))):
        c, a = kept.gates[t].split(width, dim=-1)
        tanh, sigmoid = kept.tanh[t], kept.sigmoid[t]
        g_1 = ((a > 0).to(a) * w[RELU]).add_(w[IDENTITY] + w[TANH])
        g_1.addcmul_(tanh.square(), w[TANH], value=-1).addcmul_(sigmoid * (1 - sigmoid), w[SIGMOID])
        stay = 1 - c
        torch.mul(c * stay, kept.gap[t], out=by_delta[:, :, 0])
        torch.mul(c, g_1, out=by_delta[:, :, 1])
        torch.mul(stay, edges.mass, out=by_delta[:, :, 2])
        gradients = shares * (outer[t] + later)
        later = torch.zeros_like(later)
        for i in reversed(range(n_nodes + 1)):
            z = by_delta[edges.rows[i]] * gradients[i, :, None]
            to = gradients[:i] if i > 0 else later
            _add_product(to, z.flatten(2)[..., : 2 * width], edges.gradient[i])
            to += z[:, :, 2]
        delta = gradients[edges.targets]
        carried = torch.linalg.vecdot(stay.mul_(delta), kept.states[t][edges.sources])
        delta.mul_(c)
        for k, f in ((TANH, tanh), (SIGMOID, sigmoid), (RELU, a.relu()), (IDENTITY, a)):
            found[k] += carried + torch.linalg.vecdot(delta, f)
    squares = found.square_().sum(-1).t()  # (R, K)
    return squares[0], squares[1:]
