"""Every metric against a plain implementation that keeps all outputs; worked numbers; other bodies than FlexiBERT's."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from lmnas.core.contracts import Body
from lmnas.core.seeds import generator
from lmnas.methods.proxies.statistics import Undefined
from lmnas.methods.proxies.transformer import (
    METRICS,
    TokenNetwork,
    activation_distance,
    confidence,
    diversity,
    effective_rank,
    head_confidence,
    head_importance,
    head_softmax_confidence,
    measure,
    pca_dimension,
    saliency,
)
from lmnas.nn.ops.embedding import TokenEmbedding
from lmnas.spaces.transformer.flexibert import Encoder, FlexiBERT, Layer, metric_body

V, E, P = 40, 8, 12
"""Vocabulary, embedding width, positions."""
B, T = 3, 10
GRADIENTS = [name for name, metric in METRICS.items() if metric.readout]
FORWARD = [name for name in METRICS if name not in GRADIENTS]


def network(body, seed=0):
    """In float64, its norms not at their initial ones and zeros: there Σy is a constant."""
    made = TokenNetwork(TokenEmbedding(V, E, P), body)
    made.initialise(seed, 0.3)
    for i, module in enumerate(m for m in made.body.modules() if isinstance(m, nn.LayerNorm)):
        nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator(seed, "norm", i))
    return made.double()


def sampled(seed):
    genotype = FlexiBERT(form="reduced").sample(random.Random(seed))
    return network(metric_body(genotype, E, hidden=16, feed_forward=24), seed)


def tokens(seed=0, shape=(B, T)):
    return torch.randint(0, V, shape, generator=generator(seed, "tokens"))


class Plain:
    """The released procedure: hooks that keep every output, `backward` of the sum (or probe), then the metrics.

    Written from the definitions for the layers that the tests use; nothing of the package's metrics is called.
    """

    def __init__(self, net, ids, probe_seed=None):
        kept = {"maps": [], "softmax": [], "activations": [], "first": [], "operations": []}
        handles = []

        def keep(module, where):
            handles.append(module.register_forward_hook(lambda m, a, output: kept[where].append(output)))

        self.net, self.layers = net.requires_grad_(), list(net.body.layers)
        for layer in self.layers:
            for name in ("query", "key", "value", "weight", "input"):
                if hasattr(layer.operation, name):
                    keep(getattr(layer.operation, name), "maps")
            keep(layer.operation.softmax, "softmax")
            keep(layer.feed_forward.activation, "activations")
            keep(layer.feed_forward.maps[0], "first")
            keep(layer.operation, "operations")
        net.zero_grad()
        output = net(ids)
        for tensor in kept["operations"]:
            tensor.retain_grad()
        signs = torch.ones(output.shape)
        if probe_seed is not None:
            signs = 2 * torch.randint(0, 2, output.shape, generator=generator(probe_seed, "probe")) - 1
        output.backward(signs.to(output))
        for handle in handles:
            handle.remove()
        self.kept, self.output, self.T = kept, output.detach(), ids.shape[1]
        self.operation_maps, self.head_maps, self.feed_forward_maps = [], [], []
        for layer in self.layers:
            linear = [m for m in layer.operation.modules() if isinstance(m, nn.Linear)]
            self.operation_maps += [*linear, *([layer.projection] if layer.projection is not None else [])]
            self.head_maps += [m for m in linear if m is not getattr(layer.operation, "to_kernel", None)]
            self.feed_forward_maps += list(layer.feed_forward.maps)

    def confidences(self, where):
        return [torch.stack(o.unbind(1)).max(0).values.mean().item() for o in self.kept[where]]

    def agreements(self):
        found = []
        for output in self.kept["activations"]:
            x = (output[0] > 0).double()
            found.append((x @ x.t() + (1 - x) @ (1 - x).t()).sum().item())
        return found

    def saliencies(self, maps):
        return [
            sum(abs(w * g) for w, g in zip(m.weight.flatten().tolist(), m.weight.grad.flatten().tolist(), strict=True))
            for m in maps
        ]

    def diversities(self):
        return [(torch.norm(m.weight, "nuc") * torch.norm(m.weight.grad, "nuc")).item() for m in self.operation_maps]

    def dimensions(self):
        found = []
        for output in self.kept["first"]:
            rows = output.detach().flatten(0, 1).numpy()
            variances = np.sort(np.linalg.eigvalsh(np.cov(rows, rowvar=False)))[::-1]
            n, total = 0, 0.0
            while total <= 0.99:
                total, n = total + variances[n] / variances.sum(), n + 1
            found.append(n)
        return found

    def heads(self):
        """Per head of every layer: (attended (B, T, D), gradient)."""
        for layer, output in zip(self.layers, self.kept["operations"], strict=True):
            size = (
                layer.operation.query.out_features // layer.operation.heads
                if hasattr(layer.operation, "query")
                else 16 // layer.operation.heads
            )
            for start in range(0, 16, size):
                part = slice(start, start + size)
                yield output.detach()[..., part], output.grad[..., part]

    def jacobian(self):
        return self.net.embedding.positions.grad[: self.T].numpy()

    def covariance(self):
        values = np.clip(np.linalg.eigvalsh(np.corrcoef(self.jacobian().T)), 0, None) + 1e-5
        return -np.sum(np.log(values) + 1 / values)

    def cosine(self):
        rows = self.jacobian().T
        total = 0.0
        for i in range(len(rows)):
            for j in range(len(rows)):
                if i != j:
                    cosine = rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j])
                    total += abs(cosine) ** (1 / 20)
        return 1 - 0.5 * total / (len(rows) ** 2 - len(rows))

    def values(self):
        """The released metrics of Σy (or of the probe)."""
        summed = {
            "head_confidence": self.confidences("maps"),
            "softmax_confidence": self.confidences("softmax"),
            "activation_distance": self.agreements(),
            "synaptic_saliency": self.saliencies(self.feed_forward_maps),
            "synaptic_diversity": self.diversities(),
            "head_importance": self.saliencies(self.head_maps),
        }
        found = {name: sum(values) for name, values in summed.items()}
        found |= {f"{name}_normalized": sum(values) / len(values) for name, values in summed.items()}
        parameters = sum(math.prod(p.shape) for p in self.net.parameters())
        dimension = sum(self.dimensions())
        return found | {
            "jacobian_covariance": self.covariance(),
            "jacobian_cosine": self.cosine(),
            "parameters": parameters,
            "vanilla_pca": dimension,
            "w_pca": parameters * dimension,
        }


@pytest.mark.parametrize("seed", range(6))
def test_released_metrics_equal_the_plain_procedure(seed):
    net, ids = sampled(seed), tokens(seed)
    found = measure(net, ids, METRICS, seed)
    expected = Plain(net, ids).values()
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_probed_metrics_and_readings_per_head_equal_the_plain_procedure(seed):
    net, ids = sampled(seed), tokens(seed)
    found, plain = measure(net, ids, METRICS, seed), Plain(net, ids, probe_seed=seed)
    expected = {f"probed_{name}": plain.values()[name] for name in ("synaptic_saliency", "synaptic_diversity")}
    expected |= {f"probed_{name}": plain.values()[name] for name in ("head_importance", "jacobian_cosine")}
    expected["probed_jacobian_covariance"] = plain.covariance()
    heads = list(plain.heads())
    expected["head_importance_per_head"] = np.mean([(a * g).norm().item() for a, g in heads])
    confidences = [np.mean([sequence.max(0).values.norm().item() for sequence in a]) for a, _ in heads]
    expected["head_confidence_per_head"] = np.mean(confidences)
    weights = [w.detach()[:, n] for w in plain.kept["softmax"] for n in range(w.shape[1])]
    expected["softmax_confidence_per_head"] = np.mean(
        [np.mean([torch.tensor([max(row) for row in one.tolist()]).norm().item() for one in w]) for w in weights]
    )
    variances = np.linalg.eigvalsh(np.cov(plain.output.flatten(0, 1).numpy(), rowvar=False))
    share = variances[variances > 1e-12] / variances.sum()
    expected["effective_rank"] = math.exp(-np.sum(share * np.log(share)))
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_these_are_all_metrics():
    """A metric that joins needs a test of its own."""
    assert len(METRICS) == 26


def test_the_published_sum_is_a_constant_of_the_network():
    """A last layer norm at its initial weights makes Σy zero: its gradients are rounding error, probed ones are not."""
    genotype = FlexiBERT(form="reduced").sample(random.Random(0))
    net = TokenNetwork(TokenEmbedding(V, E, P), metric_body(genotype, E, hidden=16, feed_forward=24))
    net.initialise(0, 0.3)
    found = measure(net.double(), tokens(), METRICS, 0)
    for name in ("synaptic_saliency", "synaptic_diversity", "head_importance"):
        assert 0 <= found[name] < 1e-10 * found[f"probed_{name}"]
    assert net(tokens()).sum(-1).abs().max() < 1e-12


def test_the_probe_estimates_the_whole_jacobian():
    """The mean over seeds of ‖∂(Σ r ⊙ y)/∂positions‖² is the squared norm of ∂y/∂positions."""
    net, ids = network(Encoder([Layer("SA-SDP", 2, 8, (8,))], E, "scored")), tokens(shape=(2, 4))
    positions = net.embedding.positions

    def outputs(table):
        return torch.func.functional_call(net, {"embedding.positions": table}, (ids,)).flatten()

    jacobian = torch.func.jacrev(outputs)(positions.detach())
    norms = []
    for seed in range(400):
        signs = (2 * torch.randint(0, 2, (2, 4, 8), generator=generator(seed, "probe")) - 1).double().flatten()
        norms.append(torch.einsum("o,ope->pe", signs, jacobian).square().sum().item())
    assert np.mean(norms) == pytest.approx(jacobian.square().sum().item(), rel=0.1)
    probed = measure(net, ids, ["probed_jacobian_cosine"], 3)["probed_jacobian_cosine"]
    signs = (2 * torch.randint(0, 2, (2, 4, 8), generator=generator(3, "probe")) - 1).double().flatten()
    rows = torch.einsum("o,ope->pe", signs, jacobian)[:4].t()
    cosines = [
        abs(torch.nn.functional.cosine_similarity(rows[i], rows[j], dim=0).item()) ** 0.05
        for i in range(8)
        for j in range(8)
        if i != j
    ]
    assert probed == pytest.approx(1 - 0.5 * sum(cosines) / 56, rel=1e-9)


# ------------------------------------------------------------------------------------------------------ worked numbers


def test_worked_numbers():
    output = torch.tensor([[[1.0, -2.0], [3.0, -4.0]], [[0.0, 5.0], [-1.0, 7.0]]])  # two sequences, positions, features
    assert confidence(output) == pytest.approx((3 - 2 + 0 + 7) / 4)
    assert head_confidence(output, 1) == pytest.approx([(3 + 0) / 2, (2 + 7) / 2])
    assert head_confidence(output, 2) == pytest.approx([(math.sqrt(13) + 7) / 2])
    # of the first sequence one feature is on at both positions, one at neither: 2² each
    assert activation_distance(output) == 8.0
    weights = torch.tensor([[[[0.6, 0.4], [0.2, 0.8]], [[0.5, 0.5], [0.9, 0.1]]]])
    assert confidence(weights) == pytest.approx((0.6 + 0.5 + 0.9 + 0.8) / 4)  # the larger of two heads
    assert head_softmax_confidence(weights) == pytest.approx([1.0, math.sqrt(0.25 + 0.81)])
    matrix, gradient = torch.diag(torch.tensor([3.0, -4.0])), torch.diag(torch.tensor([1.0, 2.0]))
    assert saliency(matrix, gradient) == 11.0
    assert diversity(matrix, gradient) == pytest.approx(7 * 3)
    assert head_importance(output, torch.ones_like(output), 1) == pytest.approx([math.sqrt(11), math.sqrt(94)])


def spread(variances):
    """(1, 2 n, n) rows whose principal components have the given variances, each along an axis."""
    rows = torch.diag(torch.tensor(variances, dtype=torch.float64).sqrt())
    return torch.cat([rows, -rows])[None]


def test_dimensions_of_known_spectra():
    identity = torch.eye(4, dtype=torch.float64)
    x = spread([6.0, 3.0, 0.9, 0.1])
    assert [pca_dimension(x, identity, eta) for eta in (0.5, 0.6, 0.8, 0.95, 0.99, 0.999)] == [1, 2, 2, 3, 4, 4]
    assert pca_dimension(x, torch.cat([identity, identity])) == 4  # eight outputs, still four directions
    assert pca_dimension(x, torch.diag(torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64))) == 1
    assert effective_rank(spread([2.0] * 4)) == pytest.approx(4)
    assert effective_rank(spread([1.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(spread([1.0, 3.0])) == pytest.approx(math.exp(0.25 * math.log(4) + 0.75 * math.log(4 / 3)))
    for function in (
        lambda: pca_dimension(torch.zeros(1, 5, 4), identity),
        lambda: effective_rank(torch.ones(1, 5, 4)),
    ):
        with pytest.raises(Undefined, match="no variance"):
            function()


# ------------------------------------------------------------------------------------------------- any encoder body


class Other(Body):
    """A body of another make: torch's attention, ReLU, no softmax module, no output map of its own."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.operation, self.projection = nn.Module(), None
            self.operation.query = nn.Linear(E, E)
            self.operation.head_size = 4
            self.operation.forward = lambda x: self.operation.query(x).softmax(1) * x
            self.feed_forward = nn.Sequential(nn.Linear(E, 6), nn.ReLU(), nn.Linear(6, E))

        def forward(self, x):
            return self.feed_forward(self.operation(x)) + x

    def __init__(self):
        super().__init__(E)
        self.layers = nn.ModuleList(self.Block() for _ in range(2))

    def initialise(self, draws, init_range):
        for parameter in self.parameters():
            nn.init.normal_(parameter, 0.0, init_range, generator=draws)

    def stacked(self):
        return list(self.layers)

    def forward(self, inputs, state, masks, choice=None):
        x = inputs.transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        return x.transpose(0, 1), state


