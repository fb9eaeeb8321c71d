"""The controller on ENAS' macro space: its sequence written out, and the penalty on the rate of skips by hand."""

import itertools
import math
import random

import numpy as np
import pytest
import tiny
import torch

from lmnas.core import seeds
from lmnas.core.contracts import Objective
from lmnas.core.decisions import Decisions, OneOf, Subset
from lmnas.core.genotype import Genotype, load_genotype
from lmnas.core.registry import create
from lmnas.methods.strategies.controller import Controller
from lmnas.methods.strategies.reinforce import Reinforce
from lmnas.spaces.conv.macro import ConvMacro

ACCURACY = Objective("accuracy", "", "maximize")
OPERATIONS = ("conv_3x3", "sep_conv_3x3", "max_pool_3x3")
AUTHORS = {
    "hidden": 64,
    "learning_rate": 1e-3,
    "adam_beta1": 0.0,
    "adam_epsilon": 1e-3,
    "temperature": None,
    "tanh_constant": 1.5,
    "entropy_weight": 1e-4,
    "baseline_decay": 0.99,
    "init_range": 0.1,
    "subset_penalty": 0.8,
    "subset_rate": 0.4,
    "rewards_per_round": 1000,
    "rewards_per_update": 20,
}
"""The macro search of the authors' code: 50 updates of 20 samples an epoch."""


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def divergence(p, rate=0.4):
    return p * math.log(p / rate) + (1 - p) * math.log((1 - p) / (1 - rate))


def by_hand(controller, choices, layers):
    """Log-probability of `choices` and each layer's probabilities of its skips.

    An empty step for each of the anchors of the stem and of layer 1, which has no skips; then for each layer a step for
    the operation and one for the skips, whose output is the layer's anchor.
    """
    w = {name: weight.detach().numpy() for name, weight in controller.named_parameters()}

    def squash(x):
        x = x if controller.temperature is None else x / controller.temperature
        return controller.tanh_constant * np.tanh(x)

    def lstm(x, state):
        i, f, g, o = np.split(w["W_input"] @ x + w["W_hidden"] @ state[0], 4)
        c = sigmoid(f) * state[1] + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c

    state, anchors = (np.zeros(controller.hidden), np.zeros(controller.hidden)), []
    for _ in range(2 if layers > 2 else 1):
        state = lstm(w["start"], state)
        anchors.append(state[0])
    inputs, log_prob, skip_probabilities = w["start"], 0.0, []
    for layer in range(1, layers + 1):
        state = lstm(inputs, state)
        logits = squash(w["heads.0"] @ state[0])
        op = OPERATIONS.index(choices[f"layer_{layer}.op"])
        log_prob += logits[op] - np.log(np.exp(logits).sum())
        inputs = w["embeddings.0"][op]
        if layer == 1:
            continue
        state = lstm(inputs, state)
        chosen, skips, row = np.zeros(controller.hidden), choices[f"layer_{layer}.skips"], []
        for source in range(layer - 1):
            q = squash(w["v"] @ np.tanh(w["W1"] @ anchors[source] + w["W2"] @ state[0]))
            p = np.exp(q) / (np.exp(q) + np.exp(-q))
            log_prob += math.log(p if source in skips else 1 - p)
            chosen += anchors[source] if source in skips else 0
            row.append(p)
        inputs = chosen / (1 + len(skips))
        skip_probabilities.append(row)
        if layer >= len(anchors):
            anchors.append(state[0])
    return log_prob, skip_probabilities


def controller_of(layers, temperature=None, seed=0):
    decisions = ConvMacro(layers=layers, operations=OPERATIONS).decisions
    settings = {"hidden": 4, "temperature": temperature, "tanh_constant": 1.5, "init_range": 1.5}
    return Controller(decisions, torch.Generator().manual_seed(seed), **settings)


