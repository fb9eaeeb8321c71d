"""The settings that are measured: the published sizes of DARTS and ENAS on Penn Treebank, ours beside plain.

Both sides share weights, data and dropout masks, and take the same optimiser step, at a rate of zero, so that every
round does the same work. Words are random: speed does not depend on them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lmnas.cli.bench.plain import Plain, plain_cross_entropy
from lmnas.core.contracts import Batch, Body, Choice, LearnStep, Mixture
from lmnas.core.genotype import load_genotype
from lmnas.core.seeds import generator, rng
from lmnas.methods.strategies.gradient import LOOK_AHEAD_COPIES, architecture_gradient
from lmnas.nn.kernels import linear_cross_entropy
from lmnas.runs.build import covering_space
from lmnas.spaces.recurrent.cell import RecurrentCell
from lmnas.tasks.language_modeling import EVALUATION_TOKENS, LanguageModel, ModelSettings, segment

DROPOUT = {"dropout_output": 0.75, "dropout_x": 0.75, "dropout_hidden": 0.25, "dropout_input": 0.2}
"""Dropout rates of both papers' searches and trainings."""
N_PATHS = 4
"""Number of paths of the row `enas-shared`, which takes a step with each."""


@dataclass(frozen=True)
class Sizes:
    """Widths, batches and the vocabulary; the defaults are the papers'."""

    search_width: int = 300
    search_batch: int = 256
    width: int = 850
    batch: int = 64
    enas_width: int = 1000
    vocabulary: int = 10_000
    bptt: int = 35
    predictions: int = 8960
    """Rows of the cross-entropy: those of a search step."""

    @classmethod
    def small(cls) -> "Sizes":
        """Seconds for all rows: to try, not to report."""
        return cls(32, 8, 32, 8, 32, 200, 8, 64)


@dataclass(frozen=True)
class Row:
    """One measurement: two ways to do the same work.

    Attributes:
        ours, plain: do it once; the values that both must agree on, each a loss and, where there is one, the norm of
            its gradient behind it.
        tokens: predictions made in one go.
        same: whether the two do the same sums (the LSTM does other ones).
        model: what is trained, for forecasts; None: no training.
        choice: what `model` runs.
        copies: further copies of the weights that the work holds.
    """

    ours: Callable[[], tuple[float, ...]]
    plain: Callable[[], tuple[float, ...]]
    tokens: int
    same: bool = True
    model: nn.Module | None = None
    batch: Batch | None = None
    choice: Choice = None
    copies: int = 0


