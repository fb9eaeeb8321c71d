"""FlexiBERT: heterogeneous Transformer encoders; every layer has an operation, heads and feed-forward stack of its own.

Tuli et al., "FlexiBERT: Are Current Transformer Architectures too Homogeneous and Rigid?", JAIR 2023, arXiv 2205.11656.
The form `reduced` is the space of NAS-Bench-BERT: one hidden size a model and one feed-forward width a layer (Serianni
& Kalita, ACL 2023, arXiv 2306.00288). Sizes: 240² + 240⁴ = 3.318e9 and 2 · (48² + 48⁴) = 10,621,440.

Three networks stand behind one genotype, and `Network` names them:
    flexibert: the paper's. Relative keys; W of SA-WMA is one D x D matrix; LT is attention by position and a transform.
    trained: what NAS-Bench-BERT trained. No relative keys; W is H x H; LT is a linear map and each head's transform.
    scored: what its metrics were computed on. As `trained`, but without output map, residual and norm around LT, and
        256 wide with feed-forward width 1024 whatever the genotype says (`metric_body`).
Parameter counts of the latter two equal the published and derived ones of NAS-Bench-BERT.

Departures: dropout masks are drawn once for a sequence, not once a position (they are values: `ops.dropout`), and there
is none on attention weights. Positions come from the relative keys; absolute ones, if any, are the embedding's.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lmnas.core.contracts import Body, Choice, Diagram, Masks, Space
from lmnas.core.decisions import Decision, Decisions, OneOf
from lmnas.core.errors import UserError
from lmnas.core.genotype import Genotype
from lmnas.nn.ops.attention import Attention, HeadTransform, SpanConvolution, TransformAttention
from lmnas.nn.ops.dropout import draw_mask

OPERATIONS = ("SA-SDP", "SA-WMA", "LT-DFT", "LT-DCT", "DSC-5", "DSC-9")
Network = Literal["flexibert", "trained", "scored"]
SCORED_HIDDEN, SCORED_FEED_FORWARD = 256, 1024
MAX_LENGTH = 512
NORM_EPSILON = 1e-12

Sizes = Annotated[tuple[Annotated[int, Field(ge=1, le=65_536)], ...], Field(min_length=1)]


@dataclass(frozen=True)
class Layer:
    """One encoder layer: `feed_forward` has a width for each hidden layer of the stack."""

    operation: str
    heads: int
    hidden: int
    feed_forward: tuple[int, ...]


def choice_name(layer: int, what: str) -> str:
    return f"layer_{layer}.{what}"


class FlexiBERT(Space):
    """Decisions: the number of layers; for each, operation, heads, hidden size, feed-forward stack and widths."""

    name = "flexibert"
    makes = frozenset({"sequence", "bidirectional", "transformer"})

    def __init__(
        self,
        *,
        form: Literal["full", "reduced"] = "full",
        layers: Sizes = (2, 4),
        hidden: Sizes = (128, 256),
        heads: Sizes = (2, 4),
        feed_forward: Sizes = (512, 1024),
        stacks: Sizes = (1, 3),
        max_length: Annotated[int, Field(ge=1, le=65_536)] = MAX_LENGTH,
    ):
        """
        Args:
            form: `full`: sizes may differ from layer to layer and within a stack; `reduced`: one hidden size a model,
                one feed-forward width a layer.
            layers: how many layers there may be.
            hidden: hidden sizes that may be chosen; multiples of every number of heads.
            heads: even, because half of DSC's heads convolve.
            feed_forward: widths of the hidden feed-forward layers.
            stacks: how many hidden layers a feed-forward stack may have.
            max_length: longest sequence that relative keys reach.
        """
        offers: dict[str, tuple[int, ...]] = {"layers": layers, "hidden": hidden, "heads": heads}
        offers |= {"feed_forward": feed_forward, "stacks": stacks}
        for setting, sizes in offers.items():
            if len(set(sizes)) != len(sizes):
                raise UserError(f"space.{setting}: each may stand once, got {', '.join(map(str, sizes))}")
        for count in heads:
            if count % 2:
                raise UserError(f"space.heads: expected even numbers (half of DSC's heads convolve), got {count}")
            for size in hidden:
                if size % count:
                    raise UserError(f"space.hidden: {size} is not a multiple of {count} heads")
        self.form, self.max_length = form, max_length
        self.decisions = Decisions(
            _reduced(layers, hidden, heads, feed_forward, stacks)
            if form == "reduced"
            else _full(layers, hidden, heads, feed_forward, stacks)
        )

    @classmethod
    def covering(cls, genotype: Genotype) -> "FlexiBERT":
        choices = genotype.choices

        def found(*names: str) -> tuple[int, ...]:
            values = {value for key, value in choices.items() if key.rpartition(".")[2].startswith(names)}
            return tuple(sorted(value for value in values if type(value) is int and value > 0))

        named = {"layers": found("layers"), "heads": found("heads"), "feed_forward": found("feed_forward")}
        named |= {"hidden": found("hidden"), "stacks": found("stacks")}
        sizes: dict[str, Any] = {key: values for key, values in named.items() if values}
        return cls(form="reduced" if "hidden" in choices else "full", **sizes)

    def build(self, genotype: Genotype, width: int) -> "Encoder":
        self.check(genotype)
        return Encoder(layers_of(genotype), width, "flexibert", self.max_length)

    def diagram(self, genotype: Genotype) -> Diagram:
        nodes, edges, before = [("x", "embeddings", "input")], [], "x"
        for i, layer in enumerate(layers_of(genotype), start=1):
            widths = " · ".join(map(str, layer.feed_forward))
            nodes.append((f"{i}a", f"{i}: {layer.operation}, {layer.heads} heads, {layer.hidden}", "op"))
            nodes.append((f"{i}b", f"feed-forward {widths}", "op"))
            edges += [(before, f"{i}a", ""), (f"{i}a", f"{i}b", "")]
            before = f"{i}b"
        nodes.append(("out", "features", "output"))
        return Diagram(f"flexibert, {self.form}", tuple(nodes), (*edges, (before, "out", "")))


def _full(layers: Sizes, hidden: Sizes, heads: Sizes, feed_forward: Sizes, stacks: Sizes) -> list[Decision]:
    decisions: list[Decision] = [OneOf("layers", layers)]
    for i in range(1, max(layers) + 1):
        deep = None if i <= min(layers) else ("layers", tuple(n for n in layers if n >= i))
        decisions += [
            OneOf(choice_name(i, "operation"), OPERATIONS, node=i, when=deep),
            OneOf(choice_name(i, "heads"), heads, node=i, when=deep),
            OneOf(choice_name(i, "hidden"), hidden, node=i, when=deep),
            OneOf(choice_name(i, "stacks"), stacks, node=i, when=deep),
        ]
        for j in range(1, max(stacks) + 1):
            # an inactive `stacks` is none of the values, so a layer that is not there asks for no widths either
            tall = (choice_name(i, "stacks"), tuple(n for n in stacks if n >= j))
            decisions.append(OneOf(choice_name(i, f"feed_forward_{j}"), feed_forward, node=i, when=tall))
    return decisions


def _reduced(layers: Sizes, hidden: Sizes, heads: Sizes, feed_forward: Sizes, stacks: Sizes) -> list[Decision]:
    decisions: list[Decision] = [OneOf("hidden", hidden), OneOf("layers", layers)]
    for i in range(1, max(layers) + 1):
        deep = None if i <= min(layers) else ("layers", tuple(n for n in layers if n >= i))
        decisions += [
            OneOf(choice_name(i, "operation"), OPERATIONS, node=i, when=deep),
            OneOf(choice_name(i, "heads"), heads, node=i, when=deep),
            OneOf(choice_name(i, "feed_forward"), feed_forward, node=i, when=deep),
            OneOf(choice_name(i, "stacks"), stacks, node=i, when=deep),
        ]
    return decisions


def layers_of(genotype: Genotype) -> list[Layer]:
    """The layers that a genotype of either form stands for."""
    choices, layers = genotype.choices, []
    for i in range(1, choices["layers"] + 1):
        stacks = range(1, choices[choice_name(i, "stacks")] + 1)
        if "hidden" in choices:
            hidden, widths = choices["hidden"], [choices[choice_name(i, "feed_forward")] for _ in stacks]
        else:
            hidden = choices[choice_name(i, "hidden")]
            widths = [choices[choice_name(i, f"feed_forward_{j}")] for j in stacks]
        operation, heads = choices[choice_name(i, "operation")], choices[choice_name(i, "heads")]
        layers.append(Layer(operation, heads, hidden, tuple(widths)))
    return layers


def as_scored(
    layers: Sequence[Layer], hidden: int = SCORED_HIDDEN, feed_forward: int = SCORED_FEED_FORWARD
) -> list[Layer]:
    """The layers of the network that NAS-Bench-BERT's metrics were computed on: hidden size and widths are ignored."""
    return [replace(layer, hidden=hidden, feed_forward=(feed_forward,) * len(layer.feed_forward)) for layer in layers]


