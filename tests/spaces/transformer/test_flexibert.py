"""FlexiBERT: sizes of the space, parameter counts, refusals, and a body that looks both ways and ignores padding."""

import itertools
import json
import random

import pytest
import torch
from torch.nn import functional as F

from lmnas.cli.show import describe
from lmnas.core.errors import UserError
from lmnas.core.genotype import Genotype
from lmnas.core.seeds import generator
from lmnas.runs.build import covering_space
from lmnas.runs.recipe import load_recipe
from lmnas.spaces.transformer.flexibert import (
    OPERATIONS,
    Encoder,
    FlexiBERT,
    Layer,
    as_scored,
    as_trained,
    layers_of,
    metric_body,
    trained_body,
)

T, B, W = 6, 3, 8
TINY = {"hidden": (8, 12), "feed_forward": (16, 24), "max_length": 10}


def space(**settings):
    return FlexiBERT(**{**TINY, **settings})


def every(decisions):
    """Every genotype's choices, by walking all options in order."""

    def walk(rest, choices):
        if not rest:
            yield choices
        elif not decisions.is_active(rest[0], choices):
            yield from walk(rest[1:], choices)
        else:
            for option in rest[0].options:
                yield from walk(rest[1:], {**choices, rest[0].name: option})

    yield from walk(list(decisions), {})


def test_sizes_are_the_published_ones():
    assert FlexiBERT().decisions.size() == 240**2 + 240**4 == 3_317_817_600
    assert FlexiBERT(form="reduced").decisions.size() == 2 * (48**2 + 48**4) == 10_621_440


@pytest.mark.parametrize("form, per_layer, shared", [("full", 6 * 1 * 2 * (2 + 8), 1), ("reduced", 6 * 1 * 2 * 2, 2)])
def test_a_small_instance_has_as_many_as_the_formula_says(form, per_layer, shared):
    """Layers 1 or 2, one number of heads, all else as published, counted one by one and all different."""
    small = FlexiBERT(form=form, layers=(1, 2), heads=(2,))
    genotypes = {Genotype("flexibert", choices).canonical for choices in every(small.decisions)}
    assert len(genotypes) == small.decisions.size() == shared * (per_layer + per_layer**2)
    assert len({str(layers_of(Genotype("flexibert", c))) for c in every(small.decisions)}) == len(genotypes)


def sample(form, operation, seed=0, **settings):
    """A genotype of four layers of one operation."""
    made = space(form=form, layers=(4,), **settings)
    choices = dict(made.sample(random.Random(seed)).choices)
    return made, Genotype("flexibert", {**choices, **{f"layer_{i}.operation": operation for i in range(1, 5)}})


def body(made, genotype, seed=0):
    net = made.build(genotype, W)
    net.initialise(generator(seed, "init"), 0.5)
    return net.double()


def run(net, inputs, lengths=None):
    return net(inputs, net.initial_state(inputs.shape[1]), {}, lengths=lengths)[0]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("form", ["full", "reduced"])
def test_bodies_use_all_their_weights_and_look_both_ways(form, operation):
    made, genotype = sample(form, operation)
    net = body(made, genotype)
    inputs = torch.randn(T, B, W, dtype=torch.float64, generator=generator(0, "x")).requires_grad_()
    out = run(net, inputs)
    assert out.shape == (T, B, net.n_features) and net.n_features == layers_of(genotype)[-1].hidden
    direction = torch.randn(out.shape, dtype=torch.float64, generator=generator(0, "direction"))
    gradients = torch.autograd.grad((out * direction).sum(), list(net.parameters()), retain_graph=True)
    assert all(torch.isfinite(g).all() for g in gradients) and all(g.any() for g in gradients if g.ndim > 1)
    (seen,) = torch.autograd.grad((out[2] * direction[2]).sum(), inputs)
    assert (seen.abs().sum((1, 2)) > 0).all()  # from the past and the future


