"""Training-free metrics of recurrent bodies: one minibatch through the untrained network, reduced to one number.

Serianni & Kalita, "Training-free Neural Architecture Search for RNNs and Transformers", ACL 2023, arXiv 2306.00288,
and the authors' code (https://github.com/aaronserianni/training-free-nas), against whose released values they were
checked. What is differentiated is Σy, the sum of the last layer's outputs: no labels, no softmax. Nothing is divided
by a size.

Departures: the Jacobian covariance is of gradients (the released column is of the embedded words themselves, time steps
as rows). Activation distance counts one forward pass; saliencies back-propagate ones and count one pass, as the
released values do and the released notebook does not. Noise is drawn from the metric's own generator.

Shapes: T time, B batch, H a layer's width, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lmnas.core.contracts import Body
from lmnas.core.seeds import generator
from lmnas.methods.proxies.family import Family, Subject, Values
from lmnas.methods.proxies.statistics import Undefined, cosine_score, covariance_score

aten = torch.ops.aten
AMPLITUDES = (0.1, 10.0, 100.0)
"""Amplitudes of the noise in the noised Jacobians."""
ACTIVATIONS = {aten.tanh.default, aten.sigmoid.default, aten.leaky_relu.default, aten.relu.default}


class ActivationCodes(TorchDispatchMode):
    """Watches the activations of a forward pass and counts the agreements of the codes 1[out > 0] of two columns.

    `agreements` is (B, B): K = Σ [X Xᵀ + (1 - X)(1 - X)ᵀ] over calls; with s = 2 X - 1 one term is (s sᵀ + H) / 2.
    """

    def __init__(self, batch_size: int):
        super().__init__()
        self.agreements = torch.zeros(batch_size, batch_size, dtype=torch.float64)
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in ACTIVATIONS and out.ndim >= 2 and out.shape[-2] == len(self.agreements):
            signs = out.detach().movedim(-2, 0).flatten(1).gt(0).to(torch.float32).mul(2).sub(1)
            # counts below 2^24 are exact in float32
            self.agreements += (signs @ signs.t() + signs.shape[1]).double().cpu() / 2
            self.calls += 1
        return out


class _Deep(Exception):
    """The deepest layer asked for has run."""


class Signals:
    """Passes of one minibatch through an untrained body, each made once, when a metric first asks for it.

    Args:
        body: recurrent, initialised; (T, B, H) -> (T, B, H).
        embedding: (V, H).
        tokens: (T, B) ids.
        seed: of the noise.
        gradients: some metric needs Σy differentiated: the one forward pass then records what that takes.
        activations: some metric needs the activations' codes.
        depth: run the first layers only, as far as the deepest that is asked for; None: all.
    """

    def __init__(
        self,
        body: Body,
        embedding: Tensor,
        tokens: Tensor,
        seed: int,
        *,
        gradients: bool = True,
        activations: bool = True,
        depth: int | None = None,
    ):
        self.body, self.embedding, self.tokens, self.seed = body, embedding.detach(), tokens, seed
        self.embedded = F.embedding(tokens, self.embedding)
        self.gradients = gradients
        self.codes = ActivationCodes(tokens.shape[1]) if activations else None
        self.layers: list[nn.Module] = list(body.stacked())
        self.depth = None if gradients or activations else depth

    @cached_property
    def passed(self) -> dict[str, Any]:
        """The forward pass, and the backward pass of Σy if asked for."""
        seen: list[list[Tensor]] = [[] for _ in self.layers]

        def watch(number: int, outputs: list[Tensor]) -> Callable[..., None]:
            def hook(module: nn.Module, arguments: Any, result: Any) -> None:
                if result[0].requires_grad:
                    result[0].retain_grad()
                outputs.append(result[0])
                if number == self.depth:
                    raise _Deep

            return hook

        handles = [
            layer.register_forward_hook(watch(number, outputs))
            for number, (layer, outputs) in enumerate(zip(self.layers, seen, strict=True), start=1)
        ]
        embedded = self.embedded.clone().requires_grad_(self.gradients)
        state = self.body.initial_state(self.tokens.shape[1])
        states = []
        try:
            with torch.set_grad_enabled(self.gradients), self.codes or contextlib.nullcontext():
                if self.gradients:
                    # one step at a time: the state that enters each is at hand
                    total = embedded.new_zeros(())
                    for step in embedded.split(1):
                        if state.requires_grad:
                            state.retain_grad()
                        states.append(state)
                        outputs, state = self.body(step, state, {})
                        total = total + outputs.sum()
                else:
                    with contextlib.suppress(_Deep):
                        self.body(embedded, state, {})
            if self.gradients:
                self.body.zero_grad(set_to_none=True)
                total.backward()
        finally:
            for handle in handles:
                handle.remove()
        return {
            "outputs": [torch.cat([part.detach() for part in outputs]) for outputs in seen if outputs],
            "output_gradients": [[part.grad for part in outputs] for outputs in seen],
            "states": states,
            "jacobian": embedded.grad,
        }

    @property
    def entering(self) -> list[Tensor]:
        """Per layer (T, B, H): the hidden state that enters each step, the first of them zero."""
        return [torch.cat([torch.zeros_like(hs[:1]), hs[:-1]]) for hs in self.passed["outputs"]]

    @property
    def jacobian(self) -> Tensor:
        """(B, T · H): ∂Σy / ∂embedded, one row for each column of text."""
        return self.passed["jacobian"].movedim(1, 0).flatten(1)

    @cached_property
    def noised_jacobians(self) -> dict[float, Tensor]:
        """Amplitude a -> the Jacobian at embedded + a · Var_b(embedded) · ξ, one ξ ~ N(0, 1) for all amplitudes."""
        noise = torch.randn(self.embedded.shape, generator=generator(self.seed, "metric-noise")).to(self.embedded)
        noise = noise * self.embedded.var(dim=1, keepdim=True, correction=0)
        # columns do not see each other: one pass for all amplitudes
        noisy = torch.cat([self.embedded + amplitude * noise for amplitude in AMPLITUDES], dim=1).requires_grad_()
        state = self.body.initial_state(noisy.shape[1])
        (gradient,) = torch.autograd.grad(self.body(noisy, state, {})[0].sum(), noisy)
        parts = gradient.movedim(1, 0).flatten(1).split(self.tokens.shape[1])
        return dict(zip(AMPLITUDES, parts, strict=True))


# ----------------------------------------------------------------------------------------------------------- metrics


def _hidden_covariance(layer: int) -> Callable[[Signals], float]:
    def hidden_covariance(signals: Signals) -> float:
        """S of the hidden units of one layer over all columns and steps (Serianni & Kalita, 2023, section 3).

        Rows are the H units, columns the T · B states entering the steps, the zero state included. At most about -H.
        """
        if layer > len(signals.layers):
            raise Undefined(f"the body has {len(signals.layers)} layers")
        entering = signals.entering
        return covariance_score(entering[layer - 1].flatten(0, 1).t())

    return hidden_covariance


def activation_distance(signals: Signals) -> float:
    """ln det K of the activations' binary codes (Mellor et al., 2021, arXiv 2006.04647, for recurrent networks).

    Undefined where the body applies no activation that PyTorch shows (an `nn.LSTM` may run as one operation).
    """
    assert signals.codes is not None
    if not signals.passed or not signals.codes.calls:
        raise Undefined("the body has no visible activations")
    sign, logdet = torch.linalg.slogdet(signals.codes.agreements)
    if sign <= 0:
        raise Undefined("two columns of text have equal codes")
    return float(logdet)


def jacobian_covariance(signals: Signals) -> float:
    """S of the B gradients of Σy by the embedded words (Mellor et al., 2020, arXiv 2006.04647v1)."""
    return covariance_score(signals.jacobian)


def jacobian_cosine(signals: Signals) -> float:
    """Cosine score of the B gradients (Celotti et al., 2020; Serianni & Kalita, 2023)."""
    return cosine_score(signals.jacobian)


def large_noise_jacobian(signals: Signals) -> float:
    """1 - |S(G) - S(G̃_10)|: robustness of the covariance score to strong noise on the words (ibid.)."""
    return 1.0 - abs(covariance_score(signals.jacobian) - covariance_score(signals.noised_jacobians[10.0]))


def large_noise_jacobian_cosine(signals: Signals) -> float:
    """1 - |C(G) - C(G̃_10)| (ibid.)."""
    return 1.0 - abs(cosine_score(signals.jacobian) - cosine_score(signals.noised_jacobians[10.0]))


def _product(score: Callable[[Tensor], float], signals: Signals) -> float:
    product = score(signals.jacobian)
    for noised in signals.noised_jacobians.values():
        product *= score(noised)
    return product


def more_noised_jacobian(signals: Signals) -> float:
    """S(G) · S(G̃_0.1) · S(G̃_10) · S(G̃_100) (ibid.)."""
    return _product(covariance_score, signals)


def more_noised_jacobian_cosine(signals: Signals) -> float:
    """C(G) · C(G̃_0.1) · C(G̃_10) · C(G̃_100) (ibid.)."""
    return _product(cosine_score, signals)


def synaptic_saliency(signals: Signals) -> float:
    """Σ |w ⊙ ∂Σy / ∂w| over weight matrices and the embedding (Tanaka et al., 2020, arXiv 2006.05467).

    Of a recurrent graph's linear nodes the matrix of the first input is left out, as in the released values.
    """
    total = (signals.embedding * _embedding_gradient(signals)).abs().sum(dtype=torch.float64)
    for weight, gradient in _matrices(signals.body):
        total = total + (weight * gradient).abs().sum(dtype=torch.float64).cpu()
    return _finite(total)


def _embedding_gradient(signals: Signals) -> Tensor:
    """(V, H): the gradients of a word's occurrences, added."""
    gradient = signals.passed["jacobian"]
    return torch.zeros_like(signals.embedding).index_add_(0, signals.tokens.flatten(), gradient.flatten(0, 1))


