"""Curvature of a plain recurrent network's loss by its weights, by recursion through time.

    x_t = r σ(W_x x_{t-1} + W_i u_t + b_h),   y_t = W_o x_t + b_y

with a switch r that is mostly 1. After Botev, Ritter & Barber (2017) along time: with h_t what σ is given, ℋ_t the
second derivative of the loss by it, B = r σ'(h_t) and D = r σ''(h_t) ∂E/∂x_t,

    ℋ_t = B² ∘ ((W_x∘W_x)^T ℋ_{t+1} + (output's)_t) + D

and the weights get H_x = Σ_t ℋ_t ⊗ x_{t-1}², H_i = Σ_t ℋ_t ⊗ u_t², H_o = Σ_t ℋ_y ⊗ x_t². The losses of all steps
are swept at once; a sweep for every step's loss gives the same sum. Nothing is divided by the length of a sweep, which
some formulations do: that is no part of the second derivative.

W_o's is exact. W_x's and W_i's leave out what couples two steps (weights are tied over time; the error has either
sign). With `full`, which carries matrices, they are exact for weights that are free at each step. Diagonals leave out
more, except at one unit, or where neither W_x nor the output couples units.

Shapes: T time, B batch, M inputs, H units, O outputs.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lmnas.core.errors import UserError, nearest


@dataclass(frozen=True)
class Chain:
    """A plain recurrent layer with its linear output.

    Attributes:
        w_x: (H, H).
        w_i: (H, M).
        w_o: (O, H).
        b_h, b_y: (H,) and (O,), or None.
        activation: tanh, sigmoid, relu or identity.
        switch: r, a scalar.
    """

    w_x: Tensor
    w_i: Tensor
    w_o: Tensor
    b_h: Tensor | None = None
    b_y: Tensor | None = None
    activation: str = "tanh"
    switch: Tensor | None = None


class ChainCurvature(NamedTuple):
    """Second derivatives: of the weights' shapes, of the switch (scalar), by h_t (T, B, H), and, with `full`, as
    matrices (T, B, H, H)."""

    w_x: Tensor
    w_i: Tensor
    w_o: Tensor
    switch: Tensor
    pre: Tensor
    full: Tensor | None


def _tanh(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    f = a.tanh()
    return f, 1 - f * f, -2 * f * (1 - f * f)


def _sigmoid(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    f = a.sigmoid()
    return f, f * (1 - f), f * (1 - f) * (1 - 2 * f)


ACTIVATIONS = {
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "relu": lambda a: (a.relu(), (a > 0).to(a), torch.zeros_like(a)),
    "identity": lambda a: (a, torch.ones_like(a), torch.zeros_like(a)),
}
"""Name -> value, first and second derivative."""


@torch.no_grad()
def chain_diagonal(
    chain: Chain,
    inputs: Tensor,
    state: Tensor,
    targets: Tensor,
    loss: Literal["squared-error", "cross-entropy"] = "cross-entropy",
    weights: Tensor | None = None,
    curved: bool = True,
    full: bool = False,
) -> ChainCurvature:
    """The recursion over one segment.

    Args:
        inputs: (T, B, M).
        state: (B, H), a constant.
        targets: (T, B, O) of the squared error ½ |y - target|², or (T, B) class ids.
        weights: (T,), of every step's loss, which is summed over the batch; default 1 / (T B): the mean.
        curved: keep D; without it the result is never negative (the Gauss-Newton part).
        full: carry matrices instead of diagonals from step to step.

    Raises:
        UserError: unknown activation or loss.
    """
    if chain.activation not in ACTIVATIONS:
        raise UserError(f"activation {chain.activation!r} is unknown. {nearest(chain.activation, ACTIVATIONS)}")
    if loss not in ("squared-error", "cross-entropy"):
        raise UserError(f"loss {loss!r} is unknown. {nearest(loss, ('squared-error', 'cross-entropy'))}")
    steps, batch = inputs.shape[:2]
    r = inputs.new_ones(()) if chain.switch is None else chain.switch
    if weights is None:
        weights = inputs.new_full((steps,), 1.0 / (steps * batch))

    xs, values, slopes, bends = [state], [], [], []
    for u in inputs:
        h = xs[-1] @ chain.w_x.t() + u @ chain.w_i.t()
        f, f_1, f_2 = ACTIVATIONS[chain.activation](h if chain.b_h is None else h + chain.b_h)
        xs.append(r * f)
        values.append(f)
        slopes.append(r * f_1)
        bends.append(r * f_2)

    width = len(chain.w_x)
    w_x, w_i, w_o = (torch.zeros_like(w) for w in (chain.w_x, chain.w_i, chain.w_o))
    switch = inputs.new_zeros(())
    pre, matrices = inputs.new_empty(steps, batch, width), inputs.new_empty(steps if full else 0, batch, width, width)
    from_later = inputs.new_zeros(batch, width), inputs.new_zeros((batch, width, width) if full else (batch, width))
    for t in reversed(range(steps)):
        y = xs[t + 1] @ chain.w_o.t()
        y = y if chain.b_y is None else y + chain.b_y
        if loss == "squared-error":
            d_y, dd_y = y - targets[t], torch.ones_like(y)
        else:
            p = y.softmax(-1)
            d_y = p.clone()
            d_y[torch.arange(batch), targets[t]] -= 1.0
            dd_y = p * (1 - p)
        w_o += weights[t] * torch.einsum("bo,bh->oh", dd_y, xs[t + 1].square())
        gradient = from_later[0] + weights[t] * d_y @ chain.w_o
        slope, bend = slopes[t], bends[t] * gradient if curved else torch.zeros_like(gradient)
        if full:
            q = dd_y if loss == "squared-error" else p
            form = torch.einsum("oh,bo,og->bhg", chain.w_o, q, chain.w_o)
            if loss == "cross-entropy":
                mean = p @ chain.w_o
                form = form - mean[:, :, None] * mean[:, None, :]
            curvature = from_later[1] + weights[t] * form
            matrices[t] = slope[:, :, None] * curvature * slope[:, None, :] + torch.diag_embed(bend)
            pre[t] = matrices[t].diagonal(dim1=-2, dim2=-1)
            by_x = curvature.diagonal(dim1=-2, dim2=-1)
            handed = chain.w_x.t() @ matrices[t] @ chain.w_x
        else:
            form = (dd_y if loss == "squared-error" else p) @ chain.w_o.square()
            if loss == "cross-entropy":
                form = form - (p @ chain.w_o).square()
            by_x = from_later[1] + weights[t] * form
            pre[t] = slope.square() * by_x + bend
            handed = pre[t] @ chain.w_x.square()
        switch += (values[t].square() * by_x).sum()
        w_x += torch.einsum("bh,bg->hg", pre[t], xs[t].square())
        w_i += torch.einsum("bh,bm->hm", pre[t], inputs[t].square())
        from_later = (gradient * slope) @ chain.w_x, handed
    return ChainCurvature(w_x, w_i, w_o, switch, pre, matrices if full else None)