@pytest.mark.parametrize("operation", OPERATIONS)
def test_padding_changes_nothing_that_is_real(operation):
    made, genotype = sample("full", operation)
    net, lengths = body(made, genotype), torch.tensor([T, 4, 1])
    inputs = torch.randn(T, B, W, dtype=torch.float64, generator=generator(0, "x"))
    found = run(net, inputs, lengths)
    for b, length in enumerate(lengths.tolist()):
        alone = run(net, inputs[:length, b : b + 1])
        torch.testing.assert_close(found[:length, b], alone[:, 0], rtol=0, atol=1e-9)


def test_a_layer_is_what_the_paper_says():
    """Operation, output map, add & norm, feed-forward stack with GELU, add & norm, then a map to the next size."""
    layers = [Layer("SA-SDP", 2, 8, (16, 24, 16)), Layer("LT-DCT", 4, 12, (24,))]
    net = Encoder(layers, W, max_length=10)
    net.initialise(generator(0, "init"), 0.5)
    net.double()
    x = torch.randn(T, B, W, dtype=torch.float64, generator=generator(0, "x"))
    found, x = run(net, x), x.transpose(0, 1)
    for bridge, layer, sizes in zip(net.bridges, net.layers, layers, strict=True):
        x = bridge(x)
        x = F.layer_norm(x + layer.projection(layer.operation(x)), (sizes.hidden,), eps=1e-12)
        y = x
        for linear in list(layer.feed_forward.maps)[:-1]:
            y = 0.5 * linear(y) * (1 + torch.erf(linear(y) / 2**0.5))
        assert [m.out_features for m in layer.feed_forward.maps] == [*sizes.feed_forward, sizes.hidden]
        x = F.layer_norm(x + layer.feed_forward.maps[-1](y), (sizes.hidden,), eps=1e-12)
    torch.testing.assert_close(found, x.transpose(0, 1), rtol=0, atol=1e-9)
    assert isinstance(net.bridges[0], torch.nn.Identity) and net.bridges[1].weight.shape == (12, 8)


def test_initial_weights():
    made, genotype = sample("full", "SA-WMA", hidden=(64,), feed_forward=(128,), heads=(2,))
    net = made.build(genotype, W)
    net.initialise(generator(0, "init"), 0.02)
    for layer in net.layers:
        shared = layer.operation.weight.weight
        assert shared.shape == (32, 32) and 0.09 < shared.abs().max() <= 0.1
        assert layer.operation.query.weight.detach().std() == pytest.approx(0.02, rel=0.1)
        assert layer.operation.relative.table.detach().std() == pytest.approx(0.02, rel=0.1)
        assert not layer.operation.query.bias.any() and not layer.norm.bias.any() and (layer.norm.weight == 1).all()


