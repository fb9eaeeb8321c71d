"""Diagonals of second derivatives of any scalar function of a tensor: nothing here knows of networks.

`values` is any tensor; results have its shape. The functions must be made of operations that PyTorch differentiates
twice (exact, Hutchinson) or forward (Gauss-Newton); `lmnas.nn.kernels.plain` sees to that for the recurrent cell.
"""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[Tensor], Tensor]
"""Values -> scalar."""


def _gradient(loss: Loss, values: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf copy of `values` and the differentiable gradient of `loss` by it, both of the shape of `values`."""
    leaf = values.detach().clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    return leaf, gradient


def _product(leaf: Tensor, gradient: Tensor, vector: Tensor, last: bool) -> Tensor:
    """Product of the Hessian and `vector`, both of the shape of `leaf`; zeros where the gradient is constant."""
    if not gradient.requires_grad:
        return torch.zeros_like(leaf)
    (product,) = torch.autograd.grad(
        gradient, leaf, vector, retain_graph=not last, allow_unused=True, materialize_grads=True
    )
    return product


def exact_diagonal(loss: Loss, values: Tensor) -> Tensor:
    """d²loss / dv_i², of the shape of `values`, by differentiating every component of the gradient: one backward pass
    for each value."""
    leaf, gradient = _gradient(loss, values)
    count = leaf.numel()
    result = torch.zeros_like(leaf).flatten()
    for i in range(count):
        unit = torch.zeros_like(result)
        unit[i] = 1.0
        result[i] = _product(leaf, gradient, unit.view_as(leaf), i == count - 1).flatten()[i]
    return result.view_as(values)


def hutchinson_diagonal(loss: Loss, values: Tensor, generator: torch.Generator, draws: int) -> Tensor:
    """The mean of v ∘ Hv over `draws` tensors v of random signs, of the shape of `values`.

    Unbiased; the variance of entry i is Σ_{j≠i} H_ij² / draws (Bekas, Kokiopoulou & Saad, 2007).
    """
    leaf, gradient = _gradient(loss, values)
    result = torch.zeros_like(leaf)
    for k in range(draws):
        signs = torch.randint(2, leaf.shape, generator=generator, device=generator.device).to(leaf) * 2 - 1
        result += signs * _product(leaf, gradient, signs, k == draws - 1)
    return result / draws


def gauss_newton_diagonal(
    outputs: Callable[[Tensor], Tensor],
    values: Tensor,
    output_curvature: Callable[[Tensor], Tensor],
    chunk: int | None = None,
) -> Tensor:
    """J_i^T Q J_i for every value i, J_i the derivative of the outputs by it: one forward-mode product a value.

    The result has the shape of `values`.

    Args:
        outputs: values -> any tensor.
        output_curvature: tangents (C, *outputs.shape) -> their quadratic forms (C,), t^T Q t with Q the second
            derivative of the loss by the outputs; `softmax_form` makes one.
        chunk: values at once; default: all.

    Schraudolph, 2002, "Fast curvature matrix-vector products for second-order gradient descent".
    """
    values = values.detach()
    count = values.numel()
    chunk = chunk or count

    def tangent(direction: Tensor) -> Tensor:
        return torch.func.jvp(outputs, (values,), (direction,))[1]

    forms = []
    with torch.no_grad(), warnings.catch_warnings():
        # PyTorch's forward mode scripts a few formulas when it is first used, and warns of its own scripting
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.script", category=DeprecationWarning)
        for start in range(0, count, chunk):
            size = min(chunk, count - start)
            directions = torch.zeros(size, count, dtype=values.dtype, device=values.device)
            directions[torch.arange(size), start + torch.arange(size)] = 1.0
            forms.append(output_curvature(torch.vmap(tangent)(directions.view(size, *values.shape))))
    return torch.cat(forms).view_as(values)


def squared_gradients(log_likelihood: Callable[..., Tensor], values: Tensor, examples: tuple, in_dims: tuple) -> Tensor:
    """The sum over examples of the squared gradient of `log_likelihood(values, *example)`, of the shape of `values`.

    Where the labels were drawn from the model, its expectation is the diagonal of the Fisher matrix, which for a
    softmax is that of the Gauss-Newton matrix of the summed loss.

    Args:
        examples, in_dims: tensors (or tuples of them), and the axis of each along which the examples lie.
    """
    gradients = torch.vmap(torch.func.grad(log_likelihood), in_dims=(None, *in_dims))(values.detach(), *examples)
    return gradients.square().sum(0)


def softmax_form(
    probabilities: Tensor, weight: Tensor | None = None, elements: int = 8_000_000
) -> Callable[[Tensor], Tensor]:
    """The mean over N predictions of Var_{v~p}(tangent logit): the curvature of the mean cross-entropy.

    Args:
        probabilities: (N, V).
        weight: (V, H) of a linear layer before the softmax, whose input the tangents are then of; None: the
            identity.
        elements: tangent logits held at once.

    Returns:
        A function of (C, N, H), or (C, N, V) without a weight, giving (C,).
    """
    n, n_classes = probabilities.shape

    def form(tangents: Tensor) -> Tensor:
        total = tangents.new_zeros(len(tangents))
        rows = max(1, elements // (len(tangents) * n_classes))
        for start in range(0, n, rows):
            p, logits = probabilities[start : start + rows], tangents[:, start : start + rows]
            logits = logits if weight is None else logits @ weight.t()
            mean = torch.einsum("cnv,nv->cn", logits, p)
            total += torch.einsum("cnv,nv->c", (logits - mean[..., None]).square_(), p)
        return total / n

    return form


def chunk_of(outputs: int, elements: int = 8_000_000) -> int:
    """Number of tangents of `outputs` values each that fit into `elements` values; at least 1."""
    return max(1, math.floor(elements / max(1, outputs)))
