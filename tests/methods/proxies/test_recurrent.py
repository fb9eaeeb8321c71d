"""Metrics against plain one-at-a-time computations on small networks, and against published values on full ones."""

import json
import math
import os
import random
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lmnas.core.genotype import Genotype, load_genotype
from lmnas.core.seeds import generator
from lmnas.methods.proxies.recurrent import AMPLITUDES, METRICS, measure
from lmnas.methods.proxies.statistics import cosine_score, covariance_score
from lmnas.runs.build import covering_space
from lmnas.spaces.recurrent.graph import RecurrentGraph
from lmnas.spaces.recurrent.graph_body import GraphBody
from lmnas.spaces.recurrent.graph_form import base_names, n_states

T, B, V, WIDTHS = 7, 5, 11, (6, 4)
DATA = Path(os.environ.get("LMNAS_DATA", "data"))
TABLE, PTB = DATA / "nas-bench-nlp" / "architectures.jsonl", DATA / "penn-treebank"


def node(op, *inputs):
    return {"op": op, "input": list(inputs)}


GATED = {
    "a": node("linear", "x", "h_prev_0", "h_prev_1"),
    "b": node("activation_tanh", "a"),
    "c": node("linear", "h_prev_1", "b"),
    "d": node("activation_sigm", "c"),
    "h_new_1": node("blend", "d", "b", "a"),
    "e": node("activation_leaky_relu", "c"),
    "h_new_0": node("elementwise_sum", "h_new_1", "e"),
}


@pytest.fixture(scope="module")
def network():
    body = GraphBody(GATED, WIDTHS[-1], WIDTHS)
    body.initialise(generator(0, "init"), 0.1)
    body.double()
    embedding = torch.randn(V, WIDTHS[-1], generator=generator(0, "embedding"), dtype=torch.float64)
    tokens = torch.randint(0, V, (T, B), generator=generator(0, "tokens"))
    return body, embedding, tokens


class Plain:
    """One forward pass of GATED, node by node; keeps the hidden states that enter steps and the activations."""

    def __init__(self, body, embedded):
        self.entering, self.codes = [[] for _ in body.layers], []
        outputs = list(embedded)
        for number, (layer, width) in enumerate(zip(body.layers, WIDTHS, strict=True)):
            h = [torch.zeros(B, width, dtype=torch.float64, requires_grad=True) for _ in range(2)]
            new = []
            for x in outputs:
                self.entering[number].append(h[0])
                if not h[0].is_leaf:
                    h[0].retain_grad()
                values = dict(zip(base_names(2), (x, *h), strict=True))
                for name in ("a", "b", "c", "d", "h_new_1", "e", "h_new_0"):
                    op, read = GATED[name]["op"], [values[i] for i in GATED[name]["input"]]
                    if op == "linear":
                        row = layer.linears.index(name)
                        values[name] = layer.biases[row]
                        for source, value in zip(GATED[name]["input"], read, strict=True):
                            k = layer.readers[source].index(name)
                            values[name] = values[name] + value @ layer.weights[source][k * width : (k + 1) * width].t()
                    elif op.startswith("activation"):
                        function = {"tanh": torch.tanh, "sigm": torch.sigmoid, "leaky_relu": F.leaky_relu}
                        values[name] = function[op.removeprefix("activation_")](read[0])
                        self.codes.append((values[name] > 0).double())
                    else:
                        values[name] = (
                            read[0] + read[1] if len(read) == 2 else read[0] * read[1] + (1 - read[0]) * read[2]
                        )
                h = [values["h_new_0"], values["h_new_1"]]
                new.append(h[0])
            outputs = new
        self.total = torch.stack(outputs).sum()


def jacobian(body, embedded):
    leaf = embedded.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(Plain(body, leaf).total, leaf)
    return torch.stack([gradient[:, b].flatten() for b in range(B)])


@pytest.fixture(scope="module")
def values(network):
    return measure(*network, METRICS, 0)


def test_hidden_covariance_has_a_row_for_each_unit(network, values):
    body, embedding, tokens = network
    plain = Plain(body, embedding[tokens])
    for layer in (1, 2):
        states = torch.stack(plain.entering[layer - 1]).detach()
        rows = torch.stack([states[:, :, unit].flatten() for unit in range(WIDTHS[layer - 1])])
        assert rows.shape == (WIDTHS[layer - 1], T * B) and not rows[:, :B].any()
        assert values[f"hidden_covariance_{layer}"] == pytest.approx(covariance_score(rows), rel=1e-6)
    assert values["hidden_covariance_3"] == "the body has 2 layers"


