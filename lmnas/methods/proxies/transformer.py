"""Training-free metrics of Transformer encoders: one batch through the untrained network, reduced to one number.

Serianni & Kalita, "Training-free Neural Architecture Search for RNNs and Transformers", ACL 2023, arXiv 2306.00288, as
their released code computes them (https://github.com/aaronserianni/training-free-nas), and where the article defines a
metric otherwise (a head at a time), that reading as `..._per_head`. Beside them vanilla PCA and W-PCA (Wang, ICLR 2025,
arXiv 2504.15983), and metrics of this package's own.

A metric adds up contributions of tensors or matrices; its `..._normalized` form is their mean. **What is differentiated
matters more than the metric**: the release differentiates Σy, the sum of the last features. They leave a layer norm
whose weights are one and biases zero, so Σy is zero for every input, and every gradient of it with respect to what
stands before that norm is rounding error. The metrics `probed_...` therefore differentiate Σ r ⊙ y with random signs r,
a Hutchinson probe: E ‖∂(Σ r ⊙ y)‖² = ‖∂y‖², the whole Jacobian.

Departures: no dropout (the release leaves it on, at 0.1); eigenvalues as in `statistics`.

A body tells its parts by names: layers (`Body.stacked`), each with an `operation` (maps `query`, `key`, `value`,
`weight`, `input`, `convolved`; `nn.Softmax`; `head_size`), `projection` (a map or None) and `feed_forward`
(`nn.Linear`, activation modules). Inside, the batch comes first: (B, T, H).

Shapes: B batch, T time, H hidden, N heads, D features of a head, E embedding width.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lmnas.core.contracts import Body
from lmnas.core.seeds import generator
from lmnas.methods.proxies.family import Family, Subject, Values
from lmnas.methods.proxies.statistics import Undefined, cosine_score, covariance_score
from lmnas.nn.ops.attention import merge_heads
from lmnas.nn.ops.embedding import TokenEmbedding

HEAD_MAPS = ("query", "key", "value", "weight", "input")
FEATURE_MAPS = (*HEAD_MAPS, "convolved")
"""Maps that make features, not kernels: the release takes those of 128 outputs or more."""
ACTIVATIONS = (nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh)
ETA = 0.99
"""Share of the variance that the principal components of `pca_dimension` must exceed. W-PCA's released code has 0.99 in
some files and 0.9 in others; which of the two is behind its table of FlexiBERT is not known."""


class TokenNetwork(nn.Module):
    """Token embeddings and a Transformer body. (B, T) ids -> (B, T, F) features."""

    def __init__(self, embedding: TokenEmbedding, body: Body):
        super().__init__()
        self.embedding, self.body = embedding, body

    def initialise(self, seed: int, init_range: float = 0.02) -> None:
        """Embeddings and body from generators of their own: networks of one seed can share the embeddings."""
        self.embedding.initialise(generator(seed, "untrained-embeddings"), init_range)
        self.initialise_body(seed, init_range)

    def initialise_body(self, seed: int, init_range: float = 0.02) -> None:
        self.body.initialise(generator(seed, "untrained-body"), init_range)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.embedding(tokens)
        state = self.body.initial_state(len(tokens))
        return self.body(embedded, state, {})[0].transpose(0, 1)


def untrained(body: Body, vocabulary: int, seed: int) -> TokenNetwork:
    """A network around any Transformer body, embeddings as wide as it takes them, its weights drawn from `seed`."""
    assert body.max_length is not None, "its positions need a longest sequence"
    made = TokenNetwork(TokenEmbedding(vocabulary, body.width, body.max_length), body)
    made.initialise(seed)
    return made


# ---------------------------------------------------------------------------------- contributions of outputs


def confidence(output: Tensor) -> float:
    """Mean over batch and features of the maximum over axis 1: of a map's output (B, T, H), the maximum over positions
    (head confidence); of attention weights (B, N, T, T), the maximum over heads (softmax confidence).

    The released code's reading. Its softmax confidence thus grows with disagreement between heads.
    """
    return float(output.amax(dim=1).mean())


def head_confidence(attended: Tensor, size: int) -> list[float]:
    """Per head: mean over the batch of the norm of the maximum over positions. The article's A_h = (1/N) Σ_n ‖max
    Att_h(x_n)‖ (Serianni & Kalita, 2023), the maximum taken feature by feature.

    Args:
        attended: (B, T, H), what the operation puts out before its output map.
        size: D, features of a head.
    """
    return attended.unflatten(-1, (-1, size)).amax(dim=1).norm(dim=-1).mean(dim=0).tolist()


def head_softmax_confidence(weights: Tensor) -> list[float]:
    """Per head: mean over the batch of the norm of the maximum over keys. The article's reading on the softmax.

    Args:
        weights: (B, N, T, T), the last axis softmaxed.
    """
    return weights.amax(dim=-1).norm(dim=-1).mean(dim=0).tolist()


def activation_distance(output: Tensor) -> float:
    """Number of agreements between the codes 1[out > 0] of two positions, over all pairs in the first sequence.

    The sum of all entries of X Xᵀ + (1 - X)(1 - X)ᵀ. A feature that is on at c of T positions adds c² + (T - c)².

    Args:
        output: (B, T, H) of an activation function.

    Serianni & Kalita, 2023 (released: no determinant, unlike the article's NASWOT).
    """
    on = (output[0] > 0).sum(dim=0).double()
    return float((on.square() + (output.shape[1] - on).square()).sum())


def pca_dimension(inputs: Tensor, weight: Tensor, eta: float = ETA) -> float:
    """Principal components of X Wᵀ + b needed for the explained variance to exceed the share `eta`.

    Args:
        inputs: (B, T, H), X of the first feed-forward map: its outputs before the activation are what is analysed.
        weight: (F, H), W of that map. The bias b moves the mean alone.

    Raises:
        Undefined: no variance.

    Wang, W-PCA, ICLR 2025, arXiv 2504.15983. At most H of the F variances are not zero, and with centred X = Q R they
    are the eigenvalues of R Wᵀ W Rᵀ: an H x H problem instead of an F x F one.
    """
    rows = inputs.detach().flatten(0, 1).double()
    factor = torch.linalg.qr(rows - rows.mean(dim=0), mode="r")[1] @ weight.detach().double().t()
    eigenvalues = _eigenvalues(factor @ factor.t())
    share = eigenvalues.cumsum(0) / eigenvalues.sum()
    return float((share <= eta).sum().clamp(max=len(share) - 1) + 1)


def effective_rank(hidden: Tensor) -> float:
    """exp of the entropy of the shares of variance of the principal components: 1 (a line) to H (a ball).

    Args:
        hidden: (B, T, H).

    Raises:
        Undefined: no variance.

    Roy & Vetterli, "The effective rank", EUSIPCO 2007, of features; as a metric of architectures our own.
    """
    rows = hidden.detach().flatten(0, 1).double()
    rows = rows - rows.mean(dim=0)
    share = _eigenvalues(rows.t() @ rows)
    share = share[share > 0] / share.sum()
    return float((-(share * share.log()).sum()).exp())


def _eigenvalues(product: Tensor) -> Tensor:
    """Eigenvalues (n,) of a positive semidefinite matrix (n, n), the largest first."""
    eigenvalues = torch.linalg.eigvalsh(product).flip(0).clamp(min=0.0)
    if not eigenvalues.sum() > 0:
        raise Undefined("no variance")
    return eigenvalues


# ---------------------------------------------------------------------------------- contributions of matrices


def saliency(weight: Tensor, gradient: Tensor) -> float:
    """Σ |W ⊙ ∂W|: synaptic saliency over feed-forward maps, head importance over those of the operation (released)."""
    return float((weight * gradient).abs().sum())


def diversity(weight: Tensor, gradient: Tensor) -> float:
    """‖W‖ · ‖∂W‖, nuclear norms: synaptic diversity (Zhou et al., 2022, arXiv 2203.12217) over the operation's maps."""
    return float(torch.linalg.svdvals(weight).sum() * torch.linalg.svdvals(gradient).sum())


def head_importance(attended: Tensor, gradient: Tensor, size: int) -> list[float]:
    """Per head: ‖Att_h(X) ⊙ ∂L/∂Att_h(X)‖ over batch, positions and features, the article's reading.

    Args:
        attended: (B, T, H), what the operation puts out before its output map; `gradient` the same.
        size: D, features of a head.
    """
    return (attended * gradient).unflatten(-1, (-1, size)).square().sum(dim=(0, 1, 3)).sqrt().tolist()


# ------------------------------------------------------------------------------------------- of the whole network


def jacobian_covariance(gradient: Tensor) -> float:
    """Eq. 1 on the gradient of the position table: embedding features are compared, positions are their samples.

    Args:
        gradient: (T, E).

    Serianni & Kalita, 2023 (released as "Jacobian Score"), after Mellor et al., 2021, arXiv 2006.04647.
    """
    return covariance_score(gradient.t())


def jacobian_cosine(gradient: Tensor) -> float:
    """The cosine score of the same rows: released as "Jacobian Score Normalized", which is no normalised form.

    Args:
        gradient: (T, E).
    """
    return cosine_score(gradient.t())


def parameters(network: nn.Module, vanilla_pca: Callable[[], float]) -> float:
    """All parameters: embeddings and body."""
    return float(sum(parameter.numel() for parameter in network.parameters()))


def w_pca(network: nn.Module, vanilla_pca: Callable[[], float]) -> float:
    """Weight-weighted PCA: parameters times vanilla PCA, the sum of `pca_dimension` over layers.

    Wang, ICLR 2025, arXiv 2504.15983.
    """
    return parameters(network, vanilla_pca) * vanilla_pca()


# ------------------------------------------------------------------------------------------- parts of a network


def _named_maps(layer: Any, names: Iterable[str]) -> list[nn.Linear]:
    parts = dict(layer.operation.named_children())
    return [parts[name] for name in names if isinstance(parts.get(name), nn.Linear)]


def _operation_maps(layer: Any) -> list[nn.Linear]:
    """All linear maps of the operation and its output map."""
    return _modules(layer.operation, nn.Linear) + _modules(layer.projection or nn.Identity(), nn.Linear)


def _modules(part: Any, types: Any) -> list[Any]:
    return [module for module in part.modules() if isinstance(module, types)]


SITES: Mapping[str, Callable[[Any], Iterable[nn.Module]]] = {
    "head maps": lambda layer: _named_maps(layer, HEAD_MAPS),
    "softmax": lambda layer: _modules(layer.operation, nn.Softmax),
    "activations": lambda layer: _modules(layer.feed_forward, ACTIVATIONS),
    "first feed-forward map": lambda layer: _modules(layer.feed_forward, nn.Linear)[:1],
    "operations": lambda layer: [layer.operation],
    "layers": lambda layer: [layer],
}
"""Name of a site -> modules of a layer whose outputs are read."""
MATRICES: Mapping[str, Callable[[Any], Iterable[nn.Linear]]] = {
    "operation": _operation_maps,
    "heads": lambda layer: _named_maps(layer, FEATURE_MAPS),
    "feed-forward": lambda layer: _modules(layer.feed_forward, nn.Linear),
}
"""Whose weights are looked at, layer by layer."""


# ------------------------------------------------------------------------------------------------------- metrics

Source = Literal["outputs", "matrices", "heads", "positions", "network"]


@dataclass(frozen=True)
class Metric:
    """A metric's computation.

    Attributes:
        source: what `function` takes: `outputs` of the modules at `site` (of a PCA, inputs and weight); weight and
            gradient of the `matrices` at `site`; output, gradient and head size of the operations (`heads`); the
            gradient of the position table (`positions`); the `network` itself and its vanilla PCA.
        readout: what is differentiated: `sum`, Σy; `probe`, Σ r ⊙ y; None: nothing.
        mean: of the contributions; else their sum.
        last: only the last contribution counts.
        published: the benchmark's column of the same metric.
    """

    source: Source
    function: Callable[..., Any]
    site: str = ""
    readout: Literal["sum", "probe"] | None = None
    mean: bool = False
    last: bool = False
    published: str | None = None


def _both(name: str, metric: Metric) -> dict[str, Metric]:
    """The sum and the mean of one metric's contributions."""
    column = metric.published and f"{metric.published}_normalized"
    return {name: metric, f"{name}_normalized": replace(metric, mean=True, published=column)}


METRICS: Mapping[str, Metric] = {
    **_both("head_confidence", Metric("outputs", confidence, "head maps", published="head_confidence")),
    **_both("softmax_confidence", Metric("outputs", confidence, "softmax", published="head_softmax_confidence")),
    **_both(
        "activation_distance",
        Metric("outputs", activation_distance, "activations", published="activation_distance"),
    ),
    **_both("synaptic_saliency", Metric("matrices", saliency, "feed-forward", "sum", published="synaptic_saliency")),
    **_both("synaptic_diversity", Metric("matrices", diversity, "operation", "sum", published="synaptic_diversity")),
    **_both("head_importance", Metric("matrices", saliency, "heads", "sum", published="head_importance")),
    "jacobian_covariance": Metric("positions", jacobian_covariance, readout="sum", published="jacobian_score"),
    "jacobian_cosine": Metric("positions", jacobian_cosine, readout="sum", published="jacobian_score_normalized"),
    "parameters": Metric("network", parameters, published="number_of_parameters"),
    "head_confidence_per_head": Metric("outputs", head_confidence, "operations", mean=True),
    "softmax_confidence_per_head": Metric("outputs", head_softmax_confidence, "softmax", mean=True),
    "head_importance_per_head": Metric("heads", head_importance, readout="probe", mean=True),
    "vanilla_pca": Metric("outputs", pca_dimension, "first feed-forward map"),
    "w_pca": Metric("network", w_pca),
    "probed_synaptic_saliency": Metric("matrices", saliency, "feed-forward", "probe"),
    "probed_synaptic_diversity": Metric("matrices", diversity, "operation", "probe"),
    "probed_head_importance": Metric("matrices", saliency, "heads", "probe"),
    "probed_jacobian_covariance": Metric("positions", jacobian_covariance, readout="probe"),
    "probed_jacobian_cosine": Metric("positions", jacobian_cosine, readout="probe"),
    "effective_rank": Metric("outputs", effective_rank, "layers", last=True),
}
"""Name -> metric; higher is taken to mean a better model."""


def _reduced(metric: Metric, contributions: list[float]) -> float:
    if not contributions:
        raise Undefined(f"the network has none of its {metric.site}")
    if metric.last:
        return contributions[-1]
    return sum(contributions) / (len(contributions) if metric.mean else 1)


def _flat(values: float | list[float]) -> list[float]:
    return values if isinstance(values, list) else [values]


def measure(network: TokenNetwork, tokens: Tensor, metrics: Iterable[str], seed: int) -> Values:
    """All `metrics` of an initialised network, from one forward pass and one backward pass for each read-out.

    Outputs are reduced as they appear and not kept; without a gradient metric nothing is recorded for one.

    Args:
        network: its body keeps to the names of the module's docstring.
        tokens: (B, T) ids.
        seed: of the probe's signs.

    Returns:
        Metric -> its value, or the reason (a text) why it is undefined.
    """
    return _Measurement(network, tokens, {name: METRICS[name] for name in metrics}, seed).values()


class _Measurement:
    def __init__(self, network: TokenNetwork, tokens: Tensor, chosen: Mapping[str, Metric], seed: int):
        self.network, self.tokens, self.chosen, self.seed = network, tokens, dict(chosen), seed
        self.layers: list[Any] = list(network.body.stacked())
        self.contributions: dict[Any, list[float] | str] = {}
        self.attended: list[tuple[Tensor, int]] = []
        self.readouts = sorted({metric.readout for metric in self.chosen.values() if metric.readout})
        self.gradients: dict[tuple[str, int], Tensor] = {}

    def values(self) -> Values:
        before = [(parameter, parameter.requires_grad) for parameter in self.network.parameters()]
        try:
            output = self._forward()
            for readout in self.readouts:
                self._backward(readout, output, keep=readout != self.readouts[-1])
        finally:
            for parameter, required in before:
                parameter.requires_grad_(required)
        values: Values = {}
        for name, metric in self.chosen.items():
            try:
                values[name] = self._value(metric)
            except Undefined as reason:
                values[name] = str(reason)
        return values

    def _forward(self) -> Tensor:
        # metrics that differ in the reduction alone share their contributions
        wanted = {(m.site, m.function) for m in self.chosen.values() if m.source == "outputs"}
        if "w_pca" in self.chosen:
            wanted.add(("first feed-forward map", pca_dimension))
        handles = []
        for site, function in sorted(wanted, key=str):
            self.contributions[site, function] = []
            for layer in self.layers:
                for module in SITES[site](layer):
                    hook = self._reader(site, function, layer)
                    handles.append(module.register_forward_hook(hook))
        if any(m.source == "heads" for m in self.chosen.values()):
            handles += [layer.operation.register_forward_hook(self._keep) for layer in self.layers]
        self.network.requires_grad_(False)
        for parameter in self._differentiated() if self.readouts else []:
            parameter.requires_grad_()
        try:
            with torch.set_grad_enabled(bool(self.readouts)):
                return self.network(self.tokens)
        finally:
            for handle in handles:
                handle.remove()

    def _reader(self, site: str, function: Callable[..., Any], layer: Any) -> Callable[..., None]:
        size = (layer.operation.head_size,) if function is head_confidence else ()

        def read(module: Any, arguments: Any, output: Tensor) -> None:
            contributions = self.contributions[site, function]
            if isinstance(contributions, str):
                return
            output = output.detach()
            if site == "head maps" and output.ndim == 4:  # a map of each head alone
                output = merge_heads(output)
            try:
                if function is pca_dimension:
                    contributions += _flat(function(arguments[0], module.weight))
                else:
                    contributions += _flat(function(output, *size))
            except Undefined as reason:
                self.contributions[site, function] = str(reason)

        return read

    def _keep(self, module: Any, arguments: Any, output: Tensor) -> None:
        self.attended.append((output, module.head_size))

    def _maps(self, site: str) -> list[nn.Linear]:
        return [module for layer in self.layers for module in MATRICES[site](layer)]

    def _differentiated(self) -> list[Tensor]:
        """The parameters whose gradients some metric reads; the positions always, so that every output needs one."""
        sites = {m.site for m in self.chosen.values() if m.source == "matrices"}
        weights = {id(module.weight): module.weight for site in sorted(sites) for module in self._maps(site)}
        return [self.network.embedding.positions, *weights.values()]

    def _backward(self, readout: str, output: Tensor, keep: bool) -> None:
        if readout == "probe":
            signs = torch.randint(0, 2, output.shape, generator=generator(self.seed, "probe"))
            output = output * (2 * signs - 1).to(output)
        inputs = [*self._differentiated(), *(tensor for tensor, _ in self.attended)]
        gradients = torch.autograd.grad(output.sum(), inputs, retain_graph=keep)
        for tensor, gradient in zip(inputs, gradients, strict=True):
            self.gradients[readout, id(tensor)] = gradient

    def _value(self, metric: Metric) -> float:
        if metric.source == "network":
            return metric.function(self.network, self._vanilla_pca)
        if metric.source == "outputs":
            contributions = self.contributions[metric.site, metric.function]
            if isinstance(contributions, str):
                raise Undefined(contributions)
            return _reduced(metric, contributions)
        assert metric.readout is not None
        if metric.source == "positions":
            positions = self.network.embedding.positions
            return metric.function(self.gradients[metric.readout, id(positions)][: self.tokens.shape[1]])
        if metric.source == "heads":
            found = [
                importance
                for tensor, size in self.attended
                for importance in metric.function(tensor.detach(), self.gradients[metric.readout, id(tensor)], size)
            ]
            return _reduced(metric, found)
        key = (metric.site, metric.function, metric.readout)
        if key not in self.contributions:
            weights = [module.weight for module in self._maps(metric.site)]
            self.contributions[key] = [
                metric.function(weight.detach(), self.gradients[metric.readout, id(weight)]) for weight in weights
            ]
        contributions = self.contributions[key]
        assert isinstance(contributions, list)
        return _reduced(metric, contributions)

    def _vanilla_pca(self) -> float:
        return self._value(METRICS["vanilla_pca"])


class TransformerMetrics(Family):
    """Metrics of Transformer encoders, from one batch of text."""

    takes = frozenset({"sequence", "transformer"})
    metrics = tuple(METRICS)
    shown = ("head_confidence", "w_pca", "parameters")

    def measure(self, subject: Subject, metrics: Sequence[str]) -> Values:
        tokens, vocabulary = subject.text()
        body = subject.space.build(subject.genotype, subject.width)
        return measure(untrained(body, vocabulary, subject.seed), tokens.t(), metrics, subject.seed)
