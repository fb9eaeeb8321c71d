"""CIFAR's residual networks as a (tiny) space: the hand-made baseline of image tasks.

He et al., Deep Residual Learning, 2016 (arXiv 1512.03385), section 4.2: a 3x3 convolution, then three stages of n basic
blocks at C, 2C and 4C channels, 6n+2 layers in all. Shortcuts are option A: no weights; where a stage begins, every
other pixel is taken and the new channels are zeros. ResNet-20 (n = 3, C = 16) has 0.27 M parameters.
"""

from collections.abc import Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lmnas.core.contracts import Choice, Diagram, ImageBody, Masks, Space
from lmnas.core.decisions import Decisions, OneOf
from lmnas.core.genotype import Genotype
from lmnas.nn.ops.dropout import draw_mask

STAGES = 3
LARGEST = 18
"""Blocks in a stage of ResNet-110, the deepest that the paper recommends."""


class ResNet(Space):
    """Decision: the number of basic blocks in each of three stages."""

    name = "resnet"
    makes = frozenset({"image"})
    hand_made = "ResNet"

    def __init__(self, *, max_blocks: Annotated[int, Field(ge=1, le=LARGEST)] = 3):
        """
        Args:
            max_blocks: the largest number of blocks in a stage that may be chosen; n blocks make 6n+2 layers.
        """
        self.decisions = Decisions([OneOf("blocks", tuple(range(1, max_blocks + 1)))])

    @classmethod
    def covering(cls, genotype: Genotype) -> "ResNet":
        return cls(max_blocks=LARGEST)

    def build(self, genotype: Genotype, width: int) -> "ResNetBody":
        self.check(genotype)
        return ResNetBody(genotype.choices["blocks"], width)

    def diagram(self, genotype: Genotype) -> Diagram:
        n = genotype.choices["blocks"]
        nodes = [("x", "image", "input"), ("stem", "conv 3x3", "op")]
        nodes += [(f"s{i}", f"{n} block{'s' if n > 1 else ''}, {c}C", "op") for i, c in enumerate(("", "2", "4"))]
        nodes += [("out", "mean", "output")]
        keys = [key for key, _, _ in nodes]
        strides = ("", "", "half", "half", "")
        return Diagram(f"resnet-{6 * n + 2}", tuple(nodes), tuple(zip(keys, keys[1:], strides, strict=False)))


class BasicBlock(nn.Module):
    """relu(shortcut(x) + BN(conv(relu(BN(conv(x)))))), both convolutions 3x3, the first with the stride."""

    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        self.stride, self.n_new = stride, n_out - n_in
        self.conv_1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.norm_1 = nn.BatchNorm2d(n_out)
        self.conv_2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.norm_2 = nn.BatchNorm2d(n_out)

    def forward(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """(B, n_in, S, S) -> (B, n_out, S / stride, S / stride); `mask` (B, 1, 1, 1) on the branch."""
        branch = self.norm_2(self.conv_2(F.relu(self.norm_1(self.conv_1(inputs)))))
        if mask is not None:
            branch = branch * mask
        shortcut = inputs[:, :, :: self.stride, :: self.stride]
        if self.n_new:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.n_new))
        return F.relu(shortcut + branch)


class ResNetBody(ImageBody):
    """Residual network: (B, 3, S, S) -> (B, 4C), C = `width`."""

    def __init__(self, n: int, width: int):
        super().__init__(width, 4 * width)
        self.auxiliary_channels = 4 * width
        self.conv = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        channels = [width * 2**stage for stage in range(STAGES) for _ in range(n)]
        self.blocks = nn.ModuleList(
            BasicBlock(n_in, n_out, 1 if n_in == n_out else 2)
            for n_in, n_out in zip([width, *channels], channels, strict=False)
        )
        self.tapped = 2 * n
        """The block that the third stage begins with: an auxiliary head reads its map."""

    def initialise(self, generator: torch.Generator, init_range: float) -> None:
        """He normal by fan-out (He et al., 2015, arXiv 1502.01852), batch norm 1 and 0; `init_range` has no use."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)

    def draw_masks(self, batch_size: int, rates: Mapping[str, float], generator: torch.Generator) -> Masks:
        """`path_i` (B, 1, 1, 1): mask of the images that pass through block i's branch; the first block has none."""
        rate, like = rates.get("path", 0.0), self.conv.weight
        if rate <= 0:
            return {}
        shape = (batch_size, 1, 1, 1)
        return {f"path_{i}": draw_mask(shape, rate, generator, like) for i in range(1, len(self.blocks))}

    def maps(self, inputs: Tensor, masks: Masks, choice: Choice = None) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) -> features (B, 4C), and the map that an auxiliary head reads, (B, 4C, S / 4, S / 4)."""
        outputs = F.relu(self.norm(self.conv(inputs)))
        tapped = outputs
        for i, block in enumerate(self.blocks):
            outputs = block(outputs, masks.get(f"path_{i}"))
            if i == self.tapped:
                tapped = outputs
        return outputs.mean((2, 3)), tapped
