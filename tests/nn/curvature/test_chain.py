"""Plain recurrent networks: worked numbers, to the digits that they are given with, and the exact cases."""

import pytest
import torch
import torch.nn.functional as F

from lmnas.core.errors import UserError
from lmnas.core.seeds import generator
from lmnas.nn.curvature import exact_diagonal, gauss_newton_diagonal
from lmnas.nn.curvature.chain import ACTIVATIONS, Chain, chain_diagonal

DOUBLE = torch.float64


def tensor(*values):
    return torch.tensor(values, dtype=DOUBLE)


U, Y = tensor(0.5, -1.0, 0.8), tensor(0.2, -0.1, 0.4)
ONES = torch.ones(3, dtype=DOUBLE)


class Scalar:
    """x_t = r f(w x_{t-1} + v u_t), L = Σ ½ (o x_t - y_t)², x_0 = 0.3; values are (w, v, o, r)."""

    def __init__(self, activation="tanh", r=1.0):
        self.activation = activation
        self.values = tensor(0.9, 0.7, 1.2, r)

    def outputs(self, values):
        """o x_t of all steps; (3, 4) values are of every step its own."""
        rows = values if values.dim() == 2 else values.expand(3, 4)
        x, ys = tensor(0.3)[0], []
        for (w, v, o, r), u in zip(rows, U, strict=True):
            pre = w * x + v * u
            x = r * (pre.tanh() if self.activation == "tanh" else pre)
            ys.append(o * x)
        return torch.stack(ys)

    def loss(self, values):
        return 0.5 * (self.outputs(values) - Y).square().sum()

    def recursion(self, weights=ONES, **options):
        w, v, o, r = self.values
        chain = Chain(w.view(1, 1), v.view(1, 1), o.view(1, 1), activation=self.activation, switch=r)
        found = chain_diagonal(
            chain, U.view(3, 1, 1), tensor(0.3).view(1, 1), Y.view(3, 1, 1), "squared-error", weights, **options
        )
        return torch.stack([found.w_x[0, 0], found.w_i[0, 0], found.w_o[0, 0], found.switch]), found.pre[:, 0, 0]

    def untied(self):
        """The trace of the Hessian over steps, every step with values of its own."""
        return exact_diagonal(self.loss, self.values.repeat(3, 1)).sum(0)

    def gauss_newton(self):
        return gauss_newton_diagonal(self.outputs, self.values, lambda tangents: tangents.square().sum(1))


def assert_digits(found, expected, digits=10):
    """Equal to the digits given."""
    assert (torch.as_tensor(found) - tensor(*expected)).abs().max().item() <= 0.51 * 10.0**-digits


def test_t1_values():
    case = Scalar()
    assert_digits(case.outputs(case.values) / 1.2, (0.5511280285, -0.2012018298, 0.3617677503))
    assert_digits(case.loss(case.values), (0.1170086669,))
    leaf = case.values.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(case.loss(leaf), leaf)
    assert_digits(gradient[:3], (0.0108213077, 0.3119322894, 0.2950673336))


@pytest.mark.parametrize(
    "t, expected",
    [
        (1, (0.2731945855,)),
        (2, (0.6073426411, 1.2602359269)),
        (3, (0.2946137130, 0.8043446906, 1.0619941430)),
    ],
)
def test_t1_pre_activations_of_each_loss(t, expected):
    """ℋ^{t,k} for k = 1..t: the sweep of one step's loss alone."""
    _, pre = Scalar().recursion(weights=F.one_hot(torch.tensor(t - 1), 3).to(DOUBLE))
    assert_digits(pre, (*expected, *[0.0] * (3 - t)))


def test_t1_second_derivatives():
    case = Scalar()
    recursion = (0.7758554790, 3.0380446040, 0.4751001853)
    assert_digits(case.recursion()[0][:3], recursion)
    assert_digits(case.untied()[:3], recursion)
    assert_digits(exact_diagonal(case.loss, case.values)[:3], (0.9261738959, 0.7366972633, 0.4751001853))
    assert_digits(case.recursion(curved=False)[0][:3], (0.8314631275, 3.2174032721, 0.4751001853))
    assert_digits(case.gauss_newton()[:3], (0.9948853927, 0.8462763964, 0.4751001853))


def test_t2_identity():
    case = Scalar("identity")
    assert_digits(case.recursion()[0][:2], (1.3505428800, 4.4157960000))
    assert_digits(exact_diagonal(case.loss, case.values)[:2], (2.1751944000, 0.9295560000))


