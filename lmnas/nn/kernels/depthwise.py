"""Depthwise convolution with dilation 2 on CPU, where PyTorch has a fast backward pass without dilation alone.

With channels-last inputs it is brought to that case, exactly up to the order of sums:

- stride 2 reads the pixels of even rows and columns alone: an undilated convolution of these;
- with stride 1 the four phases (even and odd rows and columns) do not meet: they become a batch of smaller images.

Everything else, and every other device, is PyTorch's own convolution (`plain`), which defines what is right.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def plain(x: Tensor, weight: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
    """Every channel with its own kernel.

    Args:
        x: (B, C, S, S).
        weight: (C, 1, k, k), k odd.

    Returns:
        (B, C, ceil(S / stride), ceil(S / stride)): the image is padded with zeros.
    """
    padding = dilation * (weight.shape[-1] - 1) // 2
    return F.conv2d(x, weight, None, stride, padding, dilation, groups=weight.shape[0])


def depthwise(x: Tensor, weight: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
    """Depthwise convolution; arguments and result as those of `plain`."""
    if dilation == 2 and x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last):
        if stride == 2:
            return plain(x[:, :, ::2, ::2].contiguous(memory_format=torch.channels_last), weight)
        if stride == 1 and x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0:
            return _together(plain(_apart(x), weight), x.shape)
    return plain(x, weight, stride, dilation)


def _apart(x: Tensor) -> Tensor:
    """(B, C, S, S) -> (4 B, C, S / 2, S / 2): the phases of even and odd rows and columns, channels last."""
    b, c, rows, columns = x.shape
    split = x.permute(0, 2, 3, 1).reshape(b, rows // 2, 2, columns // 2, 2, c)
    return split.permute(2, 4, 0, 1, 3, 5).reshape(4 * b, rows // 2, columns // 2, c).permute(0, 3, 1, 2)


def _together(x: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_apart`."""
    b, c, rows, columns = shape
    split = x.permute(0, 2, 3, 1).reshape(2, 2, b, rows // 2, columns // 2, c)
    return split.permute(2, 3, 0, 4, 1, 5).reshape(b, rows, columns, c).permute(0, 3, 1, 2)
