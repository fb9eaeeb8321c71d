"""Residual networks: parameters by formula, shortcuts without weights, a plain forward pass."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from lmnas.core.genotype import load_genotype
from lmnas.core.seeds import generator
from lmnas.runs.build import covering_space


def body(name, width):
    genotype = load_genotype(name)
    built = covering_space(genotype).build(genotype, width)
    built.initialise(generator(0, "resnet"), 0.1)
    return built


def expected_parameters(n, c):
    """Convolutions 3x3 without biases: 3 -> c, then per stage of s channels 2n - 1 of s -> s and the first from the
    stage before (the first stage: 2n of c -> c); two numbers per channel and batch norm."""
    convolutions = 3 * c + 2 * n * c * c + sum((s // 2) * s + (2 * n - 1) * s * s for s in (2 * c, 4 * c))
    return 9 * convolutions + 2 * (c + 2 * n * (c + 2 * c + 4 * c))


@pytest.mark.parametrize(
    "name, n, published",
    # Table 6 of the paper, in millions
    [("resnet-20", 3, 0.27), ("resnet-32", 5, 0.46), ("resnet-44", 7, 0.66), ("resnet-56", 9, 0.85)],
)
def test_parameters_are_the_published_ones(name, n, published):
    count = sum(p.numel() for p in body(name, 16).parameters())
    assert count == expected_parameters(n, 16)
    assert round((count + 64 * 10 + 10) / 1e6, 2) == published


def test_operations_of_resnet_20():
    """Multiply-adds by hand: 9 x in x out x pixels of every convolution."""
    c, n, side = 16, 3, 32
    hand = 9 * 3 * c * side**2 + 2 * n * 9 * c * c * side**2
    for stage in (1, 2):
        s, pixels = c * 2**stage, (side // 2**stage) ** 2
        hand += 9 * (s // 2) * s * pixels + (2 * n - 1) * 9 * s * s * pixels
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        body("resnet-20", c)(torch.zeros(1, 3, side, side), None, {})
    assert counter.get_total_flops() == 2 * hand


def test_the_pass_by_hand():
    """One block per stage, evaluated plainly with functions; shortcuts are every other pixel, and zeros."""
    net = body("resnet-8", 4).eval()
    generator_ = generator(0, "inputs")
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand(buffer.shape, generator=generator_) + 0.5)
    x = torch.randn(2, 3, 8, 8, generator=generator_)
    weights = dict(net.state_dict())

    def normed(z, key):
        part = {k: weights[f"{key}.{k}"].view(-1, 1, 1) for k in ("running_mean", "running_var", "weight", "bias")}
        return (z - part["running_mean"]) / (part["running_var"] + 1e-5).sqrt() * part["weight"] + part["bias"]

    h = normed(F.conv2d(x, weights["conv.weight"], padding=1), "norm").clamp(min=0)
    taps = []
    for i, stride in enumerate((1, 2, 2)):
        branch = normed(
            F.conv2d(h, weights[f"blocks.{i}.conv_1.weight"], stride=stride, padding=1), f"blocks.{i}.norm_1"
        )
        branch = normed(
            F.conv2d(branch.clamp(min=0), weights[f"blocks.{i}.conv_2.weight"], padding=1), f"blocks.{i}.norm_2"
        )
        short = h[:, :, ::stride, ::stride]
        if stride == 2:
            short = torch.cat([short, torch.zeros_like(short)], dim=1)
        h = (short + branch).clamp(min=0)
        taps.append(h)
    features, tapped = net.maps(x, {})
    torch.testing.assert_close(features, h.mean((2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tapped, taps[2], rtol=1e-4, atol=1e-5)


def test_a_path_that_is_left_out():
    """With a mask of zeros a block is its shortcut; the first block always runs."""
    net = body("resnet-20", 4)
    masks = net.draw_masks(5, {"path": 0.5, "hidden": 0.9}, generator(0))
    assert sorted(masks) == sorted(f"path_{i}" for i in range(1, 9))
    assert all(mask.shape == (5, 1, 1, 1) for mask in masks.values())
    x = torch.rand(5, 4, 8, 8)
    out = net.blocks[1](x, torch.zeros(5, 1, 1, 1))
    assert torch.equal(out, x)
