"""Convolutional operations of the ENAS and DARTS spaces: (B, C, S, S) -> (B, C', ceil(S / stride), ceil(S / stride)).

DARTS (Liu et al., 2019, arXiv 1806.09055, section 3.1.1) and ENAS (Pham et al., 2018, arXiv 1802.03268, sections 2.3
and 2.4): convolutions come in the order ReLU, convolution, batch norm, without biases. Nothing here asks for a memory
layout: channels-last inputs stay so.

Departure: the factorised reduction pads an odd size by a row and a column of zeros, as ENAS' code does; DARTS' code
takes even sizes only.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmnas.nn.kernels.depthwise import depthwise


@dataclass(frozen=True)
class Norm:
    """A batch norm to be made.

    Attributes:
        affine: with a learned scale and shift.
        running: keeps running statistics for evaluation; without, batch statistics always.
        eps, momentum: as in `nn.BatchNorm2d`.
    """

    affine: bool = True
    running: bool = True
    eps: float = 1e-5
    momentum: float = 0.1

    def make(self, channels: int) -> nn.BatchNorm2d:
        return nn.BatchNorm2d(channels, self.eps, self.momentum, affine=self.affine, track_running_stats=self.running)


def convolution(
    c_in: int, c_out: int, kernel: int, stride: int = 1, dilation: int = 1, depthwise: bool = False
) -> nn.Conv2d:
    """Without bias, padded so that the size is divided by `stride`, rounded up."""
    padding = dilation * (kernel - 1) // 2
    groups = c_in if depthwise else 1
    return nn.Conv2d(c_in, c_out, kernel, stride, padding, dilation, groups=groups, bias=False)


def _convolve(conv: nn.Conv2d, x: Tensor, columns: Tensor | None) -> Tensor:
    if columns is None:
        return conv(x)
    return F.conv2d(x, conv.weight[:, columns], None, conv.stride, conv.padding)


class ConvNorm(nn.Module):
    """Convolution, batch norm: a stem, or with `relu` the ReLU-conv-BN that everything else is made of.

    Called with `columns` ((n,) indices), the input has these of the `c_in` channels and the weight takes part with
    theirs alone; so does `FactorizedReduction`.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, norm: Norm, stride: int = 1, relu: bool = True):
        super().__init__()
        self.relu = relu
        self.conv = convolution(c_in, c_out, kernel, stride)
        self.norm = norm.make(c_out)

    def forward(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        return self.norm(_convolve(self.conv, F.relu(x) if self.relu else x, columns))


class DepthwiseSeparable(nn.Module):
    """ReLU, depthwise convolution, 1x1 convolution, batch norm; dilated with `dilation` 2."""

    def __init__(self, c_in: int, c_out: int, kernel: int, norm: Norm, stride: int = 1, dilation: int = 1):
        super().__init__()
        self.depthwise = convolution(c_in, c_in, kernel, stride, dilation, depthwise=True)
        self.pointwise = convolution(c_in, c_out, 1)
        self.norm = norm.make(c_out)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.depthwise
        return self.norm(self.pointwise(depthwise(F.relu(x), conv.weight, conv.stride[0], conv.dilation[0])))


class SeparableConv(nn.Module):
    """The depthwise separable convolution applied twice, the stride in the first."""

    def __init__(self, c_in: int, c_out: int, kernel: int, norm: Norm, stride: int = 1):
        super().__init__()
        self.first = DepthwiseSeparable(c_in, c_in, kernel, norm, stride)
        self.second = DepthwiseSeparable(c_in, c_out, kernel, norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class FactorizedReduction(nn.Module):
    """Half the size: two 1x1 convolutions of stride 2, the second one pixel off, half the channels each, batch norm.

    DARTS has a ReLU before it, ENAS none.
    """

    def __init__(self, c_in: int, c_out: int, norm: Norm, relu: bool = True):
        super().__init__()
        self.relu = relu
        self.even = convolution(c_in, c_out // 2, 1, stride=2)
        self.odd = convolution(c_in, c_out - c_out // 2, 1, stride=2)
        self.norm = norm.make(c_out)

    def forward(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        if self.relu:
            x = F.relu(x)
        shifted = x if x.shape[-1] % 2 == 0 else F.pad(x, (0, 1, 0, 1))
        halves = [_convolve(self.even, x, columns), _convolve(self.odd, shifted[:, :, 1:, 1:], columns)]
        return self.norm(torch.cat(halves, dim=1))


class AvgPool(nn.Module):
    """3x3 mean over the pixels inside the image (the padding is not counted), then a batch norm if given."""

    def __init__(self, channels: int, stride: int = 1, norm: Norm | None = None):
        super().__init__()
        self.stride = stride
        self.norm = nn.Identity() if norm is None else norm.make(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.avg_pool2d(x, 3, self.stride, padding=1, count_include_pad=False))


class MaxPool(nn.Module):
    """3x3 maximum, then a batch norm if given."""

    def __init__(self, channels: int, stride: int = 1, norm: Norm | None = None):
        super().__init__()
        self.stride = stride
        self.norm = nn.Identity() if norm is None else norm.make(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.max_pool2d(x, 3, self.stride, padding=1))


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """He normal for convolutions (He et al., 2015, arXiv 1502.01852, eq. 10), batch norm to scale 1 and shift 0.

    The standard deviation is sqrt(2 / fan_in), fan_in the number of inputs that one output reads: k^2 for a depthwise
    convolution. Modules are taken in order, so one generator gives one network.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            fan_in = part.weight[0].numel()
            nn.init.normal_(part.weight, 0.0, math.sqrt(2.0 / fan_in), generator=generator)
        elif isinstance(part, nn.BatchNorm2d):
            part.reset_parameters()
