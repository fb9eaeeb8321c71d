"""Strips: what lies in them by hand, the proximal step, variances against the general prior, cutting."""

import math

import pytest
import torch
from torch import nn

from lmnas.core.contracts import Batch
from lmnas.core.errors import UserError
from lmnas.core.seeds import generator
from lmnas.nn.sparsity.priors import Prior
from lmnas.nn.sparsity.strips import Family, Layout, Piece, plain_layout
from lmnas.nn.sparsity.training import layout
from lmnas.spaces.recurrent.layers import LayersBody, LSTMBody
from lmnas.tasks.language_modeling import LanguageModel, ModelSettings

DOUBLE = torch.float64
V = 11


def language_model(cell="lstm", inner=(), width=5, seed=0):
    """Every weight different from zero, in float64."""
    body = LayersBody(cell, list(inner), width)
    model = LanguageModel(body, V, ModelSettings(width=width, init_range=0.5)).double()
    model.initialise(generator(seed, "init"))
    nn.init.uniform_(model.bias, -0.5, 0.5, generator=generator(seed, "bias"))
    return model


def segment(seed=0, time=6, batch=3):
    tokens = torch.randint(V, (time + 1, batch), generator=generator(seed, "tokens"))
    return Batch(tokens[:-1], tokens[1:], tokens[1:].numel())


def positions(strips, weights, family, unit):
    """{(weight, index...)} of the entries of one strip, counted; found by sums of one-hot weights."""
    found = {}
    for name in strips.by_weight:
        for index in torch.ones_like(weights[name]).nonzero().tolist():
            zeros = {other: torch.zeros_like(weights[other]) for other in strips.by_weight}
            zeros[name][tuple(index)] = 1.0
            count = strips.sums(zeros)[family][unit].item()
            if count:
                found[(name, *index)] = count
    return found


def test_the_notes_table_by_hand():
    """2 units, 3 inputs, 2 outputs: W_x row and column, W_i row, W_o column; an input's column of W_i."""
    strips = plain_layout(2, 3)
    weights = {"w_x": torch.zeros(2, 2), "w_i": torch.zeros(2, 3), "w_o": torch.zeros(2, 2)}
    assert positions(strips, weights, "state", 1) == dict.fromkeys(
        [
            *[("w_x", 1, 0), ("w_x", 1, 1), ("w_x", 0, 1)],
            *[("w_i", 1, 0), ("w_i", 1, 1), ("w_i", 1, 2)],
            *[("w_o", 0, 1), ("w_o", 1, 1)],
        ],
        1.0,
    )
    assert positions(strips, weights, "input", 2) == {("w_i", 0, 2): 1.0, ("w_i", 1, 2): 1.0}


def test_an_lstm_layers_strip_has_its_four_gates():
    model = language_model(width=2)
    weights = dict(model.named_parameters())
    rows, columns = [1, 3, 5, 7], range(8)
    expected = {("embedding", word, 1) for word in range(V)}
    for name in ("weight_ih", "weight_hh"):
        expected |= {(f"body.layers.0.{name}_l0", row, column) for row in rows for column in (0, 1)}
        expected |= {(f"body.layers.0.{name}_l0", row, 1) for row in columns}
    expected |= {(f"body.layers.0.{name}_l0", row) for name in ("bias_ih", "bias_hh") for row in rows}
    assert positions(layout(model), weights, "embedding", 1) == dict.fromkeys(expected, 1.0)


@pytest.mark.parametrize("cell", ["lstm", "rnn"])
@pytest.mark.parametrize("inner", [[], [3], [3, 4]])
def test_strips_cover_everything_but_the_output_bias(cell, inner):
    """A matrix between units lies in the strips of both its ends, all else in one; no entry twice in one strip."""
    model = language_model(cell, inner, width=2)
    strips, weights = layout(model), dict(model.named_parameters())
    assert set(strips.by_weight) == set(weights) - {"bias"}
    assert [family.size for family in strips.families] == [2, *inner]
    covered = {}
    for family in strips.families:
        for unit in range(family.size):
            for entry, count in positions(strips, weights, family.name, unit).items():
                assert count == 1
                covered.setdefault(entry, []).append((family.name, unit))
    for name in strips.by_weight:
        for index in torch.ones_like(weights[name]).nonzero().tolist():
            ends = covered[(name, *index)]
            assert len(ends) == 1 or (len(ends) == 2 and "weight" in name)
            assert len(ends) == 2 or "weight" not in name or ends[0][1] in index  # a unit and itself


def test_bodies_without_strips_are_refused():
    from lmnas.core.genotype import load_genotype
    from lmnas.runs.build import covering_space

    genotype = load_genotype("darts-v2")
    model = LanguageModel(covering_space(genotype).build(genotype, 4), V, ModelSettings(width=4))
    with pytest.raises(UserError, match="no strips of units"):
        layout(model)


# ------------------------------------------------------------------------------------------------------ proximal step