def _matrices(body: Body) -> Iterable[tuple[Tensor, Tensor]]:
    """(weight, gradient) of the matrices that count for synaptic saliency: all, or those that the body names."""
    yield from body.salient()


def hidden_saliency(signals: Signals) -> float:
    """Σ |h ⊙ ∂Σy / ∂h| over layers, steps and units, h the hidden state entering a step (Serianni & Kalita, 2023).

    The gradient is the whole one: through the recurrence, and through h as the output of the step before.
    """
    passed, body = signals.passed, signals.body
    total = torch.zeros((), dtype=torch.float64)
    for t, state in enumerate(passed["states"]):
        if t == 0:
            continue  # zero times anything
        hidden = _hidden(body, state.detach())
        recurrent = _hidden(body, state.grad)
        for layer, (h, gradient) in enumerate(zip(hidden, recurrent, strict=True)):
            whole = gradient + passed["output_gradients"][layer][t - 1][0]
            total = total + (h * whole).abs().sum(dtype=torch.float64).cpu()
    return _finite(total)


def _hidden(body: Body, state: Tensor) -> list[Tensor]:
    """Per layer (B, H): the part of a state that was its layer's output."""
    found = body.hidden(state)
    if not found:
        raise Undefined("the body does not say which part of its state is hidden")
    return found