def by_hand(layers, hidden, widths, block):
    """Parameters of a NAS-Bench-BERT network with its embeddings, from the shapes of its matrices."""

    def linear(a, b):
        return a * b + b

    total = 30_522 * 128 + 512 * 128 + 2 * 128 + 2 * 128
    total += linear(128, hidden) if hidden != 128 else 0
    for layer, stack in zip(layers, widths, strict=True):
        kind, _, parameter = layer.operation.partition("-")
        if kind == "SA":
            total += 3 * linear(hidden, hidden) + (hidden * hidden if parameter == "WMA" else 0)
        elif kind == "LT":
            total += linear(hidden, hidden)
        else:
            half, kernel = hidden // 2, int(parameter)
            total += 4 * linear(hidden, half) + hidden * kernel + hidden * half + half
            total += linear(half, layer.heads // 2 * kernel)
        if kind != "LT" or block:
            total += linear(hidden, hidden) + 2 * hidden
        total += sum(linear(a, b) for a, b in itertools.pairwise([hidden, *stack, hidden])) + 2 * hidden
    return total


@pytest.mark.parametrize("seed", range(10))
def test_benchmark_bodies_have_the_parameters_of_their_shapes(seed):
    genotype = FlexiBERT(form="reduced").sample(random.Random(seed))
    layers, embedding = layers_of(genotype), 30_522 * 128 + 512 * 128 + 4 * 128
    hidden = genotype.choices["hidden"]
    with torch.device("meta"):
        bodies = [metric_body(genotype), trained_body(genotype), trained_body(genotype, first_is_4h=True)]
    counts = [embedding + sum(p.numel() for p in net.parameters()) for net in bodies]
    assert counts == [
        by_hand(layers, 256, [(1024,) * len(layer.feed_forward) for layer in layers], False),
        by_hand(layers, hidden, [layer.feed_forward for layer in layers], True),
        by_hand(layers, hidden, [(4 * hidden, *layer.feed_forward[1:]) for layer in layers], True),
    ]


def test_scored_and_trained_layers():
    layer = Layer("DSC-9", 4, 128, (512, 512, 512))
    assert as_scored([layer]) == [Layer("DSC-9", 4, 256, (1024, 1024, 1024))]
    assert as_trained([layer]) == [Layer("DSC-9", 4, 128, (512, 512, 512))]
    assert as_trained([Layer("LT-DFT", 2, 256, (512,))]) == [Layer("LT-DFT", 2, 256, (1024,))]


@pytest.mark.parametrize("form", ["full", "reduced"])
def test_covering_knows_the_form_and_the_sizes(form):
    made = space(form=form, max_length=512)
    for seed in range(5):
        genotype = made.sample(random.Random(seed))
        found = covering_space(Genotype.from_dict(json.loads(json.dumps(genotype.to_dict()))))
        assert found.form == form
        found.check(genotype)
        shapes, others = ([p.shape for p in s.build(genotype, W).parameters()] for s in (made, found))
        assert shapes == others


def test_mutation_changes_depth_and_draws_what_appears():
    made, seen = space(), set()
    shallow = next(g for g in (made.sample(random.Random(s)) for s in range(50)) if g.choices["layers"] == 2)
    for seed in range(200):
        mutant = made.mutate(shallow, random.Random(seed))
        made.check(mutant)
        seen.add(mutant.choices["layers"])
        assert len(layers_of(mutant)) == mutant.choices["layers"]
    assert seen == {2, 4}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"heads": (3,)}, "space.heads: expected even numbers (half of DSC's heads convolve), got 3"),
        ({"hidden": (10,)}, "space.hidden: 10 is not a multiple of 4 heads"),
        ({"stacks": (1, 1)}, "space.stacks: each may stand once, got 1, 1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UserError) as refusal:
        space(**settings)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layer_1.operation": "SA-SPD"}, "Did you mean 'SA-SDP'?"),
        ({"layer_9.heads": 2}, "unknown decision 'layer_9.heads'. Did you mean"),
        ({"layer_1.feed_forward_1": None}, "layer_1.feed_forward_1: None is not one of 16, 24."),
        ({"layers": 2}, "'layer_3.operation' has no effect here"),
        ({"layer_1.hidden": True}, "layer_1.hidden: True is not one of 8, 12."),
    ],
)
def test_bad_genotypes_are_refused(change, message):
    made, genotype = sample("full", "SA-SDP")
    made = space()
    made.check(genotype)
    with pytest.raises(UserError) as refusal:
        made.check(Genotype("flexibert", {**genotype.choices, **change}))
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_sequences_longer_than_the_relative_keys_reach_are_refused():
    made, genotype = sample("full", "SA-SDP")
    with pytest.raises(UserError, match="a sequence of 11 positions; this encoder takes 10 at most"):
        run(body(made, genotype), torch.zeros(11, 1, W, dtype=torch.float64))


def test_language_modelling_refuses_a_body_that_sees_the_next_word():
    with pytest.raises(UserError, match="makes bidirectional transformer sequence bodies"):
        load_recipe("quickstart", {"space": {"name": "flexibert"}})


def test_show_counts_the_body_alone(tmp_path):
    """A body that makes no language model is not counted as one."""
    genotype = FlexiBERT(form="reduced").sample(random.Random(0))
    (tmp_path / "mine.json").write_text(json.dumps(genotype.to_dict()))
    result, shown = describe(str(tmp_path / "mine.json"), 128, None, tmp_path)
    with torch.device("meta"):
        expected = sum(p.numel() for p in covering_space(genotype).build(genotype, 128).parameters())
    assert result["n_parameters"] is None and result["n_parameters_body"] == expected
    assert f"parameters: {expected:,} in the body, for embeddings of width 128" in shown
    assert (tmp_path / "mine.svg").stat().st_size > 0
