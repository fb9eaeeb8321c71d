"""Stand-in of the fused cell on the `meta` device, where tensors have no memory: it holds what the cell would keep.

A forecast runs a model there and counts what autograd holds. The plain reference can be run so as it is; the fused
kernel keeps one block, which is laid out here with the sizes of `recurrent.cpp`, and what its backward adds.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lmnas.nn.kernels.reference import Operands


def fused_elements(steps: int, batch: int, width: int, n_nodes: int, n_readers: int) -> int:
    """Numbers that one segment holds at the height of its backward.

    Args:
        n_nodes: nodes after node 0.
        n_readers: products of one node into another: the edges of a mixture, the nodes of a path.
    """
    plane = batch * width
    tape = steps * (2 * plane + 2 * plane * n_readers + (n_nodes + 1) * (plane + width))
    # states' gradients; a source's states, masked and laid out anew; gradient of the inputs
    moving = (n_nodes + 4) * plane + 3 * steps * plane
    # every reader's weights side by side, then their transposes
    packed = 2 * n_readers * 2 * width * width
    return tape + moving + packed


class _Held(torch.autograd.Function):
    @staticmethod
    def forward(context, n_elements: int, *tensors: Tensor) -> Tensor:
        inputs = tensors[0]
        hs = torch.empty_like(inputs)
        if any(context.needs_input_grad):
            context.save_for_backward(inputs.new_empty(n_elements), hs, *tensors)
        return hs

    @staticmethod
    def backward(context, gradient: Tensor):
        raise NotImplementedError("a forecast has no gradients")


def recurrent(x: Operands, weights: Sequence[Tensor], n_nodes: int, n_readers: int) -> Tensor:
    """(T, B, H) on `meta`; autograd holds what the fused kernel would."""
    steps, batch, width = x.inputs.shape
    count = fused_elements(steps, batch, width, n_nodes, n_readers)
    return _Held.apply(count, x.inputs, x.state, *weights)
