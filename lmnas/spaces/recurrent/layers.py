"""Layers of LSTM or plain recurrent units: the baseline, and the result of compressing it.

`LSTM`, of one to three layers, is built and trained by the code that trains cells. With weight drop on the recurrent
weights it is AWD-LSTM (Merity et al., 2018, arXiv 1708.02182). Departure: all its layers have the embedding's width
(the paper: 400 / 1150 / 1150 / 400), so that the width alone matches a parameter budget.

Inner layers of `RecurrentLayers` may be of any size, as AWD-LSTM's are; the last layer has the embedding's width. A
plain layer is Elman's, h[t] = tanh(W x[t] + U h[t-1] + b).

Shapes: T time, B batch, H width of the embedding, units: a layer's own width.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from lmnas.core.contracts import Body, Choice, Diagram, Masks, Space, State
from lmnas.core.decisions import Decisions, OneOf
from lmnas.core.genotype import Genotype
from lmnas.nn.ops.dropout import draw_mask
from lmnas.spaces.recurrent import RECURRENT

CELLS = {"lstm": nn.LSTM, "rnn": nn.RNN}
Count = Annotated[int, Field(ge=1)]


class RecurrentLayers(Space):
    """LSTM or plain recurrent layers; inner layers may be of other sizes than the embedding."""

    name = "recurrent-layers"
    makes = RECURRENT
    noun = "cell"

    def __init__(self, *, max_layers: Annotated[int, Field(ge=1, le=8)] = 3, units: list[Count] | None = None):
        """
        Args:
            max_layers: the largest number of layers that may be chosen.
            units: sizes that an inner layer may have; default 16, 32, 64, 128, 256, 512.
        """
        sizes = tuple(dict.fromkeys(units or (16, 32, 64, 128, 256, 512)))
        inner = [
            OneOf(f"units_{i}", sizes, when=("layers", tuple(range(i + 1, max_layers + 1))))
            for i in range(1, max_layers)
        ]
        layers = OneOf("layers", tuple(range(1, max_layers + 1)))
        self.decisions = Decisions([OneOf("cell", tuple(CELLS)), layers, *inner])

    @classmethod
    def covering(cls, genotype: Genotype) -> "RecurrentLayers":
        sizes = [value for name, value in genotype.choices.items() if name.startswith("units_")]
        return cls(max_layers=8, units=[size for size in sizes if type(size) is int and size > 0])

    def build(self, genotype: Genotype, width: int) -> "LayersBody":
        self.check(genotype)
        inner = [genotype.choices[f"units_{i}"] for i in range(1, genotype.choices["layers"])]
        return LayersBody(genotype.choices["cell"], inner, width)

    def without_units(self, genotype: Genotype, width: int, inner: Sequence[int]) -> Genotype:
        return layers_of(genotype.choices["cell"], inner)

    def diagram(self, genotype: Genotype) -> Diagram:
        cell, layers = genotype.choices["cell"].upper(), genotype.choices["layers"]
        labels = [f"{cell} {i}: {genotype.choices[f'units_{i}']}" for i in range(1, layers)] + [f"{cell} {layers}"]
        return _chain(self.name, labels)


def layers_of(cell: str, inner: Sequence[int]) -> Genotype:
    """The genotype of `RecurrentLayers` with inner layers of the given sizes."""
    units = {f"units_{i}": count for i, count in enumerate(inner, start=1)}
    return Genotype(RecurrentLayers.name, {"cell": cell, "layers": len(inner) + 1, **units})


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

    def without_units(self, genotype: Genotype, width: int, inner: Sequence[int]) -> Genotype:
        """Itself while all layers agree, else layers of their own sizes."""
        return genotype if all(units == width for units in inner) else layers_of("lstm", inner)

    def diagram(self, genotype: Genotype) -> Diagram:
        return _chain(self.name, [f"LSTM {i}" for i in range(1, genotype.choices["layers"] + 1)])


def _chain(title: str, labels: list[str]) -> Diagram:
    """Layers one after the other, numbered from 1."""
    ops = [(str(i), label, "op") for i, label in enumerate(labels, start=1)]
    nodes = (("x", "x[t]", "input"), *ops, ("out", "h[t]", "output"))
    return Diagram(title, nodes, tuple((a, b, "") for (a, *_), (b, *_) in itertools.pairwise(nodes)))


class LayersBody(Body):
    """Stacked layers, (T, B, H) -> (T, B, H).

    State: for every layer its parts, h and (LSTM) c, stacked to (1 or 2, B, units).
    """

    def __init__(self, cell: str, inner: list[int], width: int):
        super().__init__(width)
        sizes = [width, *inner, width]
        self.layers = nn.ModuleList(CELLS[cell](a, b) for a, b in itertools.pairwise(sizes))

    def initialise(self, generator: torch.Generator, init_range: float) -> None:
        """Uniform in ±1/sqrt(units), PyTorch's own: at the cells' ±0.04 an LSTM would be a handicapped baseline."""
        for layer in self.layers:
            bound = 1.0 / math.sqrt(layer.get_parameter("weight_hh_l0").shape[1])
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def stacked(self) -> list[nn.Module]:
        return list(self.layers)

    def hidden(self, state: tuple[Tensor, ...]) -> list[Tensor]:
        """Per layer (B, units): h, which was the layer's output."""
        return [part[0] for part in state]

    def initial_state(self, batch_size: int) -> State:
        """Zeros, for each layer (2, B, units) of an LSTM or (1, B, units) of a plain layer."""
        like, layers = next(self.parameters()), list[Any](self.layers)
        parts = [(2 if isinstance(layer, nn.LSTM) else 1, layer.hidden_size) for layer in layers]
        return tuple(like.new_zeros(n, batch_size, size) for n, size in parts)

    def draw_masks(self, batch_size: int, rates: Mapping[str, float], generator: torch.Generator) -> Masks:
        """Masks as `forward` takes them: `x` before the first layer, `hidden_i` before layer i, `weight_i` on its
        recurrent weights (DropConnect)."""
        like = next(self.parameters())
        masks = {}
        if rates.get("x", 0.0) > 0:
            masks["x"] = draw_mask((batch_size, self.width), rates["x"], generator, like)
        for i, layer in enumerate(self.layers):
            if i > 0 and rates.get("hidden", 0.0) > 0:
                read = layer.get_parameter("weight_ih_l0").shape[1]
                masks[f"hidden_{i}"] = draw_mask((batch_size, read), rates["hidden"], generator, like)
            if rates.get("weight", 0.0) > 0:
                shape = layer.get_parameter("weight_hh_l0").shape
                masks[f"weight_{i}"] = draw_mask(shape, rates["weight"], generator, like)
        return masks

    def forward(self, inputs: Tensor, state: State, masks: Masks, choice: Choice = None) -> tuple[Tensor, State]:
        """(T, B, H) -> (T, B, H) and the last state.

        Args:
            masks: `x` (B, H), `hidden_i` (B, units of layer i - 1), `weight_i` of the recurrent matrix's shape.
        """
        outputs = inputs * masks["x"] if "x" in masks else inputs
        states = []
        for i, layer in enumerate(self.layers):
            if f"hidden_{i}" in masks:
                outputs = outputs * masks[f"hidden_{i}"]
            weights = {}
            if f"weight_{i}" in masks:
                weights = {"weight_hh_l0": layer.get_parameter("weight_hh_l0") * masks[f"weight_{i}"]}
            # an LSTM takes and gives a pair (h, c), a plain layer h alone
            parts = tuple(part[None].contiguous() for part in state[i])
            given = parts if len(parts) == 2 else parts[0]
            outputs, later = torch.func.functional_call(layer, weights, (outputs, given))
            states.append(torch.cat(later) if isinstance(later, tuple) else later)
        return outputs, tuple(states)


class LSTMBody(LayersBody):
    """LSTM layers of one width: (T, B, H) -> (T, B, H). State: per layer (h, c), stacked to (layers, 2, B, H)."""

    def __init__(self, layers: int, width: int):
        super().__init__("lstm", [width] * (layers - 1), width)

    def initial_state(self, batch_size: int) -> State:
        """Zeros (layers, 2, B, H)."""
        return torch.stack(super().initial_state(batch_size))

    def forward(self, inputs: Tensor, state: State, masks: Masks, choice: Choice = None) -> tuple[Tensor, State]:
        """(T, B, H) -> (T, B, H) and the last state (layers, 2, B, H); `masks` as in `LayersBody`."""
        outputs, states = super().forward(inputs, tuple(state), masks)
        return outputs, torch.stack(states)
