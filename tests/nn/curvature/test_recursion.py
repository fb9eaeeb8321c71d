"""The recursion where it must equal the second derivative, one property of the propagation at a time."""

import pytest
import torch

from lmnas.core.seeds import generator
from lmnas.nn.curvature import recurrent_diagonal
from lmnas.nn.kernels import edges, reference

DOUBLE = torch.float64


class Case:
    """Random weights of a cell with a random mixture of both signs, and a loss that is separable over h."""

    def __init__(self, t, b, h, n, seed, sharing="node", chain=False):
        noise = generator(seed, "curvature")

        def random(*shape):
            return torch.randn(*shape, generator=noise, dtype=DOUBLE)

        self.inputs, self.state = random(t, b, h), random(b, h)
        self.w_input = random(2 * h, 2 * h)
        self.w_nodes = [random(h, 2 * h) for _ in range(n if sharing == "node" else len(edges(n)))]
        self.p_input, self.p_edges = random(4), random(len(edges(n)), 4)
        self.outputs = torch.full((n + 1,), 1.0 / n, dtype=DOUBLE)
        self.outputs[0] = 0.0
        if chain:
            # every node reads the one before it, and the last is h: no forks
            for row, (node, source) in enumerate(edges(n)):
                if source != node - 1:
                    self.p_edges[row] = 0.0
            self.outputs = torch.eye(n + 1, dtype=DOUBLE)[n]
        self.a, self.b = random(t, b, h), random(t, b, h)

    def head(self, hs):
        """Of Σ exp(a h) + b h, whose second derivative is a diagonal matrix."""
        return self.a * (self.a * hs).exp() + self.b, self.a.square() * (self.a * hs).exp()

    def loss(self, p_input, p_edges, state=None, steps=None):
        """By the plain kernel; with `steps` the mixture has one row of (K,) and (E, K) for every step."""
        h = self.state if state is None else state
        hs = []
        for t, x in enumerate(self.inputs):
            mixture = (p_input, p_edges) if steps is None else (p_input[t], p_edges[t])
            operands = reference.Operands(x[None], h, self.w_input, self.w_nodes)
            h = reference.recurrent_mixture(operands, *mixture, self.outputs)[0]
            hs.append(h)
        hs = torch.stack(hs)
        return ((self.a * hs).exp() + self.b * hs).sum()

    def recursion(self):
        arguments = (self.inputs, self.state, self.w_input, self.w_nodes, self.p_input, self.p_edges, self.outputs)
        return recurrent_diagonal(*arguments, self.head)

    def hessian_diagonals(self):
        """By `p_input`, `p_edges` and the state."""
        functions = (
            (lambda p: self.loss(p, self.p_edges), self.p_input),
            (lambda p: self.loss(self.p_input, p), self.p_edges),
            (lambda s: self.loss(self.p_input, self.p_edges, s), self.state),
        )
        return [diagonal_of(function, at) for function, at in functions]


def diagonal_of(function, at):
    hessian = torch.autograd.functional.hessian(function, at)
    return hessian.reshape(at.numel(), at.numel()).diagonal().view_as(at)


def assert_close(found, expected, tolerance=1e-10):
    assert expected.abs().max() > 1e-3
    assert ((found - expected).abs().max() / expected.abs().max()).item() < tolerance


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [1, 2, 3])
def test_exact_for_one_step_of_a_chain_of_width_one(n, seed):
    """All operations, gates, curvature of the activations, entries of both signs; the rows that are zero as well."""
    case = Case(1, 3, 1, n, seed, chain=True)
    for found, expected in zip(case.recursion(), case.hessian_diagonals(), strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("seed", range(3))
def test_the_trace_of_free_switches_for_a_chain_of_width_one(seed):
    """Over several steps, each with a loss of its own: what is dropped is only the tie between steps."""
    case = Case(4, 2, 1, 2, seed, chain=True)
    free_input, free_edges = case.p_input.expand(4, 4), case.p_edges.expand(4, -1, 4)
    by_input = diagonal_of(lambda p: case.loss(p, free_edges, steps=True), free_input.contiguous()).sum(0)
    by_edges = diagonal_of(lambda p: case.loss(free_input, p, steps=True), free_edges.contiguous()).sum(0)
    found = case.recursion()
    assert_close(found.input, by_input)
    assert_close(found.edges, by_edges)
    tied = diagonal_of(lambda p: case.loss(case.p_input, p), case.p_edges)
    assert (found.edges - tied).abs().max() > 1e-2 * tied.abs().max()
    assert_close(found.state, case.hessian_diagonals()[2])


@pytest.mark.parametrize("sharing", ["node", "edge"])
def test_switches_into_the_last_node_at_any_width(sharing):
    """A diagonal loss on the mean of the nodes: nothing lies between the last node and h."""
    case = Case(1, 3, 5, 3, 0, sharing)
    last = slice(3, 6)
    assert_close(case.recursion().edges[last], case.hessian_diagonals()[1][last])


@pytest.mark.parametrize("seed", range(2))
def test_full_matrices_pass_a_diagonal_curvature_exactly(seed):
    """One edge of full matrices at a time; the other is made diagonal, so that the curvature it is given is."""
    width = 4
    diagonal = torch.eye(width, dtype=DOUBLE).repeat(1, 2)
    case = Case(1, 2, width, 1, seed)
    case.w_nodes[0] = case.w_nodes[0] * diagonal  # s_1 is a function of s_0, unit by unit
    assert_close(case.recursion().state, case.hessian_diagonals()[2])
    case = Case(1, 2, width, 1, seed)
    case.w_input[width:] = 0.0  # s_0 is linear in h, unit by unit
    assert_close(case.recursion().state, case.hessian_diagonals()[2])


def test_weights_of_every_edge():
    """`edge` sharing with equal weights is `node` sharing."""
    case = Case(3, 2, 4, 3, 1)
    shared = case.recursion()
    case.w_nodes = [case.w_nodes[node - 1] for node, _ in edges(3)]
    for found, expected in zip(case.recursion(), shared, strict=True):
        assert_close(found, expected)
    assert all(torch.isfinite(part).all() for part in shared)