@pytest.mark.parametrize("layers, temperature", [(2, None), (3, 5.0), (5, None)])
def test_sequence_and_penalty_written_out(layers, temperature):
    controller, space = controller_of(layers, temperature), ConvMacro(layers=layers, operations=OPERATIONS)
    rows = [dict(space.sample(random.Random(seed)).choices) for seed in range(12)]
    log_prob, entropy, penalty = controller.evaluate_against(rows, 0.4)
    again = controller.evaluate(rows)
    assert torch.equal(log_prob, again[0]) and torch.equal(entropy, again[1])
    for row, found, kl in zip(rows, log_prob.tolist(), penalty.tolist(), strict=True):
        expected, probabilities = by_hand(controller, row, layers)
        assert found == pytest.approx(expected, rel=1e-12)
        assert [len(p) for p in probabilities] == list(range(1, layers))
        # summed over the layers that may be read, averaged over those that read
        assert kl == pytest.approx(np.mean([sum(map(divergence, p)) for p in probabilities]), rel=1e-12)


def test_gradient_of_the_penalty_on_two_layers():
    """One skip, p = sigmoid(2 z): dD/dz = 2 p (1 - p) (logit p - logit rate), with z = 1.5 tanh(q) and dq/dv the tanh
    of the attention; and every weight by finite differences."""
    controller = controller_of(2)
    row = {"layer_1.op": "conv_3x3", "layer_2.op": "max_pool_3x3", "layer_2.skips": []}

    def penalty():
        return controller.evaluate_against([row], 0.4)[2][0]

    penalty().backward()
    ((p,),) = by_hand(controller, row, 2)[1]
    z = math.log(p / (1 - p)) / 2
    slope = 2 * p * (1 - p) * (math.log(p / (1 - p)) - math.log(0.4 / 0.6)) * (1.5 - z**2 / 1.5)
    hidden = (controller.v.grad / slope).tolist()  # tanh(W1 a_0 + W2 s)
    assert sum(a * b for a, b in zip(hidden, controller.v.tolist(), strict=True)) == pytest.approx(
        math.atanh(z / 1.5), rel=1e-9
    )
    for name, weight in controller.named_parameters():
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        for index in itertools.product(*map(range, weight.shape)):
            ends = []
            for delta in (1e-6, -1e-6):
                with torch.no_grad():
                    weight[index] += delta
                    ends.append(penalty().item())
                    weight[index] -= delta
            assert gradient[index].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-8), name


def strategy_of(layers=3, **settings):
    space = ConvMacro(layers=layers, operations=OPERATIONS)
    return Reinforce(space, ACCURACY, 0, **{"hidden": 8, "entropy_weight": 0.0, **settings})


def test_the_loss_has_the_penalty_beside_the_reward():
    """The gradients of an update: those without a penalty plus 0.8 times the mean divergence's."""
    plain, penalised = strategy_of(init_range=1.0), strategy_of(init_range=1.0, subset_penalty=0.8, subset_rate=0.3)
    proposals = plain.ask(4)
    assert proposals == penalised.ask(4)
    twin = Controller(
        plain.space.decisions, seeds.generator(0, "controller"), hidden=8, temperature=5.0, init_range=1.0
    )
    twin.evaluate_against([p.genotype.choices for p in proposals], 0.3)[2].mean().backward()
    trials = [tiny.trial(g, value) for g, value in zip(proposals, (0.1, 0.9, 0.4, 0.5), strict=True)]
    plain.tell(trials)
    penalised.tell(trials)
    total = 0.0
    for name, weight in plain.controller.named_parameters():
        first, own, second = (
            torch.zeros_like(weight) if gradient is None else gradient
            for gradient in (
                weight.grad, twin.get_parameter(name).grad, penalised.controller.get_parameter(name).grad
            )
        )  # fmt: skip
        torch.testing.assert_close(second, first + 0.8 * own, rtol=1e-9, atol=1e-14)
        total += own.abs().sum().item()
    assert total > 0.01


def test_the_rate_of_skips_moves_to_the_target():
    """With a reward that tells nothing, the policy ends where the penalty wants it: 0.4 of the bits set, from 0.5."""
    strategy = strategy_of(6, subset_penalty=0.8, learning_rate=0.02, tanh_constant=1.5, temperature=None)
    for _ in range(60):
        strategy.tell([tiny.trial(proposal, 1.0) for proposal in strategy.ask(8)])
    choices = [proposal.genotype.choices for proposal in strategy.ask(500)]
    bits = [len(row[f"layer_{layer}.skips"]) for row in choices for layer in range(2, 7)]
    assert sum(bits) / (500 * 15) == pytest.approx(0.4, abs=0.03)
    rows = [dict(row) for row in choices[:10]]
    assert strategy.controller.evaluate_against(rows, 0.4)[2].max() < 1e-2