def test_fewer_layers_are_run_where_fewer_are_asked_for(network, values):
    body, embedding, tokens = network
    calls = []
    handles = [layer.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, layer in enumerate(body.layers)]
    first = measure(body, embedding, tokens, ["hidden_covariance_1"], 0)
    for handle in handles:
        handle.remove()
    assert calls == [0]
    assert first["hidden_covariance_1"] == pytest.approx(values["hidden_covariance_1"], rel=1e-9)


def test_activation_distance_counts_agreements_of_codes(network, values):
    body, embedding, tokens = network
    kernel = sum(x @ x.t() + (1 - x) @ (1 - x).t() for x in Plain(body, embedding[tokens]).codes)
    assert values["activation_distance"] == pytest.approx(torch.linalg.slogdet(kernel)[1].item(), rel=1e-9)


def test_jacobian_scores_are_those_of_its_rows(network, values):
    body, embedding, tokens = network
    embedded = embedding[tokens]
    clean = jacobian(body, embedded)
    noise = torch.randn(embedded.shape, generator=generator(0, "metric-noise")).double()
    variance = (embedded - embedded.mean(1, keepdim=True)).square().mean(1, keepdim=True)
    noised = {a: jacobian(body, embedded + a * variance * noise) for a in AMPLITUDES}
    for score, name in ((covariance_score, ""), (cosine_score, "_cosine")):
        expected = score(clean)
        assert values["jacobian_covariance" if not name else "jacobian_cosine"] == pytest.approx(expected, rel=1e-6)
        large = 1 - abs(expected - score(noised[10.0]))
        assert values[f"large_noise_jacobian{name}"] == pytest.approx(large, rel=1e-6)
        product = expected * math.prod(score(noised[a]) for a in (0.1, 10.0, 100.0))
        assert values[f"more_noised_jacobian{name}"] == pytest.approx(product, rel=1e-6)


def test_saliencies_are_weights_times_gradients(network, values):
    body, embedding, tokens = network
    leaf = embedding.clone().requires_grad_()
    body.zero_grad()
    plain = Plain(body, leaf[tokens])
    plain.total.backward()
    total = (leaf * leaf.grad).abs().sum()
    for layer in body.layers:
        for name in ("a", "c"):
            for source in GATED[name]["input"][1:]:  # not the first
                k, width = layer.readers[source].index(name), layer.width
                rows = slice(k * width, (k + 1) * width)
                total = total + (layer.weights[source][rows] * layer.weights[source].grad[rows]).abs().sum()
    assert values["synaptic_saliency"] == pytest.approx(total.item(), rel=1e-9)
    hidden = sum((h * h.grad).abs().sum() for entering in plain.entering for h in entering if h.grad is not None)
    assert values["hidden_saliency"] == pytest.approx(hidden.item(), rel=1e-9)


def test_sizes_are_counted(network, values):
    """Per layer: a reads x and two states, c a state and b; two biases."""
    matrices = 6 * 4 + 4 * 6 * 6 + 4 * 6 + 4 * 4 * 4
    assert values["operations"] == matrices
    assert values["parameters"] == matrices + 2 * 6 + 2 * 4 + V * 4 + V


def test_a_shared_pass_gives_what_single_ones_give(network, values):
    body, embedding, tokens = network
    for name in METRICS:
        alone = measure(body, embedding, tokens, [name], 0)[name]
        assert alone == (values[name] if isinstance(alone, str) else pytest.approx(values[name], rel=1e-6))


@pytest.mark.parametrize("name", ["darts-v2", "enas", "lstm-3", "nas-bench-nlp-gru"])
def test_every_recurrent_body_is_measured(name, network):
    _, embedding, tokens = network
    genotype = load_genotype(name)
    body = covering_space(genotype).build(genotype, WIDTHS[-1])
    body.initialise(generator(0, "init"), 0.5)
    found = measure(body.double(), embedding, tokens, METRICS, 0)
    layers = 3 if name == "lstm-3" else 1
    undefined = {f"hidden_covariance_{layer}" for layer in range(layers + 1, 4)}
    # whether PyTorch runs an LSTM as one operation depends on its dtype and the machine
    opaque = {"activation_distance"} if name == "lstm-3" else set()
    assert {metric for metric, value in found.items() if isinstance(value, str)} - opaque == undefined
    outputs, _ = body(embedding[tokens], body.initial_state(B), {})
    rows = torch.cat([torch.zeros_like(outputs[:1]), outputs[:-1]]).flatten(0, 1).t()
    assert found[f"hidden_covariance_{layers}"] == pytest.approx(covariance_score(rows), rel=1e-6)


