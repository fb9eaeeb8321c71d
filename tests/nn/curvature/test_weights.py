"""Curvature of all weights of a language model: against the exact Gauss-Newton diagonal, and what adds up exactly."""

import pytest
import torch
import torch.nn.functional as F

from lmnas.core.contracts import Batch
from lmnas.core.errors import UserError
from lmnas.core.seeds import generator
from lmnas.nn.curvature import gauss_newton_diagonal, recursion_weights, sampled_weights, softmax_form
from lmnas.spaces.recurrent.layers import LayersBody
from lmnas.tasks.language_modeling import LanguageModel, ModelSettings

V = 5


def language_model(cell, inner=(), width=3):
    model = LanguageModel(LayersBody(cell, list(inner), width), V, ModelSettings(width=width, init_range=0.8)).double()
    model.initialise(generator(0, "init"))
    return model


def segment(time, batch):
    tokens = torch.randint(V, (time + 1, batch), generator=generator(0, "tokens"))
    return Batch(tokens[:-1], tokens[1:], tokens[1:].numel())


def plain_logits(model, weights, batch):
    """A one-layer tanh network with tied embedding, written out."""
    layer = {name.removeprefix("body.layers.0."): value for name, value in weights.items()}
    h, rows = torch.zeros(batch.inputs.shape[1], 3, dtype=torch.float64), []
    for tokens in batch.inputs:
        x = weights["embedding"][tokens]
        pre = x @ layer["weight_ih_l0"].t() + h @ layer["weight_hh_l0"].t()
        h = (pre + layer["bias_ih_l0"] + layer["bias_hh_l0"]).tanh()
        rows.append(h @ weights["embedding"].t() + weights["bias"])
    return torch.cat(rows)


def exact(model, batch):
    """Gauss-Newton diagonal of every weight, from a network written out and forward-mode products."""
    weights = {name: value.detach() for name, value in model.named_parameters()}
    probabilities = plain_logits(model, weights, batch).softmax(-1)
    assert torch.allclose(
        plain_logits(model, weights, batch), F.linear(model.features(batch), model.embedding, model.bias)
    )
    return {
        name: gauss_newton_diagonal(
            lambda values, name=name: plain_logits(model, {**weights, name: values}, batch),
            value,
            softmax_form(probabilities),
        )
        for name, value in weights.items()
    }


def test_sampled_gradients_are_unbiased():
    model, batch = language_model("rnn"), segment(3, 2)
    expected = exact(model, batch)
    mean = {name: torch.zeros_like(value) for name, value in expected.items()}
    n = 1500
    for k in range(n):
        for name, value in sampled_weights(model, [batch], 0, k).items():
            mean[name] += value / n
    for name, value in expected.items():
        assert torch.allclose(mean[name], value, rtol=0.25, atol=0.01 * value.max().item()), name
        assert mean[name].sum().item() == pytest.approx(value.sum().item(), rel=0.06), name


def test_one_step_of_the_recursion_is_exact_up_to_the_tie():
    """One step from zero: no weight is met twice but the embedding's, whose uses are added without their product."""
    model, batch = language_model("rnn"), segment(1, 4)
    expected, found = exact(model, batch), recursion_weights(model, [batch])
    for name in expected:
        if name != "embedding":
            assert torch.allclose(found[name], expected[name], rtol=1e-10), name
    rows = sorted(set(range(V)) - set(batch.inputs.flatten().tolist()))
    assert rows
    assert torch.allclose(found["embedding"][rows], expected["embedding"][rows], rtol=1e-10)


def test_the_two_methods_agree_in_size():
    """Over several steps the recursion leaves out what couples them: within a factor of two here, summed by weight."""
    model, batch = language_model("rnn"), segment(4, 6)
    expected, found = exact(model, batch), recursion_weights(model, [batch])
    for name in expected:
        assert 0.5 < found[name].sum() / expected[name].sum() < 2, name


def test_batches_are_averaged_by_their_predictions():
    model, first, second = language_model("rnn"), segment(2, 1), segment(4, 1)
    both = recursion_weights(model, [first, second])
    one, two = recursion_weights(model, [first]), recursion_weights(model, [second])
    for name in both:
        assert torch.allclose(both[name], (2 * one[name] + 4 * two[name]) / 6)


def test_labels_are_drawn_anew_by_index_alone():
    model, batch = language_model("lstm", [2]), segment(3, 2)
    first, again, other = (sampled_weights(model, [batch], 0, k) for k in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embedding"], other["embedding"])
    assert all(value.min() >= 0 for value in first.values())


@pytest.mark.parametrize("cell, inner", [("lstm", ()), ("rnn", (2,))])
def test_the_recursion_is_for_one_plain_layer(cell, inner):
    with pytest.raises(UserError, match="one plain recurrent layer"):
        recursion_weights(language_model(cell, inner), [segment(2, 1)])
