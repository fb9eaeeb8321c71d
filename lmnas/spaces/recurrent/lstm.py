"""LSTM of one to three layers as a (tiny) space: the honest baseline, built and trained by the code that trains cells.

With weight drop on the recurrent weights it is AWD-LSTM (Merity et al., 2018, arXiv 1708.02182). Departure: all layers
have the embedding's width (the paper: 400 / 1150 / 1150 / 400), so that the width alone matches a parameter budget.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from lmnas.core.contracts import Body, Choice, Diagram, Masks, Space
from lmnas.core.decisions import Decisions, OneOf
from lmnas.core.genotype import Genotype
from lmnas.nn.ops.dropout import draw_mask
from lmnas.spaces.recurrent import RECURRENT


class LSTM(Space):
    """Decision: the number of layers."""

    name = "lstm"
    makes = RECURRENT
    noun = "cell"
    hand_made = "LSTM"

    def __init__(self, *, max_layers: Annotated[int, Field(ge=1, le=8)] = 3):
        """
        Args:
            max_layers: the largest number of layers that may be chosen.
        """
        self.decisions = Decisions([OneOf("layers", tuple(range(1, max_layers + 1)))])

    @classmethod
    def covering(cls, genotype: Genotype) -> "LSTM":
        return cls(max_layers=8)

    def build(self, genotype: Genotype, width: int) -> "LSTMBody":
        self.check(genotype)
        return LSTMBody(genotype.choices["layers"], width)

    def diagram(self, genotype: Genotype) -> Diagram:
        layers = range(1, genotype.choices["layers"] + 1)
        keys = ["x", *(str(layer) for layer in layers), "out"]
        nodes = [("x", "x[t]", "input"), *((str(i), f"LSTM {i}", "op") for i in layers), ("out", "h[t]", "output")]
        return Diagram("lstm", tuple(nodes), tuple((a, b, "") for a, b in itertools.pairwise(keys)))


class LSTMBody(Body):
    """(T, B, H) -> (T, B, H). State: per layer (h, c), stacked to (layers, 2, B, H)."""

    def __init__(self, layers: int, width: int):
        super().__init__(width)
        self.layers = nn.ModuleList(nn.LSTM(width, width) for _ in range(layers))

    def initialise(self, generator: torch.Generator, init_range: float) -> None:
        """Uniform in ±1/sqrt(H), PyTorch's own: an LSTM at the cells' ±0.04 would be a handicapped baseline."""
        bound = 1.0 / math.sqrt(self.width)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def stacked(self) -> list[nn.Module]:
        return list(self.layers)

    def hidden(self, state: Tensor) -> list[Tensor]:
        """Per layer (B, H): h, which was the layer's output."""
        return list(state[:, 0])

    def initial_state(self, batch_size: int) -> Tensor:
        return next(self.parameters()).new_zeros(len(self.layers), 2, batch_size, self.width)

    def draw_masks(self, batch_size: int, rates: Mapping[str, float], generator: torch.Generator) -> Masks:
        """`x` before the first layer, `hidden` between layers, `weight` on the recurrent weights (DropConnect)."""
        like = next(self.parameters())
        masks = {}
        if rates.get("x", 0.0) > 0:
            masks["x"] = draw_mask((batch_size, self.width), rates["x"], generator, like)
        for i in range(len(self.layers)):
            if i > 0 and rates.get("hidden", 0.0) > 0:
                masks[f"hidden_{i}"] = draw_mask((batch_size, self.width), rates["hidden"], generator, like)
            if rates.get("weight", 0.0) > 0:
                masks[f"weight_{i}"] = draw_mask((4 * self.width, self.width), rates["weight"], generator, like)
        return masks

    def forward(self, inputs: Tensor, state: Tensor, masks: Masks, choice: Choice = None) -> tuple[Tensor, Tensor]:
        outputs = inputs * masks["x"] if "x" in masks else inputs
        states = []
        for i, layer in enumerate(self.layers):
            if f"hidden_{i}" in masks:
                outputs = outputs * masks[f"hidden_{i}"]
            weights = {}
            if f"weight_{i}" in masks:
                weights = {"weight_hh_l0": layer.get_parameter("weight_hh_l0") * masks[f"weight_{i}"]}
            outputs, (h, c) = torch.func.functional_call(
                layer, weights, (outputs, (state[i, 0][None].contiguous(), state[i, 1][None].contiguous()))
            )
            states.append(torch.stack([h[0], c[0]]))
        return outputs, torch.stack(states)
