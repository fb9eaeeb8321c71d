"""DARTS: architecture weights learned by gradient descent on the validation loss (Liu et al., 2019, arXiv 1806.09055).

Every table of the space's relaxation has logits alpha; the supernet runs softmax(alpha). Per training step alpha moves
once, before the weights do:

    first order    g = d/dalpha L_val(w, alpha)
    second order   w' = w - xi * [clip(d/dw L_train(w, alpha)) + decay * w + velocity]
                   g = d/dalpha L_val(w', alpha) - xi * c * [d/dalpha L_train(w+) - d/dalpha L_train(w-)] / (2 eps)
                   w+- = w +- eps * v,  v = clip(d/dw' L_val(w', alpha)),  eps = epsilon / |v|   (eqs. 6-8)

`velocity` is momentum times the momentum buffer (zero for the recurrent search, which has no momentum), so that w' is
the weights' next update by SGD, clipped as that update is clipped; of Nesterov's form it is the plain one.

Departures from the authors' code, each a flaw of it: the clipping coefficient c is capped at 1; w+ and w- see identical
dropout masks (the losses given carry them); the unrolled step moves the tied embedding as well (their copy back of the
old decoder undid it). Kept from it: gradients clipped in the look-ahead and the finite difference taken at w. Its
convolutional half clips the weights' update to norm 5 but not the look-ahead; here `clip` holds for both.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lmnas.core.contracts import LearnStep, Mixture, Objective, Proposal, SharingStrategy, Space, relaxed
from lmnas.core.seeds import generator

Alphas = dict[str, Tensor]

LOOK_AHEAD_COPIES = 5
"""Copies of the weights held at once by a second-order step: gradient of the training loss, weights ahead, their
gradient, its clipped form, and weights moved along it."""


class Gradient(SharingStrategy):
    """Proposes the one architecture that is derived from its learned mixture."""

    needs = frozenset({"shared-weights", "mixture"})

    def __init__(
        self,
        space: Space,
        objective: Objective,
        seed: int,
        *,
        order: Literal[1, 2] = 1,
        learning_rate: Annotated[float, Field(gt=0)] = 3e-3,
        beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999,
        weight_decay: Annotated[float, Field(ge=0)] = 1e-3,
        init_scale: Annotated[float, Field(ge=0)] = 1e-3,
        epsilon: Annotated[float, Field(gt=0)] = 1e-2,
    ):
        """
        Args:
            order: 1 takes the weights as they are, 2 looks one training step ahead.
            learning_rate, beta1, beta2, weight_decay: of Adam on the architecture weights.
            init_scale: standard deviation of the initial logits (paper: 0; code: 1e-3, which breaks ties).
            epsilon: length of the finite difference's step.
        """
        self.space = relaxed(space, "strategy 'gradient'")
        tables = self.space.tables()
        self.order = order
        # forward and backward each: one loss; or two gradients and the two ends of the finite difference
        self.learn_passes = 1 if order == 1 else 4
        self.weight_copies = 0 if order == 1 else LOOK_AHEAD_COPIES
        self.epsilon = epsilon
        noise = generator(seed, "alpha")
        self.alphas: Alphas = {
            table.name: (init_scale * torch.randn(len(table.edges), len(table.ops), generator=noise)).requires_grad_()
            for table in tables
        }
        self.ops = {table.name: list(table.ops) for table in tables}
        self.optimizer = torch.optim.Adam(
            self.alphas.values(), lr=learning_rate, betas=(beta1, beta2), weight_decay=weight_decay
        )
        self.proposed = False

    def mixture(self, alphas: Mapping[str, Tensor]) -> Mixture:
        """Softmax over the operations of each edge (eq. 2)."""
        return {name: alpha.softmax(dim=-1) for name, alpha in alphas.items()}

    def choice(self, step: int) -> Mixture:
        with torch.no_grad():
            return self.mixture(self.alphas)

    def learn(self, step: LearnStep) -> None:
        """One Adam step of the architecture weights."""
        gradients = architecture_gradient(step, self.alphas, self.mixture, self.order, self.epsilon)
        for name, alpha in self.alphas.items():
            alpha.grad = gradients[name]
        self.optimizer.step()

    def ask(self, n: int) -> list[Proposal]:
        """The derived architecture, once."""
        if self.proposed or n < 1:
            return []
        self.proposed = True
        return [Proposal(self.space.derive(self.choice(0)))]

    def statistics(self) -> dict[str, Any]:
        """`entropy`: mean over edges, nats; `mixture`: the weights, by table; `ops`: their columns."""
        mixture = self.choice(0)
        entropies = torch.cat([-(p * p.clamp_min(1e-30).log()).sum(-1) for p in mixture.values()])
        return {
            "entropy": entropies.mean().item(),
            "mixture": {name: p.tolist() for name, p in mixture.items()},
            "ops": self.ops,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "alphas": {name: alpha.detach() for name, alpha in self.alphas.items()},
            "optimizer": self.optimizer.state_dict(),
            "proposed": self.proposed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, alpha in self.alphas.items():
                alpha.copy_(state["alphas"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.proposed = state["proposed"]


def architecture_gradient(
    step: LearnStep,
    alphas: Mapping[str, Tensor],
    relax: Callable[[Mapping[str, Tensor]], Mixture],
    order: int,
    epsilon: float = 1e-2,
) -> Alphas:
    """d L_val / d alpha, through the weights' next update if `order` is 2.

    Args:
        step: losses and weights of this step; the weights come back untouched.
        alphas: logits by table, on any device.
        relax: logits -> mixture.
    """
    names, leaves = list(alphas), list(alphas.values())
    device = next(iter(step.weights.values())).device
    dtype = next(iter(step.weights.values())).dtype

    def mixture() -> Mixture:
        return {
            name: p.to(device=device, dtype=dtype) for name, p in relax(dict(zip(names, leaves, strict=True))).items()
        }

    def named(gradients: Any) -> Alphas:
        return {
            name: torch.zeros_like(leaf) if gradient is None else gradient
            for name, leaf, gradient in zip(names, leaves, gradients, strict=True)
        }

    if order == 1:
        weights = {name: weight.detach() for name, weight in step.weights.items()}  # spares kernels their gradients
        return named(torch.autograd.grad(step.valid_loss(weights, mixture()), leaves, allow_unused=True))

    weights = {name: weight.detach().requires_grad_() for name, weight in step.weights.items()}
    keys, values = list(weights), list(weights.values())

    with torch.no_grad():
        fixed = mixture()
    train_gradients = _grad(step.train_loss(weights, fixed), values)
    train_gradients, coefficient = _clipped(train_gradients, step.clip)
    with torch.no_grad():
        ahead = {}
        for key, weight, gradient in zip(keys, values, train_gradients, strict=True):
            direction = gradient + step.weight_decay * weight
            if key in step.velocity:
                direction += step.velocity[key]
            ahead[key] = weight - step.learning_rate * direction
    ahead = {key: weight.requires_grad_() for key, weight in ahead.items()}

    gradients = torch.autograd.grad(step.valid_loss(ahead, mixture()), [*leaves, *ahead.values()], allow_unused=True)
    explicit = named(gradients[: len(leaves)])
    vector, _ = _clipped(
        [torch.zeros_like(w) if g is None else g for g, w in zip(gradients[len(leaves) :], values, strict=True)],
        step.clip,
    )
    norm = _norm(vector)
    if norm == 0:
        return explicit
    eps = epsilon / norm

    def at(sign: float) -> Alphas:
        with torch.no_grad():
            moved = {key: w + sign * eps * v for key, w, v in zip(keys, values, vector, strict=True)}
        return named(torch.autograd.grad(step.train_loss(moved, mixture()), leaves, allow_unused=True))

    plus, minus = at(+1.0), at(-1.0)
    scale = step.learning_rate * coefficient / (2 * eps)
    return {name: explicit[name] - (scale * (plus[name] - minus[name])).to(explicit[name].dtype) for name in names}


def _grad(loss: Tensor, values: list[Tensor]) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, values, allow_unused=True)
    return [torch.zeros_like(v) if g is None else g for g, v in zip(gradients, values, strict=True)]


def _norm(tensors: list[Tensor]) -> float:
    return torch.nn.utils.get_total_norm(tensors).item()


def _clipped(tensors: list[Tensor], limit: float | None) -> tuple[list[Tensor], float]:
    """`tensors` scaled to a global norm of at most `limit`, and the factor, never above one."""
    if limit is None:
        return tensors, 1.0
    coefficient = min(1.0, limit / (_norm(tensors) + 1e-6))
    return [tensor * coefficient for tensor in tensors], coefficient