class Setting:
    """One model, two batches of random tokens, one draw of dropout masks."""

    def __init__(
        self,
        body: Body,
        width: int,
        batch_size: int,
        sizes: Sizes,
        device: torch.device,
        length: int,
        **settings: Any,
    ):
        noise = generator(0, "bench")
        self.device = device
        self.model = LanguageModel(body, sizes.vocabulary, ModelSettings(width=width, **settings))
        self.model.initialise(noise)
        self.model.to(device)
        self.batches = []
        for _ in range(2):
            tokens = torch.randint(sizes.vocabulary, (length + 1, batch_size), generator=noise).to(device)
            self.batches.append(replace(segment(tokens), state=body.initial_state(batch_size)))
        self.masks = self.model.draw_masks(self.batches[0], noise)
        self.tokens = length * batch_size
        self.bptt = sizes.bptt
        # in one pass over the weights, as ours are trained; the published codes take SGD as it is
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, weight_decay=5e-7, fused=True)
        self.plain_optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, weight_decay=5e-7)

    def weight_step(self, forward: nn.Module, choice: Choice = None) -> tuple[float, float]:
        """One optimiser step; the loss, and the gradient's norm before clipping."""
        loss, _ = forward(self.batches[0], self.masks, choice)
        optimizer = self.optimizer if forward is self.model else self.plain_optimizer
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 0.25, foreach=True)
        optimizer.step()
        return loss.item(), norm.item()

    @torch.no_grad()
    def evaluate(self, forward: nn.Module) -> tuple[float]:
        """The loss of all tokens: in segments of `EVALUATION_TOKENS` in ours, of bptt in the published codes."""
        inputs, targets = self.batches[0].inputs, self.batches[0].targets
        rows, batch_size = inputs.shape
        length = max(self.bptt, EVALUATION_TOKENS // batch_size) if forward is self.model else self.bptt
        state, total = self.batches[0].state, 0.0
        for start in range(0, rows, length):
            expected = targets[start : start + length]
            part = Batch(inputs[start : start + length], expected, expected.numel(), state=state)
            loss, state = forward(part, {}, None, False)
            total += loss.item() * part.n_targets
        return (total / self.tokens,)


Make = Callable[[Sizes, torch.device, bool], Row]


def _search(order: int) -> Make:
    """DARTS' search step: the weights' alone (0), or after an architecture step of first (1) or second (2) order."""

    def make(sizes: Sizes, device: torch.device, per_edge: bool) -> Row:
        body = RecurrentCell().supernet(sizes.search_width)
        setting = Setting(body, sizes.search_width, sizes.search_batch, sizes, device, sizes.bptt, tar=1e-3, **DROPOUT)
        plain = Plain(setting.model, per_edge)
        alphas = {"nodes": (1e-3 * torch.randn(36, 5, generator=generator(0, "alpha"))).requires_grad_()}
        named = dict(setting.model.named_parameters())

        def relax(alphas: Mapping[str, Tensor]) -> Mixture:
            return {"nodes": alphas["nodes"].softmax(-1)}

        def step(forward: nn.Module) -> tuple[float, float]:
            prefix = "" if forward is setting.model else "model."

            def loss(number: int) -> Callable[[Mapping[str, Tensor], Mixture], Tensor]:
                def run(weights: Mapping[str, Tensor], mixture: Mixture) -> Tensor:
                    given = {prefix + name: weight for name, weight in weights.items()}
                    arguments = (setting.batches[number], setting.masks, mixture, False)
                    return torch.func.functional_call(forward, given, arguments)[0]

                return run

            if order == 1 and forward is plain:
                # as published: gradients of all weights as well
                loss(1)(named, {"nodes": relax(alphas)["nodes"].to(device)}).backward()
            elif order > 0:
                learn = LearnStep(0, loss(0), loss(1), named, 20.0, 5e-7, 0.25)
                architecture_gradient(learn, alphas, relax, order)
            with torch.no_grad():
                fixed = {"nodes": relax(alphas)["nodes"].to(device)}
            return setting.weight_step(forward, fixed)

        return Row(
            lambda: step(setting.model),
            lambda: step(plain),
            setting.tokens,
            model=setting.model,
            batch=setting.batches[0],
            choice={"nodes": relax(alphas)["nodes"].detach().requires_grad_(order > 0)},
            copies=LOOK_AHEAD_COPIES if order == 2 else 0,
        )

    return make


def _retrain(sizes: Sizes, device: torch.device, per_edge: bool) -> Row:
    setting = _darts(sizes, device, sizes.batch, sizes.bptt, tar=1e-3, **DROPOUT)
    plain = Plain(setting.model, per_edge)
    return Row(
        lambda: setting.weight_step(setting.model),
        lambda: setting.weight_step(plain),
        setting.tokens,
        model=setting.model,
        batch=setting.batches[0],
    )


def _darts(sizes: Sizes, device: torch.device, batch_size: int, length: int, **settings: Any) -> Setting:
    genotype = load_genotype("darts-v2")
    body = covering_space(genotype).build(genotype, sizes.width)
    return Setting(body, sizes.width, batch_size, sizes, device, length, **settings)


def _evaluate(batch_size: int) -> Make:
    def make(sizes: Sizes, device: torch.device, per_edge: bool) -> Row:
        length = sizes.bptt * max(1, EVALUATION_TOKENS // (sizes.bptt * batch_size))
        setting = _darts(sizes, device, batch_size, length)
        plain = Plain(setting.model, per_edge)
        return Row(lambda: setting.evaluate(setting.model), lambda: setting.evaluate(plain), setting.tokens)

    return make


def _enas_shared(sizes: Sizes, device: torch.device, per_edge: bool) -> Row:
    """Training steps of ENAS' shared weights, one for each of a few sampled paths."""
    space = RecurrentCell(
        n_nodes=11, input_activation="searched", output="loose-ends", sharing="edge", batch_norm="output", none=False
    )
    width = sizes.enas_width
    setting = Setting(
        space.supernet(width), width, sizes.batch, sizes, device, sizes.bptt, decoder_bias=False, **DROPOUT
    )
    plain = Plain(setting.model, per_edge)
    genotypes = [space.sample(rng(0, "paths", i)) for i in range(N_PATHS)]

    def steps(forward: nn.Module) -> tuple[float, ...]:
        return tuple(value for genotype in genotypes for value in setting.weight_step(forward, genotype))

    return Row(
        lambda: steps(setting.model),
        lambda: steps(plain),
        N_PATHS * setting.tokens,
        model=setting.model,
        batch=setting.batches[0],
        choice=genotypes[0],
    )


def _cross_entropy(sizes: Sizes, device: torch.device, per_edge: bool) -> Row:
    """Linear layer, softmax, loss and their gradients alone."""
    noise = generator(0, "bench")
    hidden = torch.randn(sizes.predictions, sizes.search_width, generator=noise).to(device).requires_grad_()
    weight = (0.04 * torch.randn(sizes.vocabulary, sizes.search_width, generator=noise)).to(device).requires_grad_()
    bias = torch.zeros(sizes.vocabulary, device=device).requires_grad_()
    targets = torch.randint(sizes.vocabulary, (sizes.predictions,), generator=noise).to(device)

    def step(function: Callable[..., Tensor]) -> tuple[float, float]:
        loss = function(hidden, weight, bias, targets)
        gradients = torch.autograd.grad(loss, (hidden, weight, bias))
        return loss.item(), nn.utils.get_total_norm(gradients).item()

    return Row(lambda: step(linear_cross_entropy), lambda: step(plain_cross_entropy), sizes.predictions)


def _lstm(sizes: Sizes, device: torch.device, per_edge: bool) -> Row:
    """Retraining DARTS' cell beside `torch.nn.LSTM` of the same width, batch, decoder and loss."""
    ours = _darts(sizes, device, sizes.batch, sizes.bptt, tar=1e-3, **DROPOUT)
    genotype = load_genotype("lstm-1")
    body = covering_space(genotype).build(genotype, sizes.width)
    lstm = Setting(body, sizes.width, sizes.batch, sizes, device, sizes.bptt, tar=1e-3, **DROPOUT)
    return Row(lambda: ours.weight_step(ours.model), lambda: lstm.weight_step(lstm.model), ours.tokens, same=False)


ROWS: dict[str, Make] = {
    "search-weight": _search(0),
    "search-first-order": _search(1),
    "search-second-order": _search(2),
    "retrain": _retrain,
    "evaluate-1": _evaluate(1),
    "evaluate-10": _evaluate(10),
    "evaluate-64": _evaluate(64),
    "enas-shared": _enas_shared,
    "cross-entropy": _cross_entropy,
    "lstm": _lstm,
}


def search_step_flops(sizes: Sizes, n_nodes: int = 8) -> float:
    """Floating-point operations of a search step's products, forward and backward (three times forward).

    A product of (m, k) by (k, n) takes 2 m k n. Per token: node 0 multiplies [x, h] by (2H, 2H), every one of the
    N (N + 1) / 2 edges a state by (H, 2H), the decoder the output by (H, V).
    """
    h, n_edges = sizes.search_width, n_nodes * (n_nodes + 1) // 2
    per_token = 2 * (2 * h) * (2 * h) + n_edges * 2 * h * 2 * h + 2 * h * sizes.vocabulary
    return 3.0 * per_token * sizes.bptt * sizes.search_batch