def test_the_proximal_step_is_the_block_soft_threshold_where_strips_share_nothing():
    """w max(0, 1 - t / |w|): [3, 4] with t = 1 becomes [2.4, 3.2]; [0.3, 0.4] with t = 0.6 dies."""
    strips = Layout((Family("rows", 2, (Piece("w", 0),)),))
    weights = {"w": torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=DOUBLE)}
    strips.shrink(weights, {"rows": torch.tensor([1.0, 0.6], dtype=DOUBLE)})
    assert torch.allclose(weights["w"], torch.tensor([[2.4, 3.2], [0.0, 0.0]], dtype=DOUBLE))
    assert (weights["w"][1] == 0).all()


def test_the_proximal_step_minimises_where_strips_share_nothing():
    """Against the definition: argmin over x of |x - w|^2 / 2 + t |x|, by descent from many sides."""
    w = torch.randn(4, generator=generator(0, "w"), dtype=DOUBLE)
    weights = {"w": w[None].clone()}
    Layout((Family("rows", 1, (Piece("w", 0),)),)).shrink(weights, {"rows": torch.tensor([0.3], dtype=DOUBLE)})
    x = weights["w"][0]

    def cost(x):
        return 0.5 * (x - w).square().sum() + 0.3 * x.norm()

    for seed in range(200):
        step = torch.randn(4, generator=generator(seed, "step"), dtype=DOUBLE)
        assert cost(x + 1e-3 * step) > cost(x)


def test_overlapping_strips_take_both_steps_to_second_order():
    """The two proximal maps one after the other, in plain loops over units, against the factors of one step."""
    strips = plain_layout(3, 2)
    shapes = {"w_x": (3, 3), "w_i": (3, 2), "w_o": (2, 3)}
    start = {k: torch.randn(shape, generator=generator(1, k), dtype=DOUBLE) for k, shape in shapes.items()}

    def one_after_the_other(t):
        w = {k: v.clone() for k, v in start.items()}
        for n in range(3):
            own = w["w_x"][n].square().sum() + w["w_x"][:, n].square().sum() - w["w_x"][n, n] ** 2
            norm = (own + w["w_i"][n].square().sum() + w["w_o"][:, n].square().sum()).sqrt()
            factor = 1 - t / norm
            diagonal = w["w_x"][n, n] * factor
            w["w_x"][n] *= factor
            w["w_x"][:, n] *= factor
            w["w_x"][n, n] = diagonal
            w["w_i"][n] *= factor
            w["w_o"][:, n] *= factor
        for m in range(2):
            w["w_i"][:, m] *= 1 - t / w["w_i"][:, m].norm()
        return w

    errors = []
    for t in (1e-2, 5e-3):
        weights = {k: v.clone() for k, v in start.items()}
        strips.shrink(weights, strips.full(t))
        expected = one_after_the_other(t)
        errors.append(max((weights[k] - expected[k]).abs().max().item() for k in weights))
    assert 0 < errors[0] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


# ----------------------------------------------------------------------------------------------------------- variances


def test_variances_agree_with_the_general_prior():
    """The same groups as an explicit prior over single weights (`nn.sparsity.priors`), cost and updates to 1e-12."""
    model = language_model("rnn", [2], width=3)
    strips = layout(model)
    weights = {k: v.detach() for k, v in model.named_parameters() if k in strips.by_weight}
    h = {k: torch.rand(v.shape, generator=generator(0, "h", k), dtype=DOUBLE) * 9 for k, v in weights.items()}
    groups = [(family.name, n) for family in strips.families for n in range(family.size)]
    members = [positions(strips, weights, *group) for group in groups]
    entries = [(k, *index) for k, v in weights.items() for index in torch.ones_like(v).nonzero().tolist()]
    terms = tuple(tuple(g for g, held in enumerate(members) if entry in held) for entry in entries)
    prior = Prior(terms, tuple((g,) for g in range(len(groups))))
    w, flat_h = (torch.stack([values[k][tuple(i)] for k, *i in entries]) for values in (weights, h))

    def flat(each):
        return torch.cat([each[family.name] for family in strips.families])

    start = strips.full(1.0)
    objectives = [strips.objective(weights, h, start)]
    for steps in (1, 2, 50):
        s = strips.update(weights, h, start, steps)
        assert torch.allclose(flat(s), prior.fit(w, flat_h, prior.initial(), steps), rtol=1e-12)
        objectives.append(strips.objective(weights, h, s))
        assert torch.allclose(objectives[-1], prior.objective(w, flat_h, flat(s)), rtol=1e-12)
    assert objectives == sorted(objectives, reverse=True)
    omega = strips.omega(h, s)
    assert torch.allclose(strips.cost(weights, omega), prior.penalty(flat_h, flat(s))(w), rtol=1e-12)


def test_a_lone_weight_has_the_worked_variance():
    """w = 1, h = 2: gamma -> w^2 / 2 + sqrt(w^4 / 4 + w^2 / h) = 1.3660254."""
    strips = Layout((Family("one", 1, (Piece("w", 0),)),))
    s = strips.update({"w": torch.ones(1)}, {"w": torch.full((1,), 2.0)}, strips.full(1.0), 100)
    assert s["one"].item() == pytest.approx(0.5 + math.sqrt(0.75), abs=1e-9)