def test_only_subsets_that_are_asked_count():
    """A subset that is not active in a row is left out of its mean; of a fixed size it does not count."""
    options = {"always": ("x", "y"), "sometimes": ("u", "v", "w")}
    decisions = [
        OneOf("kind", ("a", "b")),
        Subset("always", options["always"]),
        Subset("sometimes", options["sometimes"], when=("kind", ("b",))),
    ]
    controller = Controller(Decisions(decisions), torch.Generator().manual_seed(1), hidden=4, init_range=2.0)

    def subsets(name):
        bits = itertools.product((0, 1), repeat=len(options[name]))
        return [[o for o, bit in zip(options[name], row, strict=True) if bit] for row in bits]

    def divergence_of(name, rows_by_subset):
        """From the probabilities of all rows that go on from one, by what they choose here."""
        p = [sum(controller.evaluate(rows)[0].exp().tolist()) for rows in rows_by_subset]
        chances = [
            sum(q for q, subset in zip(p, subsets(name), strict=True) if option in subset) / sum(p)
            for option in options[name]
        ]
        return sum(divergence(q, 0.25) for q in chances)

    without = {"kind": "a", "always": ["x"]}
    both = {"kind": "b", "always": ["x"], "sometimes": ["u", "w"]}
    found = controller.evaluate_against([without, both], 0.25)[2].tolist()
    assert found[0] == pytest.approx(divergence_of("always", [[{**without, "always": a}] for a in subsets("always")]))
    always = [[{**both, "always": a, "sometimes": b} for b in subsets("sometimes")] for a in subsets("always")]
    sometimes = [[{**both, "sometimes": b}] for b in subsets("sometimes")]
    expected = (divergence_of("always", always) + divergence_of("sometimes", sometimes)) / 2
    assert found[1] == pytest.approx(expected)

    fixed = [OneOf("kind", ("a", "b")), Subset("two", ("1", "2", "3"), size=2)]
    controller = Controller(Decisions(fixed), torch.Generator().manual_seed(1), hidden=4)
    assert controller.evaluate_against([{"kind": "a", "two": ["1", "3"]}], 0.25)[2].tolist() == [0.0]


def test_the_published_network_is_near_the_target():
    """0.355 of its skips are set; a policy of exactly that rate is 0.0043 nats a bit from 0.4."""
    choices = load_genotype("enas-macro").choices
    set_bits = sum(len(value) for name, value in choices.items() if name.endswith("skips"))
    assert set_bits / 276 == pytest.approx(0.355, abs=5e-4)
    assert divergence(set_bits / 276) == pytest.approx(0.0043, abs=1e-4)


def test_the_authors_settings_are_settings():
    """Whole controller of the macro search; its fresh policy is nearly uniform: 12 ln 6 + 66 ln 2 = 67 nats."""
    strategy = create("strategy", {"name": "reinforce", **AUTHORS}, ConvMacro(), ACCURACY, 0)
    strategy.tell([tiny.trial(p, 0.5) for p in strategy.ask(20)])
    assert strategy.statistics()["entropy"] == pytest.approx(12 * math.log(6) + 66 * math.log(2), abs=0.1)
    assert isinstance(strategy.choice(3), Genotype)


def test_the_authors_settings_of_micro_cells_are_settings():
    """Both cells' operations share one head, whose bias prefers separable convolutions from the start."""
    bias = {"sep_conv_3x3": 10.0, "sep_conv_5x5": 10.0}
    micro = {"tanh_constant": 1.1, "category_constant": 0.44, "option_bias": bias, "learning_rate": 3.5e-3}
    space = create("space", {"name": "enas-micro"})
    strategy = create("strategy", {"name": "reinforce", **AUTHORS, **micro, "locality": None}, space, ACCURACY, 0)
    ops = [
        value
        for proposal in strategy.ask(100)
        for name, value in proposal.genotype.choices.items()
        if isinstance(space.decisions[name].options[0], str)
    ]
    # e^0.44 against 1 for each of the three others
    expected = 2 * math.exp(0.44) / (2 * math.exp(0.44) + 3)
    assert sum(op in bias for op in ops) / len(ops) == pytest.approx(expected, abs=0.05)