def test_a_dead_cell_has_reasons_instead_of_scores(network):
    _, embedding, tokens = network
    dead = {
        "a": node("linear", "x", "h_prev_0"),
        "b": node("activation_leaky_relu", "a"),
        "c": node("elementwise_prod", "b", "h_prev_0"),
        "h_new_0": node("elementwise_prod", "b", "c"),
    }
    body = GraphBody(dead, WIDTHS[-1], WIDTHS)
    body.initialise(generator(0, "init"), 0.1)
    found = measure(body.double(), embedding, tokens, METRICS, 0)
    assert found["hidden_covariance_1"] == "6 of 6 rows are constant"
    assert found["jacobian_cosine"] == "5 of 5 rows are zero"
    assert found["hidden_saliency"] == 0.0


# --------------------------------------------------------------------------------------------------- published values


def as_released(recipe):
    """The full network with weights drawn as the release draws them (torch seed 0), and its PTB test batch.

    Order: an embedding (drawn anew at the end), per layer the default initialisation of every linear node in the
    recipe's order (drawn anew at once: bias, then matrices), a decoder, the embedding twice.
    """
    torch.manual_seed(0)
    body = GraphBody(recipe, 400, (600, 600, 400))
    torch.empty(10_000, 400).normal_()
    linears = [name for name, value in recipe.items() if value["op"] == "linear"]
    with torch.no_grad():
        for layer in body.layers:
            width, bound = layer.width, layer.width**-0.5
            sizes = {
                name: [layer.in_width if source == "x" else width for source in recipe[name]["input"]]
                for name in linears
            }
            for name in linears:
                for size in sizes[name]:
                    torch.empty(width, size).uniform_()
                torch.empty(width).uniform_()
            for name in linears:
                layer.biases[layer.linears.index(name)].uniform_(-bound, bound)
                for source, size in zip(recipe[name]["input"], sizes[name], strict=True):
                    row = layer.readers[source].index(name) * width
                    layer.weights[source][row : row + width] = torch.empty(width, size).uniform_(-bound, bound)
        torch.empty(10_000, 600).uniform_()
        torch.empty(10_000).uniform_()
        for _ in range(2):
            embedding = torch.empty(10_000, 400).uniform_(-0.1, 0.1)
    index, test = {}, []
    for split in ("train", "valid", "test"):
        words = (PTB / f"{split}.txt").read_text().replace("\n", " <eos> ").split()
        test = [index.setdefault(word, len(index)) for word in words]
    rows = len(test) // 50
    return body, embedding, torch.tensor(test[: rows * 50]).view(50, rows)[:, :70].t().contiguous()


@pytest.fixture(scope="module")
def table():
    if not (TABLE.is_file() and (PTB / "test.txt").is_file()):
        pytest.skip("the NAS-Bench-NLP table or Penn Treebank is not in LMNAS_DATA")
    return {entry["id"]: entry for entry in map(json.loads, TABLE.read_text().splitlines())}


@pytest.mark.parametrize(
    "cell, expected, distance",
    [
        (1006811, (-30_369.28, -260_145.6, -514_904.0), 347.427),
        (1007532, (-340_872.9, -5_030_773.0, -9_369_536.0), 432.473),
        (1012263, (-10_138_484.0, -26_109_726.0, -28_990_222.0), 403.304),
    ],
)
def test_hidden_covariance_is_the_published_one(table, cell, expected, distance):
    names = ["hidden_covariance_1", "hidden_covariance_2", "hidden_covariance_3", "activation_distance"]
    found = measure(*as_released(table[cell]["recipe"]), names, 0)
    assert [found[name] for name in names[:3]] == pytest.approx(expected, rel=1e-4)
    assert found["activation_distance"] == pytest.approx(distance, abs=0.01)


def test_saliencies_and_cosine_are_the_published_ones(table):
    entry = table[1007532]
    found = measure(*as_released(entry["recipe"]), ["synaptic_saliency", "hidden_saliency", "jacobian_cosine"], 0)
    published = entry["published_metrics"]
    assert found["synaptic_saliency"] == pytest.approx(published["synaptic_saliency"], rel=1e-4)
    assert found["hidden_saliency"] == pytest.approx(published["hidden_synaptic_saliency"], rel=1e-4)
    assert found["jacobian_cosine"] == pytest.approx(published["jacobian_cosine"], rel=1e-5)


def test_sampled_cells_are_measured_or_give_reasons():
    space, draws = RecurrentGraph(), generator(0, "tokens")
    embedding, tokens = torch.randn(V, 8), torch.randint(0, V, (T, B), generator=draws)
    for seed in range(20):
        genotype = space.sample(random.Random(seed))
        body = space.stack(genotype, 8, (8, 8, 8))
        body.initialise(generator(seed, "init"), 0.1)
        assert body.n_states == n_states(genotype.choices)
        for value in measure(body, embedding, tokens, METRICS, 0).values():
            assert isinstance(value, str) or math.isfinite(value)
    assert Genotype("recurrent-graph", GATED).id != space.canonical(Genotype("recurrent-graph", GATED)).id