def as_trained(layers: Sequence[Layer]) -> list[Layer]:
    """The layers as NAS-Bench-BERT's released training code has them: the first feed-forward layer is 4 · hidden wide,
    whatever its configured width, and only those stacked upon it have that width."""
    return [replace(layer, feed_forward=(4 * layer.hidden, *layer.feed_forward[1:])) for layer in layers]


def operation_of(layer: Layer, network: Network, max_length: int) -> nn.Module:
    kind, _, parameter = layer.operation.partition("-")
    reach = max_length if network == "flexibert" else None
    if kind == "DSC":
        return SpanConvolution(layer.hidden, layer.heads, int(parameter), reach)
    if kind == "SA":
        weighted: Literal["head", "full"] = "head" if network == "flexibert" else "full"
        return Attention(layer.hidden, layer.heads, weighted if parameter == "WMA" else None, reach)
    transform: Literal["DFT", "DCT"] = "DFT" if parameter == "DFT" else "DCT"
    if network == "flexibert":
        return TransformAttention(layer.hidden, layer.heads, transform, max_length)
    return HeadTransform(layer.hidden, layer.heads, transform)


class FeedForward(nn.Module):
    """Linear maps with GELU between them, back to the hidden size. (B, T, H) -> (B, T, H)."""

    def __init__(self, hidden: int, widths: Sequence[int]):
        super().__init__()
        sizes = [hidden, *widths, hidden]
        self.maps = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.activation = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.maps[:-1]:
            x = self.activation(linear(x))
        return self.maps[-1](x)


