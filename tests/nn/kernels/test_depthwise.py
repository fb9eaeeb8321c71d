"""The depthwise convolution's detours against PyTorch's own convolution, gradients included."""

import pytest
import torch

from lmnas.core.seeds import generator
from lmnas.nn.kernels import depthwise as module
from lmnas.nn.kernels.depthwise import depthwise, plain

B, C = 3, 5


def inputs(size, kernel, channels_last=True):
    noise = generator(0, size, kernel)
    x = torch.randn(B, C, size, size, generator=noise, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return x.requires_grad_(), torch.randn(C, 1, kernel, kernel, generator=noise, dtype=torch.float64).requires_grad_()


def test_plain_against_a_loop():
    x, weight = inputs(6, 3)
    out = plain(x, weight, stride=2, dilation=2)
    assert out.shape == (B, C, 3, 3)
    for i, j in ((0, 0), (1, 2)):
        total = torch.zeros(B, C, dtype=torch.float64)
        for a in range(3):
            for b in range(3):
                row, column = 2 * i + 2 * (a - 1), 2 * j + 2 * (b - 1)
                if 0 <= row < 6 and 0 <= column < 6:
                    total += x[:, :, row, column] * weight[:, 0, a, b]
        torch.testing.assert_close(out[:, :, i, j], total)


@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
def test_it_equals_the_plain_one(kernel, dilation, stride, size):
    x, weight = inputs(size, kernel)
    expected, found = plain(x, weight, stride, dilation), depthwise(x, weight, stride, dilation)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    upstream = torch.randn(expected.shape, generator=generator(1), dtype=torch.float64)
    gradients = (torch.autograd.grad(out, (x, weight), upstream) for out in (expected, found))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-12)


def test_where_it_leaves_the_plain_way(monkeypatch):
    """Dilated ones with channels last alone; PyTorch then sees no dilation."""
    seen = []
    monkeypatch.setattr(module, "plain", lambda *arguments: seen.append(arguments[2:]) or plain(*arguments))
    for stride, size in ((1, 6), (2, 6), (2, 7)):
        depthwise(*inputs(size, 3), stride, 2)
    assert seen == [(), (), ()]
    depthwise(*inputs(7, 3), 1, 2)  # four phases of unlike sizes
    depthwise(*inputs(6, 3, channels_last=False), 1, 2)
    depthwise(*inputs(6, 3), 2, 1)
    assert seen[3:] == [(1, 2), (1, 2), (2, 1)]
