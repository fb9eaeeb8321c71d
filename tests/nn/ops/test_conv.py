"""Convolutional operations against plain loops and torch's own words for them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmnas.core.seeds import generator
from lmnas.nn.ops.conv import (
    AvgPool,
    ConvNorm,
    FactorizedReduction,
    MaxPool,
    Norm,
    SeparableConv,
    convolution,
    initialise,
)
from lmnas.nn.train import n_parameters

B, C = 3, 4
OPERATIONS = {
    "conv": lambda c_in, c_out, stride: ConvNorm(c_in, c_out, 5, Norm(), stride),
    "sep_conv_3x3": lambda c_in, c_out, stride: SeparableConv(c_in, c_out, 3, Norm(), stride),
    "sep_conv_5x5": lambda c_in, c_out, stride: SeparableConv(c_in, c_out, 5, Norm(), stride),
}


def images(size, channels=C):
    return torch.randn(B, channels, size, size, generator=generator(0, "images"), dtype=torch.float64)


@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", OPERATIONS)
def test_sizes_are_divided_by_the_stride(name, stride, size):
    module = OPERATIONS[name](C, 6, stride).double()
    assert module(images(size)).shape == (B, 6, -(-size // stride), -(-size // stride))
    last = images(size).to(memory_format=torch.channels_last)
    assert module(last).is_contiguous(memory_format=torch.channels_last)


def test_a_separable_convolution_is_its_six_parts():
    module = SeparableConv(C, 6, 3, Norm(), stride=2).double()
    initialise(module, generator(1))
    state, x = module.state_dict(), images(6)
    for part, stride in (("first", 2), ("second", 1)):
        x = F.conv2d(F.relu(x), state[f"{part}.depthwise.weight"], stride=stride, padding=1, groups=C)
        x = F.conv2d(x, state[f"{part}.pointwise.weight"])
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        x = (x - mean) / (variance + 1e-5).sqrt()
    torch.testing.assert_close(module(images(6)), x)
    # depthwise 9 C and pointwise C^2, batch norm 2 C; then the same with 6 channels out
    assert n_parameters(module) == (9 * C + C * C + 2 * C) + (9 * C + C * 6 + 2 * 6)


def test_a_dilated_convolution_reads_every_second_pixel():
    weight = convolution(1, 1, 3, dilation=2, depthwise=True).double()
    nn.init.ones_(weight.weight)
    x = images(6, 1)
    out = weight(x)
    assert out.shape == x.shape
    assert out[0, 0, 2, 3].item() == pytest.approx(x[0, 0, [0, 2, 4]][:, [1, 3, 5]].sum().item())


@pytest.mark.parametrize("size", [4, 5])
def test_a_factorised_reduction_reads_even_and_odd_pixels(size):
    module = FactorizedReduction(C, 5, Norm(affine=False, running=False), relu=False).double()
    x = images(size)
    padded = F.pad(x, (0, 1, 0, 1))
    even = torch.einsum("bcij,oc->boij", x[:, :, ::2, ::2], module.even.weight[:, :, 0, 0])
    odd = torch.einsum("bcij,oc->boij", padded[:, :, 1::2, 1::2], module.odd.weight[:, :, 0, 0])
    assert even.shape[1] == 2 and odd.shape[1] == 3
    expected = F.batch_norm(
        torch.cat([even, odd[:, :, : even.shape[2], : even.shape[3]]], 1), None, None, training=True
    )
    torch.testing.assert_close(module(x), expected)


def test_pools_against_a_loop():
    x = images(5)
    for module, reduce in ((AvgPool(C, 2), torch.mean), (MaxPool(C, 2), torch.amax)):
        out = module(x)
        assert out.shape == (B, C, 3, 3)
        for i, j in ((0, 0), (1, 2), (2, 2)):
            window = x[:, :, max(0, 2 * i - 1) : 2 * i + 2, max(0, 2 * j - 1) : 2 * j + 2]
            torch.testing.assert_close(out[:, :, i, j], reduce(window, (2, 3)))
    normed = AvgPool(C, 1, Norm(affine=False, running=False)).double()
    torch.testing.assert_close(normed(x), F.batch_norm(AvgPool(C)(x), None, None, training=True))


def test_norms_keep_what_they_say():
    assert not dict(Norm(affine=False, running=False).make(C).state_dict())
    assert set(Norm(affine=False).make(C).state_dict()) == {"running_mean", "running_var", "num_batches_tracked"}
    made = Norm(eps=1e-3, momentum=0.2).make(C)
    assert (made.eps, made.momentum) == (1e-3, 0.2)


def test_he_initialisation_keeps_the_scale():
    """ReLU of unit noise through a convolution of He's variance has second moment 1, whatever the fan-in."""
    x = torch.randn(64, 32, 9, 9, generator=generator(2))
    for module in (convolution(32, 64, 3), convolution(32, 32, 5, depthwise=True)):
        initialise(module, generator(3))
        inside = module(F.relu(x))[:, :, 2:-2, 2:-2]
        assert inside.square().mean().item() == pytest.approx(1.0, rel=0.15)
    twins = [ConvNorm(C, C, 3, Norm()) for _ in range(2)]
    for twin in twins:
        nn.init.zeros_(twin.norm.weight)
        initialise(twin, generator(4))
    assert all(torch.equal(a, b) for a, b in zip(twins[0].parameters(), twins[1].parameters(), strict=True))
    assert torch.equal(twins[0].norm.weight, torch.ones(C))