def test_t3_switch():
    case = Scalar(r=0.8)
    assert_digits(case.recursion()[0][3], (1.0192402866,))
    assert_digits(case.untied()[3], (1.0192402866,))
    assert_digits(exact_diagonal(case.loss, case.values)[3], (0.3574915796,))
    assert_digits(case.gauss_newton()[3], (0.6502407976,))


def test_t4_width_two():
    """The full matrices are exact by what the activation is given; diagonals are not, before the last step."""
    w_x, w_i = tensor([0.5, -0.8], [0.3, 0.6]), tensor([0.7], [-0.4])
    w_o, x0 = tensor([1.0, -0.5]), tensor([0.3, -0.2])
    chain = Chain(w_x, w_i, w_o)
    arguments = (chain, U.view(3, 1, 1), x0, Y.view(3, 1, 1), "squared-error", ONES)

    def loss(shifts):
        """By additions to what the activation is given, (T, H)."""
        x, total = x0, 0.0
        for u, y, shift in zip(U, Y, shifts, strict=True):
            x = torch.tanh(x @ w_x.t() + u * w_i.t() + shift)
            total = total + 0.5 * (x @ w_o.t() - y).square().sum()
        return total

    shifts = torch.zeros(3, 2, dtype=DOUBLE)
    exact = exact_diagonal(loss, shifts)
    digits = ((0.1669129, 1.6703461), (0.8476769, 0.7387871), (1.0220167, 0.2695419))
    assert_digits(exact.flatten(), sum(digits, ()), 7)
    full = chain_diagonal(*arguments, full=True)
    assert (full.pre[:, 0] - exact).abs().max() < 1e-14
    blocks = torch.autograd.functional.hessian(loss, shifts).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    assert (full.full[:, 0] - blocks).abs().max() < 1e-14
    diagonal = chain_diagonal(*arguments).pre[:, 0]
    assert_digits(diagonal[:2].flatten(), (0.2617169, 1.0361774, 0.9782938, 0.4187427), 7)
    assert (diagonal[2] - exact[2]).abs().max() < 1e-14


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_free_weights_of_a_diagonal_chain_with_softmax(activation):
    """Several sequences, biases, the mean of cross-entropies: full matrices are exact for free weights at every step,
    and diagonals too with one step."""
    noise = generator(3, activation)
    t, b, m, h, o = 3, 2, 2, 3, 4

    def random(*shape):
        return torch.randn(*shape, generator=noise, dtype=DOUBLE)

    w_x, w_i, w_o, b_h, b_y = random(h, h), random(h, m), random(o, h), random(h), random(o)
    inputs, state, targets = random(t, b, m), random(b, h), torch.randint(o, (t, b), generator=noise)
    functions = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": torch.relu, "identity": lambda a: a}

    def loss(w_x, w_i, w_o, length=t):
        x, ys = state, []
        for k in range(length):
            x = functions[activation](x @ w_x[k].t() + inputs[k] @ w_i[k].t() + b_h)
            ys.append(x @ w_o[k].t() + b_y)
        return F.cross_entropy(torch.cat(ys), targets[:length].flatten())

    free = [w.repeat(t, 1, 1) for w in (w_x, w_i, w_o)]
    chain = Chain(w_x, w_i, w_o, b_h, b_y, activation)
    found = chain_diagonal(chain, inputs, state, targets, full=True)
    for i in range(3):
        exact = exact_diagonal(lambda w, i=i: loss(*free[:i], w, *free[i + 1 :]), free[i]).sum(0)
        assert torch.allclose(found[i], exact, rtol=1e-10, atol=1e-14) and exact.abs().max() > 1e-3
    found = chain_diagonal(chain, inputs[:1], state, targets[:1])
    exact = exact_diagonal(lambda w: loss(w, w_i[None], w_o[None], 1), w_x[None])[0]
    assert torch.allclose(found.w_x, exact, rtol=1e-10, atol=1e-14)
    assert (chain_diagonal(chain, inputs, state, targets, curved=False).w_x >= 0).all()


def test_refusals():
    chain = Chain(*(torch.ones(1, 1) for _ in range(3)), activation="tahn")
    ones = torch.ones(1, 1, 1)
    with pytest.raises(UserError, match=r"activation 'tahn' is unknown\. Did you mean 'tanh'"):
        chain_diagonal(chain, ones, ones[0], ones)
    with pytest.raises(UserError, match=r"loss 'crossentropy' is unknown\. Did you mean 'cross-entropy'"):
        chain_diagonal(Chain(ones[0], ones[0], ones[0]), ones, ones[0], ones, "crossentropy")