def test_another_encoder_is_measured_too():
    made = TokenNetwork(TokenEmbedding(V, E, P), Other())
    made.initialise(0, 0.3)
    found = measure(made, tokens(), METRICS, 0)
    undefined = {name for name, value in found.items() if isinstance(value, str)}
    assert undefined == {name for name in METRICS if name.startswith("softmax")}
    assert found["softmax_confidence"] == "the network has none of its softmax"
    on = made.body.layers[0].feed_forward[:2](made.body.layers[0].operation(made.embedding(tokens()).transpose(0, 1)))
    assert found["activation_distance"] > activation_distance(on.detach()) > 0


def test_full_space_bodies_are_measured():
    """Relative keys, a W for each head, sizes that differ from layer to layer."""
    layers = [Layer("SA-WMA", 2, 8, (12,)), Layer("LT-DFT", 4, 16, (12, 20)), Layer("DSC-5", 4, 8, (12,))]
    found = measure(network(Encoder(layers, E, max_length=P)), tokens(), METRICS, 0)
    assert all(isinstance(value, float) and math.isfinite(value) for value in found.values())


# ------------------------------------------------------------------------------------------------------------ manners


def test_one_metric_is_what_it_is_among_all():
    net, ids = sampled(1), tokens()
    together = measure(net, ids, METRICS, 0)
    assert together == pytest.approx({name: measure(net, ids, [name], 0)[name] for name in METRICS}, rel=1e-8)


def test_what_it_leaves_behind():
    """No hooks, no gradients; and nothing is recorded for a gradient that no metric asks for."""
    net, seen = sampled(0), []
    net.body.layers[-1].register_forward_hook(lambda m, a, output: seen.append(output.requires_grad))
    measure(net, tokens(), FORWARD, 0)
    measure(net, tokens(), ["synaptic_saliency"], 0)
    assert seen == [False, True]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert sum(len(module._forward_hooks) for module in net.modules()) == 1


def test_weights_and_probe_follow_the_seed():
    values = [
        measure(sampled_again, tokens(), ["probed_head_importance"], seed)
        for sampled_again, seed in ((sampled(0), 0), (sampled(0), 0), (sampled(0), 1))
    ]
    assert values[0] == values[1] != values[2]
