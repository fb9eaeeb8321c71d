"""The kernel `segment`: the cell by `passes`, in torch operations on a CPU, as recorded CUDA graphs on a GPU.

On a CPU it is slower than the fused kernel and needs no compiler; on a GPU it is what `fused` runs, too. Equal to the
reference but for the order of sums; the same arguments give the same bits.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lmnas.nn.kernels import graphs
from lmnas.nn.kernels.passes import Arguments, Eager, FixedPath, Mixture, Plan, Runner, SampledPath, Wants
from lmnas.nn.kernels.reference import OPS, Operands, Program, Reference


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
    """(T, B, H), differentiable once."""
    *tensors, sources, mask_x, mask_h = (None if value is None else value.contiguous() for value in x)
    if not torch.is_grad_enabled():  # autograd would tell `forward` that gradients are needed all the same
        tensors = [None if value is None else value.detach() for value in tensors]
    return _Segment.apply(runner, plan, sources, mask_x, mask_h, *tensors)


def one_floating_type(first: Tensor, *others: Tensor) -> bool:
    """True for tensors of one device and one type, float32 or float64, which autocast would not change."""
    return (
        first.dtype in (torch.float32, torch.float64)
        and first.numel() > 0
        and all(t.dtype == first.dtype and t.device == first.device for t in others)
        and not torch.is_autocast_enabled(first.device.type)
    )


class Segment(Reference):
    """`passes`, run by `runner`; default: recorded on a GPU, operation by operation elsewhere."""

    runs_on: ClassVar = {"cpu": "segment", "cuda": "graphs"}
    keeps_a_block = True

    def __init__(self, runner: Runner | None = None) -> None:
        self.chosen_runner = runner

    def takes(self, x: Operands, weights: Sequence[Tensor]) -> bool:
        return (
            x.inputs.device.type in self.runs_on
            and one_floating_type(x.inputs, x.state, *weights, *x.masks)
            and all(mask.shape == x.state.shape and not mask.requires_grad for mask in x.masks)
        )

    def runner(self, inputs: Tensor) -> Runner:
        if self.chosen_runner is not None:
            return self.chosen_runner
        # inside somebody else's recording ours cannot be replayed, but its operations can be recorded
        if inputs.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return Eager()
        return graphs.recorded

    def recurrent_path(self, x: Operands, program: Program, sampled: bool = False) -> Tensor:
        n_nodes = len(program.inputs)
        arguments = Arguments(*_tensors(x), mask_x=x.mask_x, mask_h=x.mask_h)
        if not sampled:
            return run(self.runner(x.inputs), Plan(FixedPath, n_nodes, x.batch_norm, program), arguments)
        arguments = arguments._replace(**_as_values(program, x.inputs))
        return run(self.runner(x.inputs), Plan(SampledPath, n_nodes, x.batch_norm), arguments)

    def recurrent_mixture(self, x: Operands, p_input: Tensor, p_edges: Tensor, output_weights: Tensor) -> Tensor:
        n_nodes = len(output_weights) - 1
        plan = Plan(Mixture, n_nodes, x.batch_norm, per_edge=len(x.w_nodes) != n_nodes)
        arguments = Arguments(*_tensors(x), p_input, p_edges, output_weights, None, x.mask_x, x.mask_h)
        return run(self.runner(x.inputs), plan, arguments)


def _tensors(x: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.inputs, x.state, x.w_input, torch.stack(list(x.w_nodes))


def _as_values(program: Program, like: Tensor) -> dict[str, Tensor]:
    """A program as values of `Arguments`: p_input (K,), p_edges (N, K), shares (N + 1,), sources (N,)."""
    values = torch.zeros(len(program.ops), len(OPS) + 1, dtype=torch.float64)  # made on the CPU, sent once
    for node, op in enumerate(program.ops):
        values[node, op] = 1.0
    values[list(program.outputs), -1] = 1.0 / len(program.outputs)
    values = values.to(like.device, like.dtype, non_blocking=True)
    sources = torch.tensor(program.inputs).to(like.device, non_blocking=True)
    return {"p_input": values[0, :-1], "p_edges": values[1:, :-1], "shares": values[:, -1], "sources": sources}
