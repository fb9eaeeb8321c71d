"""Linear layer, softmax and cross-entropy in one operation that never holds all logits.

The plain formulation stores (N, V) logits several times over; here a chunk of rows at a time goes through the softmax,
and the gradients are made in the same pass, so backward only scales them. The fused kernel does the same in C++
(`csrc/cross_entropy.cpp`). PyTorch 2.13 has a chunked
`linear_cross_entropy` of its own, which older versions lack.

Shapes: N predictions, H width, V classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lmnas.nn.kernels.in_use import current


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore: int = -100
) -> Tensor:
    """The plain formulation of `linear_cross_entropy`."""
    return F.cross_entropy(F.linear(hidden, weight, bias), targets, ignore_index=ignore)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore: int = -100
) -> Tensor:
    """Mean cross-entropy in nats of softmax(hidden weight^T + bias) over the targets that are not `ignore`.

    Args:
        hidden: (N, H).
        weight: (V, H), the tied embedding or a matrix of its own.
        bias: (V,) or None.
        targets: (N,) class ids.

    Returns:
        Scalar; NaN where every target is ignored, as in PyTorch. Differentiable once.
    """
    if not torch.is_grad_enabled():  # autograd would tell `forward` that gradients are needed all the same
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    return _Chunked.apply(hidden, weight, bias, targets, ignore)


def chunk_rows(n_classes: int) -> int:
    """Predictions whose logits are held at once."""
    return max(1, current().chunk // n_classes)


def scaled(context, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients from the forward pass times the gradient of the loss, which usually is exactly one."""
    if gradient.device.type == "cpu" and gradient.item() == 1.0:
        return (*context.saved_tensors, None, None)
    return (*(None if d is None else d * gradient for d in context.saved_tensors), None, None)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(context, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore: int) -> Tensor:
        wants_hidden, wants_weight, wants_bias = context.needs_input_grad[:3]
        count = (targets != ignore).sum()
        total = hidden.new_zeros(())
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros_like(weight) if wants_weight else None
        d_bias = torch.zeros_like(bias) if wants_bias and bias is not None else None
        for start in range(0, len(hidden), chunk_rows(len(weight))):
            rows = slice(start, start + chunk_rows(len(weight)))
            h, target = hidden[rows], targets[rows]
            kept = target != ignore
            index = target.masked_fill(~kept, 0)[:, None]
            logits = F.linear(h, weight, bias)
            top = logits.amax(1, keepdim=True)
            chosen = logits.gather(1, index) - top
            probabilities = logits.sub_(top).exp_()
            normaliser = probabilities.sum(1, keepdim=True)
            total += ((normaliser.log() - chosen).squeeze(1) * kept).sum()
            if d_hidden is None and d_weight is None and d_bias is None:
                continue
            # d loss / d logits = (softmax - one-hot) / count on the kept rows
            scale = kept[:, None] / count.to(hidden.dtype)
            probabilities.mul_(scale / normaliser)
            probabilities.scatter_add_(1, index, -scale)
            if d_hidden is not None:
                torch.mm(probabilities, weight, out=d_hidden[rows])
            if d_weight is not None:
                d_weight.addmm_(probabilities.t(), h)
            if d_bias is not None:
                d_bias += probabilities.sum(0)
        context.save_for_backward(d_hidden, d_weight, d_bias)
        return total / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient: Tensor):
        return scaled(context, gradient)
