"""The network of a graph cell: layers of it, each reading the one before.

Shapes: T time, B batch, H a layer's width, n hidden states of the cell.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmnas.core.contracts import Body, Choice, Masks
from lmnas.nn.ops.dropout import draw_mask
from lmnas.spaces.recurrent.graph_form import INPUT, NEW, OLD, n_states, topological


class GraphLayer(nn.Module):
    """One layer: (T, B, in) -> (T, B, H). State: (n, B, H).

    All matrices that read one source are one parameter, `weights[source]` of (k H, in), for the k linear nodes in
    `readers[source]`: one product a source and step. `bias` is (linear nodes · H).
    """

    def __init__(self, recipe: Mapping[str, Any], in_width: int, width: int):
        super().__init__()
        self.recipe = {name: {"op": node["op"], "input": list(node["input"])} for name, node in recipe.items()}
        self.in_width, self.width = in_width, width
        self.n_states = n_states(recipe)
        self.order = topological(recipe)
        self.linears = [name for name in self.order if recipe[name]["op"] == "linear"]
        self.readers: dict[str, list[str]] = {}
        for name in self.linears:
            for source in recipe[name]["input"]:
                self.readers.setdefault(source, []).append(name)
        self.weights = nn.ParameterDict(
            {
                source: torch.empty(len(names) * width, in_width if source == INPUT else width)
                for source, names in self.readers.items()
            }
        )
        self.bias = nn.Parameter(torch.empty(len(self.linears) * width))

    @property
    def biases(self) -> Tensor:
        """(linear nodes, H), a view of `bias`."""
        return self.bias.view(-1, self.width)

    def matrix(self, name: str, position: int) -> tuple[Tensor, Tensor]:
        """(H, in): the matrix of linear node `name` for its input at `position`, and its gradient (zero before any)."""
        source = self.recipe[name]["input"][position]
        weight, row = self.weights[source], self.readers[source].index(name) * self.width
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        return weight.detach()[row : row + self.width], gradient[row : row + self.width]

    def forward(
        self, inputs: Tensor, state: Tensor, masks: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            inputs: (T, B, in).
            state: (n, B, H).
            masks: source -> mask on its matrices, (k H, H) for its k readers.

        Returns:
            (T, B, H) outputs, which are state 0 of each step, and the last state.
        """
        masks = masks or {}
        weights = {s: weight * masks[s] if s in masks else weight for s, weight in self.weights.items()}
        biases = dict(zip(self.linears, self.biases, strict=True))
        # x is known for all steps: one product
        read_x = F.linear(inputs, weights[INPUT]) if INPUT in weights else inputs
        outputs = []
        for t in range(len(inputs)):
            values = {f"{OLD}{i}": state[i] for i in range(self.n_states)}
            parts: dict[str, dict[str, Tensor]] = {}
            for name in self.order:
                op, sources = self.recipe[name]["op"], self.recipe[name]["input"]
                if op == "linear":
                    value = biases[name]
                    for source in sources:
                        if source not in parts:
                            whole = read_x[t] if source == INPUT else F.linear(values[source], weights[source])
                            pieces = whole.chunk(len(self.readers[source]), dim=-1)
                            parts[source] = dict(zip(self.readers[source], pieces, strict=True))
                        value = value + parts[source][name]
                    values[name] = value
                else:
                    values[name] = apply(op, [values[source] for source in sources])
            state = torch.stack([values[f"{NEW}{i}"] for i in range(self.n_states)])
            outputs.append(state[0])
        return torch.stack(outputs), state


def apply(op: str, inputs: Sequence[Tensor]) -> Tensor:
    """Operation without weights on one to three tensors (B, H): (B, H)."""
    a = inputs[0]
    if op == "blend":
        return a * inputs[1] + (1 - a) * inputs[2]
    if op == "elementwise_prod":
        return a * inputs[1]
    if op == "elementwise_sum":
        return a + inputs[1]
    if op == "activation_tanh":
        return torch.tanh(a)
    if op == "activation_sigm":
        return torch.sigmoid(a)
    assert op == "activation_leaky_relu", op
    return F.leaky_relu(a, 0.01)


class GraphBody(Body):
    """A stack of layers of one cell: (T, B, H) -> (T, B, H). State: (n, B, sum of the layers' widths)."""

    def __init__(self, recipe: Mapping[str, Any], width: int, layers: Sequence[int]):
        super().__init__(width)
        self.widths = list(layers)
        self.layers = nn.ModuleList(
            GraphLayer(recipe, before, own) for before, own in zip((width, *layers), layers, strict=False)
        )
        self.n_states = n_states(recipe)

    def initialise(self, generator: torch.Generator, init_range: float) -> None:
        """Uniform in ±1/sqrt(H) of each layer, as in the benchmark; `init_range` is for cells that have none."""
        for layer, width in zip(self.layers, self.widths, strict=True):
            bound = 1.0 / math.sqrt(width)
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def stacked(self) -> list[nn.Module]:
        return list(self.layers)

    def hidden(self, state: Tensor) -> list[Tensor]:
        """Per layer (B, H): state 0, which was the layer's output."""
        return [own[0] for own in state.split(self.widths, dim=-1)]

    def salient(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(matrix, its gradient), (H, in) each, of every linear node's inputs but the first, for synaptic saliency."""
        for layer in self.layers:
            assert isinstance(layer, GraphLayer)
            for name in layer.linears:
                for position in range(1, len(layer.recipe[name]["input"])):
                    yield layer.matrix(name, position)

    def initial_state(self, batch_size: int) -> Tensor:
        """Zeros (n, B, sum of the layers' widths)."""
        return next(self.parameters()).new_zeros(self.n_states, batch_size, sum(self.widths))

    def draw_masks(self, batch_size: int, rates: Mapping[str, float], generator: torch.Generator) -> Masks:
        """`x` and `hidden_i` (B, in) before the first layer and before layer i, `weight_i.SOURCE` of the shape of each
        parameter that does not read x."""
        like = next(self.parameters())
        masks = {}
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, GraphLayer)
            rate = rates.get("hidden" if i else "x", 0.0)
            if rate > 0:
                masks[f"hidden_{i}" if i else "x"] = draw_mask((batch_size, layer.in_width), rate, generator, like)
            if rates.get("weight", 0.0) > 0:
                for source, weight in layer.weights.items():
                    if source != INPUT:
                        masks[f"weight_{i}.{source}"] = draw_mask(weight.shape, rates["weight"], generator, like)
        return masks

    def forward(self, inputs: Tensor, state: Tensor, masks: Masks, choice: Choice = None) -> tuple[Tensor, Tensor]:
        """(T, B, H) -> (T, B, H) and the last state; `choice` is ignored: a stand-alone body can do one thing."""
        outputs, states = inputs, []
        for i, (layer, own) in enumerate(zip(self.layers, state.split(self.widths, dim=-1), strict=True)):
            between = f"hidden_{i}" if i else "x"
            if between in masks:
                outputs = outputs * masks[between]
            prefix = f"weight_{i}."
            dropped = {name.removeprefix(prefix): mask for name, mask in masks.items() if name.startswith(prefix)}
            outputs, last = layer(outputs, own, dropped)
            states.append(last)
        return outputs, torch.cat(states, dim=-1)