def test_gain_is_the_evidence_of_keeping_a_weight():
    """Against the integral of exp(-h (v - w)^2 / 2) over v ~ N(0, gamma), by sums over a fine grid."""
    strips = Layout((Family("one", 1, (Piece("w", 0),)),))
    v = torch.linspace(-30, 30, 600_001, dtype=DOUBLE)
    for w, h, gamma in ((1.0, 2.0, 0.7), (0.3, 2.0, 0.5), (2.0, 0.4, 5.0)):
        prior = (-v.square() / (2 * gamma)).exp() / math.sqrt(2 * math.pi * gamma)
        kept = ((-h * (v - w).square() / 2).exp() * prior).sum() * 1e-4
        expected = 2 * (kept.log() + h * w * w / 2)
        weights, curvature = {"w": torch.tensor([w])}, {"w": torch.tensor([h])}
        found = strips.gain(weights, curvature, strips.full(gamma))["one"].item()
        assert found == pytest.approx(expected.item(), abs=1e-6)


def test_gain_of_equal_weights_turns_at_the_documented_worth():
    """u = w^2 h. The best variance is g / h, g = u / 2 + sqrt(u^2 / 4 + u); u g / (1 + g) = log(1 + g) at u = 1.745."""
    strips = Layout((Family("one", 1, (Piece("w", 0),)),))
    for u, sign in ((1.74, -1), (1.75, 1)):
        weights, h = {"w": torch.full((1, 7), 0.5)}, {"w": torch.full((1, 7), u / 0.25)}
        s = strips.update(weights, h, strips.full(1.0), 100)
        assert strips.gain(weights, h, s)["one"].item() * sign > 0


# ------------------------------------------------------------------------------------------------------------- cutting


@pytest.mark.parametrize("cell", ["lstm", "rnn"])
@pytest.mark.parametrize("inner", [[], [4], [4, 3]])
def test_the_smaller_dense_network_is_the_masked_one(cell, inner):
    """Loss, state and what the softmax reads, to the last digits; a killed strip's other half may be anything."""
    model = language_model(cell, inner, width=5)
    strips, weights = layout(model), dict(model.named_parameters())
    killed = {"embedding": [1, 4], "layer 1": [0, 2], "layer 2": [1]}
    kept = {f.name: torch.tensor([n not in killed[f.name] for n in range(f.size)]) for f in strips.families}
    thresholds = {name: torch.where(living, 0.0, math.inf).double() for name, living in kept.items()}
    with torch.no_grad():
        before = model(segment(), {})[0]
    strips.shrink({k: v.data for k, v in weights.items()}, thresholds)
    sizes = [int(kept[f"layer {i + 1}"].sum()) for i in range(len(inner))]
    small = language_model(cell, sizes, width=3, seed=9)
    small.load_state_dict(strips.cut(model.state_dict(), kept))
    with torch.no_grad():
        masked, state = model(segment(), {})
        loss, smaller_state = small(segment(), {})
        assert torch.allclose(loss, masked, rtol=1e-14, atol=0)
        assert not torch.allclose(before, masked, rtol=1e-3)
        features = model.features(segment())
        assert torch.allclose(small.features(segment()), features[:, kept["embedding"]], rtol=1e-13, atol=1e-15)
        assert (features[:, ~kept["embedding"]] == 0).all()
        later = segment(seed=1)
        assert torch.allclose(small(later, smaller_state, {})[0], model(later, state, {})[0], rtol=1e-14, atol=0)


def test_a_dead_strip_gets_no_gradient():
    """Nothing reads the unit and nothing drives it: it stays dead without a mask."""
    model = language_model("lstm", [], width=4)
    strips, weights = layout(model), dict(model.named_parameters())
    dead = torch.tensor([0.0, math.inf, 0.0, 0.0], dtype=DOUBLE)
    strips.shrink({k: v.data for k, v in weights.items()}, {"embedding": dead})
    model(segment(), {})[0].backward()
    norms = strips.norms({k: v.grad for k, v in weights.items()})["embedding"]
    assert norms[1] == 0 and (norms[[0, 2, 3]] > 1e-3).all()


def test_a_stack_of_equal_layers_is_the_lstm_body():
    stack, lstm = LayersBody("lstm", [4], 4).double(), LSTMBody(2, 4).double()
    stack.initialise(generator(0, "init"), 0.04)
    lstm.load_state_dict(stack.state_dict())
    inputs = torch.randn(5, 3, 4, generator=generator(0, "x"), dtype=DOUBLE)
    rates = {"x": 0.5, "hidden": 0.5, "weight": 0.5}
    masks = [body.draw_masks(3, rates, generator(0, "masks")) for body in (stack, lstm)]
    outputs, state = stack(inputs, stack.initial_state(3), masks[0])
    expected, expected_state = lstm(inputs, lstm.initial_state(3), masks[1])
    assert torch.equal(outputs, expected)
    assert torch.equal(torch.stack(state), expected_state)
