"""ENAS' macro space: whole convolutional networks, an operation for every layer and which earlier layers it also reads.

Pham et al., Efficient Neural Architecture Search via Parameter Sharing, 2018, section 2.3
(https://arxiv.org/abs/1802.03268); details that the paper leaves open follow the authors' code
(https://github.com/melodyguan/enas).

    layer 0   the stem: convolution 3x3, batch norm
    layer l   y = op(layer l - 1), op: ReLU, 1x1 convolution, batch norm, ReLU, then the chosen operation (pools: no
              batch norm after)
              from the second on: ReLU, 1x1 convolution of the concatenated [skips..., y], batch norm
    after layers L/3 and 2L/3 every earlier layer that is read later is halved (factorised reduction)
    features  the last layer's mean over its pixels

One class serves search and final training, so that a path of the supernet is the stand-alone network. Departures, each
from one of the authors' two networks, which differ from each other:
- Skips are concatenated and joined by a 1x1 convolution in the search as well (paper, final code); the search code sums
  them. The supernet's 1x1 convolution has a slice of weights for each layer that may be read.
- Separable convolutions are such; the final code builds dense ones by a slip (`separable: false` has them: the
  published accuracy is theirs). Pools work in the final network, where the code ends with an error.
- ReLU comes before convolutions (final code), not after batch norm (paper, search code).
- A reduction that nothing reads is left out; the published network has none such.

Shapes: B batch, S side of the image, C channels of the stem (`width`), L layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lmnas.core.contracts import Choice, Diagram, EdgeTable, ImageBody, Masks, Mixture, Relaxed, Supernet
from lmnas.core.decisions import Decisions, OneOf, Subset
from lmnas.core.errors import UserError, nearest
from lmnas.core.genotype import Genotype
from lmnas.nn.ops.conv import AvgPool, ConvNorm, DepthwiseSeparable, FactorizedReduction, MaxPool, Norm, initialise
from lmnas.nn.ops.dropout import draw_mask
from lmnas.spaces.conv.network import NORMS_UNDO

OPS = ("conv_3x3", "sep_conv_3x3", "conv_5x5", "sep_conv_5x5", "avg_pool_3x3", "max_pool_3x3")
"""Operations in the order of the authors' codes 0 to 5."""


def op_name(layer: int) -> str:
    return f"layer_{layer}.op"


def skips_name(layer: int) -> str:
    return f"layer_{layer}.skips"


