"""Dropout as values: masks are drawn once, then passed along.

A mask that is an argument can be shared by two passes (second-order search must see the same noise twice), replayed
after a kill, and handed to a fused kernel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def draw_mask(shape: Sequence[int], rate: float, generator: torch.Generator, like: Tensor) -> Tensor:
    """A mask of zeros (probability `rate`) and 1 / (1 - rate), on the device and of the dtype of `like`.

    Drawn on the generator's device and then moved, so that one seed gives one mask wherever the model runs.
    """
    keep = torch.rand(tuple(shape), generator=generator, device=generator.device) >= rate
    return keep.to(device=like.device, dtype=like.dtype) / (1.0 - rate)