class EncoderLayer(nn.Module):
    """Operation, output map, add & norm; feed-forward stack, add & norm. (B, T, H) -> (B, T, H)."""

    def __init__(self, layer: Layer, network: Network, max_length: int):
        super().__init__()
        self.operation = operation_of(layer, network, max_length)
        bare = network == "scored" and layer.operation.startswith("LT")
        self.projection = None if bare else nn.Linear(layer.hidden, layer.hidden)
        self.norm = None if bare else nn.LayerNorm(layer.hidden, eps=NORM_EPSILON)
        self.feed_forward = FeedForward(layer.hidden, layer.feed_forward)
        self.feed_forward_norm = nn.LayerNorm(layer.hidden, eps=NORM_EPSILON)

    def forward(self, x: Tensor, lengths: Tensor | None, dropped: tuple[Tensor | float, Tensor | float]) -> Tensor:
        """`dropped`: masks (B, 1, H) on the outputs of the operation and of the feed-forward stack."""
        mixed = self.operation(x, lengths)
        if self.projection is not None and self.norm is not None:
            mixed = self.norm(x + self.projection(mixed) * dropped[0])
        return self.feed_forward_norm(mixed + self.feed_forward(mixed) * dropped[1])


class Encoder(Body):
    """(T, B, H) embeddings -> (T, B, F) features, F = `n_features`, the last layer's hidden size. It looks both ways.

    A linear map leads to the first layer where its size differs from the embeddings' `width`, and from layer to layer
    where their sizes differ. Nothing is carried from segment to segment.
    """

    def __init__(
        self, layers: Sequence[Layer], width: int, network: Network = "flexibert", max_length: int = MAX_LENGTH
    ):
        super().__init__(width, layers[-1].hidden)
        self.max_length = max_length
        self.hidden_sizes = [layer.hidden for layer in layers]
        sizes = [width, *self.hidden_sizes]
        self.bridges = nn.ModuleList(nn.Linear(a, b) if a != b else nn.Identity() for a, b in itertools.pairwise(sizes))
        self.layers = nn.ModuleList(EncoderLayer(layer, network, max_length) for layer in layers)

    def initialise(self, generator: torch.Generator, init_range: float) -> None:
        """Normal with deviation `init_range` (BERT: 0.02), biases zero; a shared W of SA-WMA uniform in ±0.1 (3.1)."""
        uniform = {id(m.weight.weight) for m in self.modules() if isinstance(m, Attention) and m.weighted == "head"}
        norms = {id(p) for m in self.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
        for name, parameter in self.named_parameters():
            if id(parameter) in norms:
                nn.init.constant_(parameter, float(name.endswith("weight")))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif id(parameter) in uniform:
                nn.init.uniform_(parameter, -0.1, 0.1, generator=generator)
            else:
                nn.init.normal_(parameter, 0.0, init_range, generator=generator)

    def stacked(self) -> list[nn.Module]:
        return list(self.layers)

    def draw_masks(self, batch_size: int, rates: Mapping[str, float], generator: torch.Generator) -> Masks:
        """`x` on the embeddings; `hidden` on the output of each operation and each feed-forward stack. (B, H) each."""
        like = next(self.parameters())
        masks = {}
        if rates.get("x", 0.0) > 0:
            masks["x"] = draw_mask((batch_size, self.width), rates["x"], generator, like)
        if rates.get("hidden", 0.0) > 0:
            for i, hidden in enumerate(self.hidden_sizes):
                shape = (batch_size, hidden)
                for part in ("operation", "feed_forward"):
                    masks[f"{part}_{i}"] = draw_mask(shape, rates["hidden"], generator, like)
        return masks

    def forward(
        self, inputs: Tensor, state: None, masks: Masks, choice: Choice = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """`lengths` (B,): number of real positions of each sequence; features of the others mean nothing.

        Raises:
            UserError: longer than `max_length`.
        """
        given, most = inputs.shape[0], self.max_length
        if most is not None and given > most:
            raise UserError(f"a sequence of {given} positions; this encoder takes {most} at most (space.max_length)")

        def mask(name: str) -> Tensor | float:
            return masks[name][:, None] if name in masks else 1.0

        x = inputs.transpose(0, 1) * mask("x")
        for i, (bridge, layer) in enumerate(zip(self.bridges, self.layers, strict=True)):
            x = layer(bridge(x), lengths, (mask(f"operation_{i}"), mask(f"feed_forward_{i}")))
        return x.transpose(0, 1), None


def metric_body(
    genotype: Genotype, width: int = 128, hidden: int = SCORED_HIDDEN, feed_forward: int = SCORED_FEED_FORWARD
) -> Encoder:
    """The body that NAS-Bench-BERT's metrics were computed on, for a genotype of the reduced form.

    Args:
        width: of the embeddings; published 128.
        hidden: of every layer whatever the genotype says; published 256, smaller in tests.
        feed_forward: width of every hidden feed-forward layer; published 1024.
    """
    return Encoder(as_scored(layers_of(genotype), hidden, feed_forward), width, "scored")


def trained_body(genotype: Genotype, width: int = 128, first_is_4h: bool = False) -> Encoder:
    """The body that NAS-Bench-BERT trained: sizes as configured or (`first_is_4h`) as its training code had them."""
    layers = layers_of(genotype)
    return Encoder(as_trained(layers) if first_is_4h else layers, width, "trained")