class ConvMacro(Relaxed):
    """Decisions: for each layer its operation and the subset of earlier layers, all but the last, that it reads too."""

    name = "enas-macro"
    makes = frozenset({"image"})
    no_switches = NORMS_UNDO

    def __init__(
        self,
        *,
        layers: Annotated[int, Field(ge=1, le=64)] = 12,
        operations: Annotated[tuple[str, ...], Field(min_length=1)] = OPS,
        reductions: tuple[int, ...] | None = None,
        growth: Annotated[int, Field(ge=1, le=4)] = 2,
        search_growth: Annotated[int, Field(ge=1, le=4)] | None = None,
        separable: bool = True,
    ):
        """
        Args:
            layers: L, the stem not counted.
            operations: what a layer may apply.
            reductions: layers after which the image's side is halved; default: L/3 and 2L/3, rounded down.
            growth: factor on the channels at each reduction, stand-alone.
            search_growth: the same in the supernet (the authors' search: 1); default: `growth`. Where they differ,
                weights cannot be inherited.
            separable: false builds sep_conv operations as dense convolutions (the authors' final network).
        """
        for operation in operations:
            if operation not in OPS:
                raise UserError(f"space.operations: {operation!r} is unknown. " + nearest(operation, OPS))
        if len(set(operations)) != len(operations):
            raise UserError(f"space.operations: each may stand once, got {', '.join(operations)}")
        if reductions is None:
            reductions = tuple(sorted({layers // 3, 2 * layers // 3} - {0}))
        if list(reductions) != sorted(set(reductions)) or not all(0 < layer < layers for layer in reductions):
            raise UserError(
                f"space.reductions: expected rising numbers of layers from 1 to {layers - 1}, got {list(reductions)}"
            )
        self.layers = layers
        self.operations = tuple(operations)
        self.reductions = tuple(reductions)
        self.growth = growth
        self.search_growth = growth if search_growth is None else search_growth
        self.separable = separable
        self.decisions = Decisions(
            decision
            for layer in range(1, layers + 1)
            for decision in (
                OneOf(op_name(layer), self.operations, node=layer),
                *(
                    # the layer just before is always read, by the operation
                    (Subset(skips_name(layer), tuple(range(layer - 1)), node=layer, reads_node=True),)
                    if layer > 1
                    else ()
                ),
            )
        )

    @classmethod
    def covering(cls, genotype: Genotype) -> "ConvMacro":
        """A space of this kind with as many layers as `genotype`."""
        layers = sum(name.endswith(".op") for name in genotype.choices)
        if layers > 64:
            raise UserError(f"genotype {genotype.id}: {layers} layers, expected at most 64")
        return cls(layers=max(layers, 1))

    def program(self, genotype: Genotype) -> "list[Step]":
        choices = genotype.choices
        return [
            Step((choices[op_name(layer)],), tuple(choices[skips_name(layer)]) if layer > 1 else ())
            for layer in range(1, self.layers + 1)
        ]

    def build(self, genotype: Genotype, width: int) -> "MacroNetwork":
        """The stand-alone network; its batch norms keep running statistics."""
        self.check(genotype)
        return MacroNetwork(self.program(genotype), width, self.reductions, self.growth, self.separable, Norm())

    def supernet(self, width: int) -> "MacroSupernet":
        return MacroSupernet(self, width)

    def tables(self) -> tuple[EdgeTable, ...]:
        """`ops`: a row for each layer; `skips`: a row for each (layer, earlier layer) whose bit can be set."""
        ops = EdgeTable("ops", tuple((layer, layer - 1) for layer in range(1, self.layers + 1)), self.operations)
        pairs = tuple((layer, source) for layer in range(2, self.layers + 1) for source in range(layer - 1))
        return (ops, EdgeTable("skips", pairs, ("off", "on"))) if pairs else (ops,)

    def derive(self, mixture: Mixture) -> Genotype:
        """Each layer's operation of largest weight (ties to the first), and the skips whose `on` exceeds `off`."""
        choices: dict[str, Any] = {}
        for layer in range(1, self.layers + 1):
            choices[op_name(layer)] = self.operations[int(mixture["ops"][layer - 1].argmax())]
            if layer > 1:
                off, on = mixture["skips"][first_pair(layer) : first_pair(layer + 1)].T.tolist()
                choices[skips_name(layer)] = [source for source in range(layer - 1) if on[source] > off[source]]
        return Genotype(self.name, choices)

    def diagram(self, genotype: Genotype) -> Diagram:
        nodes = [("image", "image", "input"), ("0", "stem", "op")]
        links = [("image", "0", "")]
        for layer, step in enumerate(self.program(genotype), start=1):
            text = f"{layer}: {step.ops[0].replace('_', ' ')}"
            nodes.append((str(layer), text + ("\nthen half the size" if layer in self.reductions else ""), "op"))
            links += [(str(source), str(layer), "") for source in (*step.sources, layer - 1)]
        nodes.append(("out", "mean of pixels", "output"))
        return Diagram(f"{self.name}, {self.layers} layers", tuple(nodes), (*links, (str(self.layers), "out", "")))


def first_pair(layer: int) -> int:
    """The row of table `skips` at which those of `layer` begin: layers before it have 0 + 1 + ... + (layer - 3)."""
    return (layer - 1) * (layer - 2) // 2


@dataclass(frozen=True)
class Step:
    """One layer: its operations (one on a path) and the earlier layers that its join reads beside them."""

    ops: tuple[str, ...]
    sources: tuple[int, ...]


def _operation(name: str, channels: int, separable: bool, norm: Norm) -> nn.Module:
    """(B, C, S, S) -> (B, C, S, S)."""
    first = ConvNorm(channels, channels, 1, norm)
    if name.endswith("pool_3x3"):
        pool = AvgPool(channels) if name.startswith("avg") else MaxPool(channels)
        return nn.Sequential(first, nn.ReLU(), pool)
    kernel = int(name[-1])
    if name.startswith("sep") and separable:
        return nn.Sequential(first, DepthwiseSeparable(channels, channels, kernel, norm))
    return nn.Sequential(first, ConvNorm(channels, channels, kernel, norm))


class Layer(nn.Module):
    """An operation, and the join of its output with skips: all that `step` names, of which a pass may use a part."""

    def __init__(self, step: Step, channels: int, join: bool, separable: bool, norm: Norm):
        super().__init__()
        self.step, self.channels = step, channels
        self.ops = nn.ModuleDict({name: _operation(name, channels, separable, norm) for name in step.ops})
        # ReLU comes before the gates of a mixture
        self.join = ConvNorm(channels * (len(step.sources) + 1), channels, 1, norm, relu=False) if join else None

    def columns(self, sources: Sequence[int]) -> Tensor:
        """((sources + 1) · C,) indices of the join's input channels that belong to `sources` and to the operation."""
        blocks = [*(self.step.sources.index(source) for source in sources), len(self.step.sources)]
        return (torch.tensor(blocks)[:, None] * self.channels + torch.arange(self.channels)).flatten()

    def forward(
        self, x: Tensor, op: str | Tensor, skips: Mapping[int, Tensor], gates: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """
        Args:
            x: output of the layer before, (B, C, S, S).
            op: name of the operation; or (K,) weights of all.
            skips: outputs (B, C, S, S) of earlier layers, by layer, in the order of `step.sources`.
            gates: (number of skips,) factors on them.
            mask: (B, 1, 1, 1) on the operation's output.

        Returns:
            (B, C, S, S).
        """
        if isinstance(op, str):
            y = self.ops[op](x)
        else:
            y = sum(weight * self.ops[name](x) for weight, name in zip(op, self.step.ops, strict=True))
        if self.join is None:
            return y
        if mask is not None and skips:
            y = y * mask
        read = [F.relu(skip) for skip in skips.values()]
        if gates is not None:
            read = [gate * skip for gate, skip in zip(gates, read, strict=True)]
        columns = None if len(read) == len(self.step.sources) else self.columns(list(skips)).to(y.device)
        return self.join(torch.cat([*read, F.relu(y)], dim=1), columns)


class MacroNetwork(ImageBody):
    """A network of the space: images (B, 3, S, S) -> features (B, F).

    Attributes:
        width: channels of the stem.
        n_features: F, channels of the last layer.
        auxiliary_channels: of the map that an auxiliary head reads, just after the last reduction.
    """

    def __init__(
        self, steps: Sequence[Step], width: int, reductions: Sequence[int], growth: int, separable: bool, norm: Norm
    ):
        super().__init__(width)
        if width * growth < 2:
            raise UserError(f"width {width} without growth: a reduction needs at least 2 channels")
        self.steps = tuple(steps)
        channels = width
        self.halved = frozenset(reductions)
        self.stem = ConvNorm(3, width, 3, norm, relu=False)
        self.layers = nn.ModuleList()
        self.reductions = nn.ModuleDict()
        for number, step in enumerate(steps, start=1):
            self.layers.append(Layer(step, channels, number > 1, separable, norm))
            if number in self.halved:
                for source in sorted(_read_after(steps, number)):
                    reduction = FactorizedReduction(channels, channels * growth, norm, relu=False)
                    self.reductions[_reduction_name(number, source)] = reduction
                channels *= growth
        self.n_features = self.auxiliary_channels = channels

    def initialise(self, generator: torch.Generator, init_range: float) -> None:
        """He normal by fan_in (the authors' code); `init_range` is for other kinds of body."""
        initialise(self, generator)

    def draw_masks(self, batch_size: int, rates: Mapping[str, float], generator: torch.Generator) -> Masks:
        """`layer_i` (B, 1, 1, 1): drop-path of rate `path` on the operations of layers that read skips, drawn for each
        image. ENAS' macro networks were trained without."""
        rate = rates.get("path", 0.0)
        if rate <= 0:
            return {}
        layers = [number for number, step in enumerate(self.steps, start=1) if step.sources]
        like = self.stem.conv.weight
        return {f"layer_{number}": draw_mask((batch_size, 1, 1, 1), rate, generator, like) for number in layers}

    def maps(self, inputs: Tensor, masks: Masks, choice: Choice = None) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) -> features (B, F), and the newest layer (B, C', S', S') just after the last reduction."""
        return self._run(inputs, self.steps, masks)

    def _run(
        self, inputs: Tensor, steps: Sequence[Step], masks: Masks, mixture: Mixture | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run `steps`, each a part of the layer's own; a mixture weighs the operations and skips of whole layers.

        Shapes are those of `maps`.
        """
        # auxiliary: without a reduction it is the stem
        states = {0: self.stem(inputs)}
        auxiliary = states[0]
        for number, step in enumerate(steps, start=1):
            op: str | Tensor = step.ops[0]
            gates = None
            if mixture is not None:
                op = mixture["ops"][number - 1]
                gates = mixture["skips"][first_pair(number) : first_pair(number + 1), 1] if number > 1 else None
            skips = {source: states[source] for source in step.sources}
            mask = masks.get(f"layer_{number}")
            states[number] = self.layers[number - 1](states[number - 1], op, skips, gates, mask)
            if number in self.halved:
                read = sorted(_read_after(steps, number))
                states = {source: self.reductions[_reduction_name(number, source)](states[source]) for source in read}
                auxiliary = states[number]
        return states[len(steps)].mean(dim=(2, 3)), auxiliary


def _read_after(steps: Sequence[Step], number: int) -> set[int]:
    """Layers that some layer after `number` reads; `number` itself always."""
    return {number} | {source for step in steps[number:] for source in step.sources if source <= number}


def _reduction_name(number: int, source: int) -> str:
    return f"after_{number}_of_{source}"


class MacroSupernet(MacroNetwork, Supernet):
    """The weights of every network of a space; runs one path (a Genotype) or a mixture (table name -> weights).

    Its batch norms always use batch statistics.
    """

    def __init__(self, space: ConvMacro, width: int):
        steps = [Step(space.operations, tuple(range(layer - 1))) for layer in range(1, space.layers + 1)]
        growth = space.search_growth
        super().__init__(steps, width, space.reductions, growth, space.separable, Norm(running=False))
        self.space = space

    def maps(self, inputs: Tensor, masks: Masks, choice: Choice = None) -> tuple[Tensor, Tensor]:
        if isinstance(choice, Genotype):
            return self._run(inputs, self.space.program(choice), masks)
        if choice is None:
            raise ValueError("a supernet needs a choice: a genotype or a mixture")
        return self._run(inputs, self.steps, masks, choice)

    def inherit(self, genotype: Genotype) -> dict[str, Tensor]:
        """State of a stand-alone network: copies of the weights on path `genotype`, running statistics at their start.

        Raises:
            UserError: the stand-alone networks of the space have other channels.
        """
        space = self.space
        if space.growth != space.search_growth:
            raise UserError(
                f"space {space.name!r}: a stand-alone network of growth {space.growth} cannot inherit from a supernet "
                f"of search_growth {space.search_growth}"
            )
        state = space.build(genotype, self.width).to(self.stem.conv.weight).state_dict()
        own = self.state_dict()
        for name in state.keys() & own.keys():
            state[name] = own[name].clone()
        for number, step in enumerate(space.program(genotype), start=1):
            if number > 1:
                name = f"layers.{number - 1}.join.conv.weight"
                layer = self.layers[number - 1]
                assert isinstance(layer, Layer)
                columns = layer.columns(step.sources)
                state[name] = own[name][:, columns.to(own[name].device)].clone()
        return state
