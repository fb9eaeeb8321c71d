"""The formulation of the papers' published codes, on the weights of our models: what the benches compare with.

Every time step by itself, x and h concatenated, every operation of a mixture evaluated, multiplied by its weight and
added by itself, batch norm as a layer, log-softmax over all words and its negative log-likelihood, default products. A
node's predecessors go through one product, as in the DARTS search code; `per_edge` takes one product for each, as ENAS'
codes do.

Shapes: T time, B batch, H width, E edges, K operations.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmnas.core.contracts import Batch, Choice, Loss, Masks
from lmnas.nn.kernels import BatchNorm, Program
from lmnas.tasks.language_modeling import LanguageModel

FUNCTIONS = (torch.tanh, torch.relu, torch.sigmoid, lambda a: a)


def gate(state: Tensor, pre: Tensor, op: int) -> Tensor:
    c, a = pre.chunk(2, dim=-1)
    return state + c.sigmoid() * (FUNCTIONS[op](a) - state)


def norm(states: Tensor) -> Tensor:
    return F.batch_norm(states, None, None, training=True)


def masked(states: Tensor, mask: Tensor | None) -> Tensor:
    return states if mask is None else states * mask


def plain_path(
    inputs: Tensor,
    h: Tensor,
    w_input: Tensor,
    w_nodes: Sequence[Tensor],
    program: Program,
    mask_x: Tensor | None,
    mask_h: Tensor | None,
    batch_norm: BatchNorm,
) -> Tensor:
    """(T, B, H): one architecture over a segment."""
    hs = []
    for x in inputs:
        s = gate(h, torch.cat([masked(x, mask_x), masked(h, mask_h)], dim=-1) @ w_input, program.ops[0])
        states = [norm(s) if batch_norm == "nodes" else s]
        for op, source, weight in zip(program.ops[1:], program.inputs, w_nodes, strict=True):
            s = gate(states[source], masked(states[source], mask_h) @ weight, op)
            states.append(norm(s) if batch_norm == "nodes" else s)
        h = torch.stack([states[i] for i in program.outputs], -1).mean(-1)
        if batch_norm == "output":
            h = norm(h)
        hs.append(h)
    return torch.stack(hs)


def plain_mixture(
    inputs: Tensor,
    h: Tensor,
    w_input: Tensor,
    w_nodes: Sequence[Tensor],
    p_edges: Tensor,
    mask_x: Tensor | None,
    mask_h: Tensor | None,
    per_edge: bool,
) -> Tensor:
    """(T, B, H): DARTS' search cell: node 0 tanh, node-shared weights, mean of nodes 1..N; `p_edges` is (E, K)."""
    hs = []
    for x in inputs:
        s = norm(gate(h, torch.cat([masked(x, mask_x), masked(h, mask_h)], dim=-1) @ w_input, 0))
        states, row = s[None], 0
        for weight in w_nodes:
            n, batch, width = states.shape
            if per_edge:
                pre = torch.stack([masked(state, mask_h) @ weight for state in states])
            else:
                pre = (masked(states, mask_h).view(-1, width) @ weight).view(n, batch, -1)
            c, a = pre.chunk(2, dim=-1)
            c = c.sigmoid()
            s = torch.zeros_like(states[0])
            for k, function in enumerate(FUNCTIONS):
                s = s + (p_edges[row : row + n, k, None, None] * (states + c * (function(a) - states))).sum(0)
            states = torch.cat([states, norm(s)[None]])
            row += n
        h = states[1:].mean(0)
        hs.append(h)
    return torch.stack(hs)


def plain_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood, all (N, V) logits at once."""
    return F.nll_loss(F.log_softmax(F.linear(hidden, weight, bias), dim=-1), targets)


class Plain(nn.Module):
    """The same parameters as a `LanguageModel` of the recurrent cell, run the plain way."""

    def __init__(self, model: LanguageModel, per_edge: bool):
        super().__init__()
        self.model, self.per_edge = model, per_edge

    def forward(self, batch: Batch, masks: Masks, choice: Choice = None, penalised: bool = True) -> Loss:
        """Loss of one batch; arguments and result as those of `LanguageModel.forward`."""
        model, carry = self.model, self.model.state_before(batch)
        body: Any = model.body
        embedded = F.embedding(batch.inputs, model.embedding)
        if "embedding" in masks:
            embedded = embedded * masks["embedding"][batch.inputs]
        if "input" in masks:
            embedded = embedded * masks["input"]
        mask_x, mask_h = masks.get("x"), masks.get("hidden")
        if isinstance(choice, dict):
            p_edges = choice["nodes"][:, 1:]  # column 0 is `none`
            weights = list(body.w_nodes)
            raw = plain_mixture(embedded, carry, body.w_input, weights, p_edges, mask_x, mask_h, self.per_edge)
        else:
            program, weights, batch_norm = _path(body, choice)
            raw = plain_path(embedded, carry, body.w_input, weights, program, mask_x, mask_h, batch_norm)
        dropped = raw * masks["output"] if "output" in masks else raw
        loss = plain_cross_entropy(dropped.flatten(0, 1), model.embedding, model.bias, batch.targets.flatten())
        if penalised and model.settings.tar > 0:
            loss = loss + model.settings.tar * (raw[1:] - raw[:-1]).square().mean()
        return Loss(loss, raw[-1].detach())


def _path(body, choice: Choice) -> tuple[Program, list[Tensor], BatchNorm]:
    """Program, its nodes' weights and the batch norm: of a stand-alone cell, or of one path of a supernet."""
    if choice is None:
        return body.program, list(body.w_nodes), body.batch_norm
    program = body.space.program(choice)
    return program, [body.w_nodes[row] for row in body._path_rows(program)], body.space.batch_norm