def _finite(total: Tensor) -> float:
    if not torch.isfinite(total):
        raise Undefined("values that are not finite")
    return float(total)


def parameters(signals: Signals) -> float:
    """Parameters of the language model: body, tied embedding and a bias per word."""
    return float(sum(p.numel() for p in signals.body.parameters()) + signals.embedding.numel() + len(signals.embedding))


def operations(signals: Signals) -> float:
    """Multiply-adds of the body's matrices per token: each weight of a matrix is used once a step."""
    return float(sum(p.numel() for p in signals.body.parameters() if p.ndim >= 2))


@dataclass(frozen=True)
class Metric:
    """A metric and its requirements.

    Attributes:
        sign: 1 where a higher value went with a better model on NAS-Bench-NLP, -1 where a lower one did.
        gradients: needs Σy differentiated.
        activations: needs the activations' codes.
        depth: number of layers that it needs, counted from the first.
    """

    function: Callable[[Signals], float]
    sign: int = 1
    gradients: bool = False
    activations: bool = False
    depth: int = 0


METRICS: Mapping[str, Metric] = {
    **{f"hidden_covariance_{layer}": Metric(_hidden_covariance(layer), depth=layer) for layer in (1, 2, 3)},
    "activation_distance": Metric(activation_distance, activations=True),
    "synaptic_saliency": Metric(synaptic_saliency, sign=-1, gradients=True),
    "hidden_saliency": Metric(hidden_saliency, sign=-1, gradients=True),
    "jacobian_covariance": Metric(jacobian_covariance, gradients=True),
    "jacobian_cosine": Metric(jacobian_cosine, gradients=True),
    "large_noise_jacobian": Metric(large_noise_jacobian, gradients=True),
    "large_noise_jacobian_cosine": Metric(large_noise_jacobian_cosine, sign=-1, gradients=True),
    "more_noised_jacobian": Metric(more_noised_jacobian, sign=-1, gradients=True),
    "more_noised_jacobian_cosine": Metric(more_noised_jacobian_cosine, gradients=True),
    "parameters": Metric(parameters),
    "operations": Metric(operations),
}


def measure(body: Body, embedding: Tensor, tokens: Tensor, metrics: Iterable[str], seed: int) -> Values:
    """All `metrics` of an initialised body from the passes that they share.

    Args:
        body: recurrent, initialised; its gradients are overwritten.
        embedding: (V, H).
        tokens: (T, B) ids.
        seed: of the noise.

    Returns:
        Metric -> its value, or the reason (a text) why it is undefined.
    """
    chosen = {name: METRICS[name] for name in metrics}
    signals = Signals(
        body,
        embedding,
        tokens,
        seed,
        gradients=any(metric.gradients for metric in chosen.values()),
        activations=any(metric.activations for metric in chosen.values()),
        depth=max((metric.depth for metric in chosen.values()), default=0),
    )
    values: Values = {}
    for name, metric in chosen.items():
        try:
            values[name] = metric.function(signals)
        except Undefined as reason:
            values[name] = str(reason)
    return values


class RecurrentMetrics(Family):
    """Metrics of recurrent bodies, from one batch of text."""

    takes = frozenset({"sequence", "causal", "stateful"})
    metrics = tuple(METRICS)
    shown = ("hidden_covariance_1", "jacobian_cosine", "parameters")

    def measure(self, subject: Subject, metrics: Sequence[str]) -> Values:
        body, embedding = subject.network()
        return measure(body, embedding, subject.text()[0].to(embedding.device), metrics, subject.seed)

    def sign(self, metric: str) -> int:
        return METRICS[metric].sign
