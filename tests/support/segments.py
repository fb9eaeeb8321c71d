"""Random segments of the recurrent cell, and how far a kernel is from the reference on them."""

import copy
from dataclasses import replace

import torch

from lmnas.core.seeds import generator, rng
from lmnas.nn.kernels import Operands, Program, edges
from lmnas.nn.kernels.reference import Reference
from lmnas.nn.ops.dropout import draw_mask
from lmnas.spaces.recurrent.cell import RecurrentCell

BATCH_NORMS = ("none", "nodes", "output")
MASKS = ((False, False), (True, False), (False, True), (True, True))
PROGRAM = Program((0, 1, 2, 0), (0, 0, 1), (1, 2, 3))
"""Of three nodes after node 0."""
REFERENCE = Reference()


def random_program(n, output, *seed):
    """Of `n` nodes after node 0."""
    space = RecurrentCell(n_nodes=n, input_activation="searched", output=output)
    return space.program(space.sample(rng(0, "programs", *seed)))


class Problem:
    """Random arguments of a cell with `n` nodes after node 0.

    `program` None: a mixture. `sampled`: the program is one of many.
    """

    def __init__(
        self,
        t,
        b,
        h,
        n,
        *,
        seed,
        masks=(False, False),
        sharing="node",
        program=None,
        sampled=False,
        dtype=torch.float64,
        device="cpu",
    ):
        noise = generator(seed, "problem")

        def random(*shape, scale=1.0):
            values = scale * torch.randn(*shape, generator=noise, dtype=torch.float64)
            return values.to(device, dtype).requires_grad_()

        scale = h**-0.5
        self.inputs, self.state = random(t, b, h), random(b, h)
        self.w_input = random(2 * h, 2 * h, scale=scale)
        count = n if program is not None or sharing == "node" else len(edges(n))
        self.w_nodes = [random(h, 2 * h, scale=scale) for _ in range(count)]
        self.masks = [draw_mask((b, h), 0.4, noise, self.inputs) if mask else None for mask in masks]
        self.program, self.sampled = program, sampled
        self.mixture = []
        if program is None:
            # the fifth column is `none`, whose mass is missing from the rows
            rows = [random(5).detach().softmax(0)[:4], random(len(edges(n)), 5).detach().softmax(1)[:, :4]]
            self.mixture = [p.clone().requires_grad_() for p in (*rows, random(n + 1).detach().softmax(0))]
        self.gradient = random(t, b, h).detach()

    @property
    def leaves(self):
        return [self.inputs, self.state, self.w_input, *self.w_nodes, *self.mixture]

    def operands(self, batch_norm="none"):
        return Operands(self.inputs, self.state, self.w_input, self.w_nodes, *self.masks, batch_norm)

    def run(self, kernel=REFERENCE, batch_norm="none", **changes):
        x = replace(self.operands(batch_norm), **changes)
        if self.program is not None:
            return kernel.recurrent_path(x, self.program, self.sampled)
        return kernel.recurrent_mixture(x, *self.mixture)

    def gradients(self, hs, **settings):
        """Of all leaves; zero where one has no part in the result."""
        gradients = torch.autograd.grad(hs, self.leaves, self.gradient, allow_unused=True, **settings)
        return [torch.zeros_like(v) if g is None else g for g, v in zip(gradients, self.leaves, strict=True)]

    def solution(self, kernel=REFERENCE, batch_norm="none"):
        """The result and the gradients of all leaves."""
        hs = self.run(kernel, batch_norm)
        return [hs, *self.gradients(hs)]

    def doubled(self):
        """The same problem in float64."""
        twin = copy.copy(self)
        for name in ("inputs", "state", "w_input", "gradient"):
            setattr(twin, name, getattr(self, name).detach().double().requires_grad_())
        for name in ("w_nodes", "mixture"):
            setattr(twin, name, [v.detach().double().requires_grad_() for v in getattr(self, name)])
        twin.masks = [None if mask is None else mask.double() for mask in self.masks]
        return twin


def errors(ours, plain):
    """The largest difference of each pair, relative to the largest value."""
    return [
        ((a.to(b.dtype) - b).abs().max() / b.abs().max().clamp_min(torch.finfo(b.dtype).tiny)).item()
        for a, b in zip(ours, plain, strict=True)
    ]


def assert_equal(problem, kernel, batch_norm="none"):
    """Values and all gradients: to 1e-10 in float64. In float32 to 1e-5, or to three times the reference's own distance
    from float64: a few problems are so sensitive to rounding that two correct programs differ by more.
    """
    ours, plain = problem.solution(kernel, batch_norm), problem.solution(batch_norm=batch_norm)
    tolerance = 1e-10
    if plain[0].dtype == torch.float32:
        exact = problem.doubled().solution(batch_norm=batch_norm)
        tolerance = max(1e-5, 3 * max(errors(plain, exact)))
    assert max(errors(ours, plain)) < tolerance


def bit_equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
