"""Random segments of several seeds, and their answers by the reference, one seed after the other."""

import torch

from lmnas.core.seeds import generator
from lmnas.nn.kernels import edges, reference, segment
from lmnas.nn.ops.dropout import draw_mask


class Problem:
    """Random arguments for S seeds of a cell with `n` nodes after node 0.

    `programs` is one Program for all seeds or a list of one each; None: a mixture.
    """

    def __init__(
        self,
        s,
        t,
        b,
        h,
        n,
        *,
        seed,
        masks=(False, False),
        sharing="node",
        programs=None,
        dtype=torch.float64,
        device="cpu",
    ):
        noise = generator(seed, "problem")

        def random(*shape, scale=1.0):
            values = scale * torch.randn(*shape, generator=noise, dtype=torch.float64)
            return values.to(device, dtype).requires_grad_()

        scale = h**-0.5
        self.inputs, self.state = random(s, t, b, h), random(s, b, h)
        self.w_input = random(s, 2 * h, 2 * h, scale=scale)
        count = n if programs is not None or sharing == "node" else len(edges(n))
        self.w_nodes = [random(s, h, 2 * h, scale=scale) for _ in range(count)]
        self.masks = [draw_mask((s, b, h), 0.4, noise, self.inputs) if mask else None for mask in masks]
        self.programs = programs
        self.mixture = []
        if programs is None:
            # the fifth column is `none`, whose mass is missing from the rows
            rows = [
                random(s, 5).detach().softmax(-1)[..., :4],
                random(s, len(edges(n)), 5).detach().softmax(-1)[..., :4],
            ]
            self.mixture = [p.clone().requires_grad_() for p in (*rows, random(s, n + 1).detach().softmax(-1))]
        self.gradient = random(s, t, b, h).detach()

    @property
    def leaves(self):
        return [self.inputs, self.state, self.w_input, *self.w_nodes, *self.mixture]

    def run(self, runner=None, batch_norm="none"):
        """All seeds at once, by `segment`."""
        weights = (self.inputs, self.state, self.w_input, self.w_nodes)
        if self.programs is not None:
            return segment.recurrent_path_many(*weights, self.programs, *self.masks, batch_norm, runner)
        return segment.recurrent_mixture_many(*weights, *self.mixture, *self.masks, batch_norm, runner)

    def alone(self, batch_norm="none", kernel=reference):
        """One seed after the other."""
        hs = []
        for s in range(len(self.inputs)):
            weights = (self.inputs[s], self.state[s], self.w_input[s], [w[s] for w in self.w_nodes])
            masks = [None if mask is None else mask[s] for mask in self.masks]
            if self.programs is not None:
                program = self.programs[s] if isinstance(self.programs, list) else self.programs
                hs.append(kernel.recurrent_path(*weights, program, *masks, batch_norm))
            else:
                hs.append(kernel.recurrent_mixture(*weights, *(p[s] for p in self.mixture), *masks, batch_norm))
        return torch.stack(hs)

    def gradients(self, hs):
        """Of all leaves; zero where one has no part in the result."""
        gradients = torch.autograd.grad(hs, self.leaves, self.gradient, allow_unused=True)
        return [torch.zeros_like(v) if g is None else g for g, v in zip(gradients, self.leaves, strict=True)]

    def to(self, dtype):
        """The same problem in another type."""
        twin = object.__new__(Problem)
        twin.programs, twin.gradient = self.programs, self.gradient.to(dtype)
        twin.masks = [None if mask is None else mask.to(dtype) for mask in self.masks]
        for name in ("inputs", "state", "w_input"):
            setattr(twin, name, getattr(self, name).detach().to(dtype).requires_grad_())
        for name in ("w_nodes", "mixture"):
            setattr(twin, name, [v.detach().to(dtype).requires_grad_() for v in getattr(self, name)])
        return twin


def errors(ours, plain):
    """The largest difference of each pair, relative to the largest value."""
    return [
        ((a.to(b.dtype) - b).abs().max() / b.abs().max().clamp_min(torch.finfo(b.dtype).tiny)).item()
        for a, b in zip(ours, plain, strict=True)
    ]


def assert_equal(problem, batch_norm="none", runner=None):
    """Values and all gradients: to 1e-10 in float64. In float32 to 1e-5, or to three times the reference's own distance
    from float64: a few problems are so sensitive to rounding that two correct programs differ by more.
    """
    hs, plain = problem.run(runner, batch_norm), problem.alone(batch_norm)
    ours, plain = [hs, *problem.gradients(hs)], [plain, *problem.gradients(plain)]
    tolerance = 1e-10
    if hs.dtype == torch.float32:
        exact = problem.to(torch.float64)
        exact_hs = exact.alone(batch_norm)
        tolerance = max(1e-5, 3 * max(errors(plain, [exact_hs, *exact.gradients(exact_hs)])))
    assert max(errors(ours, plain)) < tolerance
