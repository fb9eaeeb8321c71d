"""The ENAS controller and REINFORCE, against formulas written out here and sums over every architecture."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import tiny
import torch
from scipy.stats import chisquare

from lmnas.core import seeds
from lmnas.core.contracts import Objective
from lmnas.core.decisions import Decisions, OneOf, Subset
from lmnas.core.errors import UserError
from lmnas.core.genotype import Genotype
from lmnas.core.settings import settings_model
from lmnas.methods.strategies.controller import Controller
from lmnas.methods.strategies.random_search import RandomSearch
from lmnas.methods.strategies.reinforce import Reinforce

torch.set_num_threads(1)

ACTIVATIONS = ("tanh", "relu", "identity", "sigmoid")
MINIMIZE, MAXIMIZE = Objective("perplexity", "per word", "minimize"), Objective("accuracy", "", "maximize")


class ToySpace:
    name = "toy"

    def __init__(self, decisions):
        self.decisions = Decisions(decisions)

    def sample(self, rng):
        return Genotype(self.name, self.decisions.sample(rng))


def enas_cell(n_nodes):
    """The recurrent space's decisions; 2 n - 1 tokens, the input of node 1 among them although it has no choice."""
    decisions = [OneOf("node_0.activation", ACTIVATIONS, node=0)]
    for node in range(1, n_nodes):
        decisions += [
            OneOf(f"node_{node}.input", tuple(range(node)), node=node, reads_node=True),
            OneOf(f"node_{node}.activation", ACTIVATIONS, node=node),
        ]
    return ToySpace(decisions)


MIXED = ToySpace(
    [
        OneOf("depth", (2, 3)),
        OneOf("constant", ("same",)),
        OneOf("node_0.op", ("a", "b"), node=0),
        OneOf("node_1.op", ("a", "b"), node=1),
        OneOf("node_2.input", (0, 1), node=2, reads_node=True, when=("depth", (3,))),
        OneOf("node_2.op", ("a", "b"), node=2, when=("node_2.input", (1,))),
        Subset("node_3.skips", (0, 1, 2), node=3, reads_node=True),
        Subset("extras", ("norm", "gate"), when=("node_1.op", ("b",))),
        OneOf("output", (0, 3), reads_node=True),
    ]
)
"""Conditions on conditions, both kinds of subset, a reader that is no node, nodes with and without indices."""

PAIRS = ToySpace(
    [
        decision
        for graph in ("normal", "reduce")
        for decision in (
            Subset(f"{graph}.node_2.inputs", (0, 1), node=2, reads_node=True, graph=graph, size=2),
            OneOf(f"{graph}.node_2.op", ("a", "b"), node=2, graph=graph),
            Subset(f"{graph}.node_3.inputs", (0, 1, 2), node=3, reads_node=True, graph=graph, size=2),
            OneOf(f"{graph}.node_3.op", ("a", "b"), node=3, graph=graph),
        )
    ]
    + [Subset("two", ("p", "q", "r", "s"), size=2, when=("reduce.node_3.op", ("b",)))]
)
"""Two graphs whose nodes are counted apart, subsets of a fixed size: indices, categories and one without a choice."""


def enumerate_choices(space):
    """Every architecture, by trying all combinations of all options."""

    def values(decision):
        if isinstance(decision, OneOf):
            return list(decision.options)
        bits = itertools.product([False, True], repeat=len(decision.options))
        bits = [row for row in bits if decision.size in (None, sum(row))]
        return [[option for option, bit in zip(decision.options, row, strict=True) if bit] for row in bits]

    unique = {}
    for combination in itertools.product(*(values(decision) for decision in space.decisions)):
        choices = {}
        for decision, value in zip(space.decisions, combination, strict=True):
            if decision.when is None or choices.get(decision.when[0]) in decision.when[1]:
                choices[decision.name] = value
        unique[str(choices)] = choices
    return list(unique.values())


def make(space, objective=MAXIMIZE, seed=0, **settings):
    return Reinforce(space, objective, seed, **{"hidden": 8, "init_range": 1.0, **settings})


# ------------------------------------------------------------------------------------------------------- controller


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum()


@pytest.mark.parametrize(
    ("temperature", "tanh_constant", "locality"),
    [(5.0, 2.5, 6.0), (2.0, 1.1, None), (None, 1.5, 0.5), (3.0, None, 2.0)],
)
def test_probabilities_follow_the_formulas_and_frequencies_the_probabilities(temperature, tanh_constant, locality):
    ops = ("a", "b", "c")
    decisions = Decisions(
        [
            OneOf("node_0.op", ops, node=0),
            OneOf("node_1.input", (0,), node=1, reads_node=True),
            OneOf("node_1.op", ops, node=1),
            OneOf("node_2.input", (0, 1), node=2, reads_node=True),
            Subset("node_3.skips", (0, 2), node=3, reads_node=True),
            OneOf("kind", ops),
        ]
    )
    settings = {"temperature": temperature, "tanh_constant": tanh_constant, "locality": locality}
    controller = Controller(decisions, torch.Generator().manual_seed(3), hidden=6, init_range=1.5, **settings)
    w = {name: weight.detach().numpy() for name, weight in controller.named_parameters()}
    head, own_head = w["heads.0"], w["heads.1"]  # the nodes' ops share one; "kind" belongs to no node
    embedding = w["embeddings.0"]
    assert head.shape == own_head.shape == (3, 6) and "heads.2" not in w

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def squash(x):
        x = x if temperature is None else x / temperature
        return x if tanh_constant is None else tanh_constant * np.tanh(x)

    def lstm(x, state):
        h, c = state
        i, f, g, o = np.split(w["W_input"] @ x + w["W_hidden"] @ h, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c

    def attend(anchor, s):
        return w["v"] @ np.tanh(w["W1"] @ anchor + w["W2"] @ s)

    def probability(op_0, op_1, index, skips, kind):
        start = w["start"]
        state = lstm(start, (np.zeros(6), np.zeros(6)))
        anchor_0 = state[0]
        state = lstm(start, state)
        p_op_0 = softmax(squash(head @ state[0]))[op_0]
        state = lstm(start, state)
        anchor_1 = state[0]
        state = lstm(embedding[op_0], state)
        p_op_1 = softmax(squash(head @ state[0]))[op_1]
        state = lstm(embedding[op_1], state)
        anchor_2 = state[0]
        logits = np.array([squash(attend(anchor_0, anchor_2)), squash(attend(anchor_1, anchor_2))])
        if locality is not None:
            logits = logits - np.array([(2 - 0) ** 2, (2 - 1) ** 2]) / locality
        p_index = softmax(logits)[index]
        state = lstm([anchor_0 / 2.1, anchor_1 / 1.1][index], state)
        p_skips = 1.0
        chosen = []
        for bit, anchor in zip(skips, (anchor_0, anchor_2), strict=True):
            q = attend(anchor, state[0])
            p_skips *= softmax(np.array([squash(-q), squash(q)]))[bit]
            chosen += [anchor] * bit
        state = lstm(sum(chosen, np.zeros(6)) / (1 + len(chosen)), state)
        return p_op_0 * p_op_1 * p_index * p_skips * softmax(squash(own_head @ state[0]))[kind]

    expected = {}
    for op_0, op_1, index, bit_0, bit_2, kind in itertools.product(
        range(3), range(3), (0, 1), (0, 1), (0, 1), range(3)
    ):
        choices = {
            "node_0.op": ops[op_0],
            "node_1.input": 0,
            "node_1.op": ops[op_1],
            "node_2.input": index,
            "node_3.skips": [0] * bit_0 + [2] * bit_2,
            "kind": ops[kind],
        }
        expected[Genotype("toy", choices)] = probability(op_0, op_1, index, (bit_0, bit_2), kind)
    assert sum(expected.values()) == pytest.approx(1)
    assert max(expected.values()) > 3 * min(expected.values())  # far enough from uniform to tell formulas apart

    log_prob, _ = controller.evaluate([genotype.choices for genotype in expected])
    np.testing.assert_allclose(log_prob.exp().detach(), list(expected.values()), rtol=1e-9)

    n = 20_000
    counts = Counter(Genotype("toy", row) for row in controller.sample(n, torch.Generator().manual_seed(4)))
    common = [genotype for genotype, p in expected.items() if n * p >= 5]  # what chi-square needs
    observed = [counts[genotype] for genotype in common]
    predicted = [n * expected[genotype] for genotype in common]
    rare = n - sum(predicted)
    if rare > 5:
        observed, predicted = [*observed, n - sum(observed)], [*predicted, rare]
    assert chisquare(observed, np.array(predicted) * sum(observed) / sum(predicted)).pvalue > 1e-3


def test_fresh_controller_is_nearly_uniform():
    space = enas_cell(12)
    assert len(space.decisions) == 23
    uniform = 12 * math.log(4) + math.log(math.factorial(11))
    assert uniform == pytest.approx(34.1, abs=0.05)
    fresh = Reinforce(space, MINIMIZE, 0, locality=None)
    fresh.ask(100)
    assert fresh.statistics()["entropy"] == pytest.approx(uniform, rel=0.01)
    with_prior = Reinforce(space, MINIMIZE, 0)
    with_prior.ask(100)
    assert with_prior.statistics()["entropy"] < 0.9 * uniform


@pytest.mark.parametrize("space", [MIXED, enas_cell(4), PAIRS], ids=["mixed", "enas", "pairs"])
def test_probabilities_sum_to_one_and_the_entropy_is_exact(space):
    controller = make(space, locality=4.0).controller
    rows = enumerate_choices(space)
    assert len(rows) == space.decisions.size()
    with torch.no_grad():
        log_prob, entropy = controller.evaluate(rows)
    p = log_prob.exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    # chain rule: the expected sum of the steps' entropies is the entropy of the whole
    assert float((p * entropy).sum()) == pytest.approx(-float((p * log_prob).sum()), abs=1e-12)


@pytest.mark.parametrize("decision", [OneOf("op", ACTIVATIONS), Subset("extras", ("norm", "gate"))])
def test_entropy_is_that_of_the_distribution_not_of_the_sample(decision):
    space = ToySpace([decision])
    with torch.no_grad():
        log_prob, entropy = make(space).controller.evaluate(enumerate_choices(space))
    assert float(log_prob.max() - log_prob.min()) > 0.1
    torch.testing.assert_close(entropy, -(log_prob.exp() * log_prob).sum().expand(4))


def test_a_subset_of_two_is_two_indices_in_order():
    """P({i, j}) = p(i) p(j | i), j behind i; the second step reads the first's anchor over its distance."""
    decisions = Decisions([Subset("node_3.inputs", (0, 1, 2), node=3, reads_node=True, size=2)])
    controller = Controller(decisions, torch.Generator().manual_seed(5), hidden=6, init_range=1.5, locality=4.0)
    w = dict(controller.named_parameters())
    state = (torch.zeros(1, 6, dtype=torch.float64),) * 2
    anchors = []
    for _ in range(3):  # steps of their own for the nodes that are read
        state = torch.lstm_cell(w["start"][None], state, w["W_input"], w["W_hidden"])
        anchors.append(state[0][0])

    def logits(s):
        u = torch.stack([w["v"] @ torch.tanh(w["W1"] @ a + w["W2"] @ s[0]) for a in anchors])
        return 2.5 * torch.tanh(u / 5.0) - torch.tensor([9.0, 4.0, 1.0]) / 4.0

    state = torch.lstm_cell(w["start"][None], state, w["W_input"], w["W_hidden"])
    first = logits(state[0])[:2].softmax(0)  # 2 as the first would leave no second
    after_0 = torch.lstm_cell((anchors[0] / 3.1)[None], state, w["W_input"], w["W_hidden"])
    second = logits(after_0[0])[1:].softmax(0)
    log_prob, _ = controller.evaluate([{"node_3.inputs": pair} for pair in ([0, 1], [0, 2], [1, 2])])
    torch.testing.assert_close(log_prob.exp(), torch.stack([first[0] * second[0], first[0] * second[1], first[1]]))


def test_a_decision_that_is_not_active_leaves_no_trace():
    always = [
        OneOf("node_0.op", ("a", "b"), node=0),
        OneOf("node_1.op", ("a", "b"), node=1),
        OneOf("node_2.op", ("a", "b"), node=2),
        OneOf("node_3.input", (0, 1, 2), node=3, reads_node=True),
    ]
    hangs_on_b = ("node_0.op", ("b",))
    conditional = [
        OneOf("node_2.input", (0, 1), node=2, reads_node=True, when=hangs_on_b),
        OneOf("node_2.gate", ("a", "b"), node=2, when=("node_2.input", (1,))),
    ]
    without, with_them = (
        make(ToySpace(decisions)).controller for decisions in (always, always[:2] + conditional + always[2:])
    )
    with_them.load_state_dict(without.state_dict())
    rows = [row for row in enumerate_choices(ToySpace(always)) if row["node_0.op"] == "a"]
    for first, second in zip(without.evaluate(rows)[0], with_them.evaluate(rows)[0], strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("space", [MIXED, PAIRS], ids=["mixed", "pairs"])
def test_evaluate_repeats_the_log_prob_and_entropy_of_sampling(space):
    controller = make(space).controller
    uniforms = torch.rand(200, controller.n_uniforms, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows, log_prob, entropy = controller.draw(uniforms)
    for row in rows:
        space.decisions.check(row, "drawn")
    assert {tuple(row) for row in rows} == {tuple(row) for row in enumerate_choices(space)}  # every pattern of activity
    again_log_prob, again_entropy = controller.evaluate(rows)
    torch.testing.assert_close(again_log_prob, log_prob)
    torch.testing.assert_close(again_entropy, entropy)


@pytest.mark.parametrize("space", [MIXED, PAIRS], ids=["mixed", "pairs"])
def test_a_row_does_not_depend_on_the_rows_beside_it(space):
    controller = make(space).controller
    rows = enumerate_choices(space)[::7]
    together = controller.evaluate(rows)[0]
    alone = torch.cat([controller.evaluate([row])[0] for row in rows])
    torch.testing.assert_close(together, alone)


def test_evaluate_refuses_what_the_decisions_do_not_allow():
    with pytest.raises(UserError, match=r"node_0\.activation: 'gelu' is not one of"):
        make(enas_cell(2)).controller.evaluate(
            [{"node_0.activation": "gelu", "node_1.input": 0, "node_1.activation": "tanh"}]
        )


# --------------------------------------------------------------------------------------------------------- learning


SMALL = ToySpace(
    [
        OneOf("node_0.op", ("a", "b"), node=0),
        OneOf("node_1.op", ("a", "b"), node=1),
        OneOf("node_2.input", (0, 1), node=2, reads_node=True, when=("node_0.op", ("a",))),
        Subset("extras", ("norm",)),
    ]
)
REWARDS = [seeds.rng(0, "reward", k).uniform(0, 3) for k in range(SMALL.decisions.size())]


def gradients(strategy):
    """Of every weight; None where it has no part (the embedding of the last decision is no input)."""
    return [None if p.grad is None else p.grad.clone() for p in strategy.controller.parameters()]


def exact_gradients(strategy, rows, rewards):
    """d/dθ of Σ π(a) R(a)."""
    log_prob, _ = strategy.controller.evaluate(rows)
    expected = (log_prob.exp() * torch.tensor(rewards, dtype=torch.float64)).sum()
    return torch.autograd.grad(expected, list(strategy.controller.parameters()), allow_unused=True)


@pytest.mark.parametrize("baseline", [0.0, 1.3, -20.0])
@pytest.mark.parametrize("batch", [1, 2])
def test_expected_update_is_the_exact_gradient_whatever_the_baseline(baseline, batch):
    rows = enumerate_choices(SMALL)
    strategy = make(SMALL, entropy_weight=0.0, baseline_decay=0.9)
    state = {**strategy.state_dict(), "baseline": baseline}
    probability = strategy.controller.evaluate(rows)[0].exp().tolist()
    exact = exact_gradients(strategy, rows, REWARDS)

    mean = [None if true is None else torch.zeros_like(true) for true in exact]
    for drawn in itertools.product(range(len(rows)), repeat=batch):
        strategy.load_state_dict(state)
        strategy.tell([tiny.trial(Genotype("toy", rows[k]), REWARDS[k]) for k in drawn])
        weight = math.prod(probability[k] for k in drawn)
        for total, grad in zip(mean, gradients(strategy), strict=True):
            assert (total is None) == (grad is None)
            if total is not None:
                total += weight * grad

    shrink = 1 - (1 - 0.9) / batch  # the baseline has already moved towards the batch
    for estimated, true in zip(mean, exact, strict=True):
        if true is not None:
            torch.testing.assert_close(estimated, -shrink * true)  # a loss falls where the reward rises
    assert max(float(true.abs().max()) for true in exact if true is not None) > 0.01


def test_entropy_counts_as_a_constant_of_the_reward():
    rows = enumerate_choices(SMALL)[::3]  # with and without the decision that hangs on another
    with_bonus, by_hand, without = make(SMALL, entropy_weight=0.5), make(SMALL, entropy_weight=0.0), make(SMALL)
    entropy = by_hand.controller.evaluate(rows)[1].tolist()
    assert max(entropy) - min(entropy) > 0.1
    genotypes = [Genotype("toy", row) for row in rows]
    with_bonus.tell([tiny.trial(g, 1.0) for g in genotypes])
    by_hand.tell([tiny.trial(g, 1.0 + 0.5 * h) for g, h in zip(genotypes, entropy, strict=True)])
    without.tell([tiny.trial(g, 1.0) for g in genotypes])
    for first, second in zip(gradients(with_bonus), gradients(by_hand), strict=True):
        assert (first is None and second is None) or torch.allclose(first, second)
    assert not torch.allclose(gradients(with_bonus)[1], gradients(without)[1])
    assert with_bonus.statistics()["reward"] == 1.0


def test_reward_and_baseline_by_hand():
    genotype = Genotype("toy", enumerate_choices(SMALL)[0])
    settings = {"entropy_weight": 0.0, "baseline_decay": 0.9}
    strategy = make(SMALL, MINIMIZE, **settings)
    strategy.tell([tiny.trial(genotype, 160.0), tiny.trial(genotype, 40.0)])  # 80 / 160 and 80 / 40
    assert strategy.statistics()["reward"] == pytest.approx(1.25)
    assert strategy.statistics()["baseline"] == pytest.approx(1.25)
    strategy.tell([tiny.trial(genotype, 20.0)])
    assert strategy.statistics()["baseline"] == pytest.approx(1.25 + 0.1 * (4 - 1.25))
    from_zero = make(SMALL, MINIMIZE, baseline_start="zero", **settings)
    from_zero.tell([tiny.trial(genotype, 20.0)])
    assert from_zero.statistics()["baseline"] == pytest.approx(0.4)
    maximised = make(SMALL, MAXIMIZE, **settings)
    maximised.tell([tiny.trial(genotype, -0.3), tiny.trial(genotype, 0.7)])
    assert maximised.statistics()["reward"] == pytest.approx(0.2)


def test_an_error_rate_is_rewarded_by_its_accuracy():
    """Errors of 30 % and 0 % are accuracies of 0.7 and 1, whatever the scale of other rewards."""
    objective = Objective("error", "%", "minimize", worst=100.0)
    strategy = make(SMALL, objective, entropy_weight=0.0)
    genotype = Genotype("toy", enumerate_choices(SMALL)[0])
    strategy.tell([tiny.trial(genotype, 30.0), tiny.trial(genotype, 0.0)])
    assert strategy.statistics()["reward"] == pytest.approx(0.85)
    assert strategy.reward(100.0) == 0 == strategy.reward(None) == strategy.reward(float("nan"))


@pytest.mark.parametrize("objective", [MINIMIZE, MAXIMIZE])
def test_failed_trials_have_reward_zero_and_break_nothing(objective):
    strategy = make(MIXED, objective)
    strategy.tell([])
    for values in ([None], [float("nan"), float("inf"), -float("inf"), None], [None, 2.0]):
        proposals = strategy.ask(len(values))
        strategy.tell([tiny.trial(p, v) for p, v in zip(proposals, values, strict=True)])
        expected = 0.0 if len(values) != 2 else (40.0 if objective is MINIMIZE else 2.0) / 2
        assert strategy.statistics()["reward"] == expected
    assert all(torch.isfinite(p).all() for p in strategy.controller.parameters())
    assert len(strategy.ask(3)) == 3


def test_refuses_a_minimised_value_that_makes_no_reward():
    strategy = make(SMALL, MINIMIZE)
    with pytest.raises(UserError, match=r"needs values above 0, got -1\.5"):
        strategy.tell([tiny.trial(strategy.ask(1)[0], -1.5)])


def test_a_space_without_a_choice_is_proposed_again_and_again():
    space = ToySpace([OneOf("op", ("a",), node=0), Subset("skips", (), node=0)])
    strategy = make(space)
    strategy.tell([tiny.trial(proposal, 1.0) for proposal in strategy.ask(2)])
    assert strategy.ask(1)[0].genotype.choices == {"op": "a", "skips": []}


@pytest.mark.slow
def test_finds_the_best_architecture_sooner_than_random_search():
    """A bandit with 1536 arms whose reward is the share of decisions right: 20 seeds, another best arm for each.

    Weights start wider than ENAS's ±0.1: there the LSTM's outputs hardly differ between nodes, so that the head they
    share first moves all their activations as one, and most searches settle for less than the best.
    """
    space = enas_cell(4)
    assert space.decisions.size() == 1536
    settings = {"hidden": 32, "init_range": 0.5, "learning_rate": 0.005, "adam_beta1": 0.0}
    n_found, n_evaluations, n_random_evaluations = 0, 0, 0
    for seed in range(20):
        best = space.sample(seeds.rng(seed, "best"))

        def value(genotype, best=best):
            return sum(genotype.choices[name] == choice for name, choice in best.choices.items()) / len(best.choices)

        strategy = Reinforce(space, MAXIMIZE, seed, **settings)
        told = []
        for _ in range(120):
            proposals = strategy.ask(20)
            told += [proposal.genotype for proposal in proposals]
            strategy.tell([tiny.trial(p, value(p.genotype)) for p in proposals])
        n_found += Counter(p.genotype for p in strategy.ask(50)).most_common(1)[0][0] == best
        n_evaluations += told.index(best) + 1 if best in told else 10 * len(told)

        random_search = RandomSearch(space, MAXIMIZE, seed)
        n_random_evaluations += 1 + next(k for k in range(1536) if random_search.ask(1)[0].genotype == best)
    assert n_found == 20
    assert n_evaluations < n_random_evaluations / 2


# --------------------------------------------------------------------------------------------------------- promises


def test_proposals_do_not_depend_on_how_many_are_asked_and_paths_not_on_order():
    together, single = make(enas_cell(12)), make(enas_cell(12))
    paths = [together.choice(step) for step in (5, 6, 5)]
    assert paths[0] == paths[2] != paths[1]
    one_by_one = []
    for _ in range(5):
        one_by_one += single.ask(1)
        single.choice(9)
    assert single.choice(6) == paths[1]
    assert together.ask(5) == one_by_one
    assert len(set(one_by_one)) == 5
    assert make(enas_cell(12), seed=1).ask(5) != one_by_one
    assert together.statistics()["entropy"] == pytest.approx(single.statistics()["entropy"], rel=1e-12)


def allowed(value):
    if isinstance(value, dict):
        return all(isinstance(key, str | int) and allowed(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(allowed, value))
    return value is None or isinstance(value, str | int | float | torch.Tensor)


def test_state_round_trip_continues_bit_for_bit(tmp_path):
    def advance(strategy):
        proposals = strategy.ask(4)
        strategy.tell([tiny.trial(p, 100.0 + len(p.genotype.canonical) % 7) for p in proposals])
        return proposals

    settings = {"learning_rate": 0.01, "adam_beta1": 0.9}
    strategy, restored = make(MIXED, MINIMIZE, **settings), make(MIXED, MINIMIZE, **settings)
    fresh = strategy.state_dict()
    for _ in range(3):
        advance(strategy)
    state = strategy.state_dict()
    assert allowed(state)
    torch.save(state, tmp_path / "state.pt")
    after = [advance(strategy) for _ in range(3)]
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [advance(restored) for _ in range(3)] == after
    assert restored.statistics() == strategy.statistics()
    for first, second in zip(strategy.controller.parameters(), restored.controller.parameters(), strict=True):
        assert torch.equal(first, second)

    # a state is a snapshot: neither the strategy that gave it nor one that took it writes to it
    restored.load_state_dict(state)
    assert [advance(restored) for _ in range(3)] == after
    restored.load_state_dict(state)
    assert [advance(restored) for _ in range(3)] == after
    restored.load_state_dict(fresh)
    assert restored.ask(3) == make(MIXED, MINIMIZE).ask(3)


def test_settings_are_checked_and_the_contract_is_met():
    settings = settings_model(Reinforce)()
    assert (settings.learning_rate, settings.locality, settings.temperature) == (3.5e-4, 6.0, 5.0)
    strategy = make(SMALL, rewards_per_round=30, rewards_per_update=3)
    assert (strategy.needs, strategy.rewards_per_round, strategy.rewards_per_update) == (frozenset(), 30, 3)
    assert strategy.statistics() == {"entropy": None, "baseline": None, "reward": None}
    with pytest.raises(ValueError, match="baseline_decay"):
        settings_model(Reinforce)(baseline_decay=1.0)


def test_bias_and_constant_of_categories_by_hand():
    """ENAS' micro search: with next to no other weights, an operation's probability is softmax(C tanh(bias)), C = 0.44
    and a bias of 10 for two of five; indices have their own C, and the bias learns."""
    ops = ("sep_conv_3x3", "sep_conv_5x5", "avg_pool_3x3", "max_pool_3x3", "identity")
    space = ToySpace([OneOf("node_2.input", (0, 1), node=2, reads_node=True), OneOf("node_2.op", ops, node=2)])
    settings = {"temperature": None, "tanh_constant": 1.1, "category_constant": 0.44, "init_range": 1e-9}
    settings |= {"option_bias": {"sep_conv_3x3": 10.0, "sep_conv_5x5": 10.0}, "locality": None}
    strategy = make(space, **settings)
    rows = [{"node_2.input": 0, "node_2.op": op} for op in ops]
    high, low = math.exp(0.44 * math.tanh(10)), 1.0
    expected = [value / (2 * high + 3 * low) / 2 for value in (high, high, low, low, low)]
    assert strategy.controller.evaluate(rows)[0].exp().tolist() == pytest.approx(expected, rel=1e-6)
    before = strategy.controller.biases[0].detach().clone()
    strategy.tell([tiny.trial(Genotype("toy", row), value) for row, value in zip(rows, (0, 0, 1, 0, 0), strict=True)])
    assert strategy.controller.biases[0][2] > before[2]
    assert make(space).controller.biases is None
    with pytest.raises(
        UserError,
        match=r"strategy.option_bias: 'sep_conv_3x4' is no option of a decision\. Did you mean 'sep_conv_3x3'",
    ):
        make(space, option_bias={"sep_conv_3x4": 1.0})


def test_a_large_constant_of_categories_leaves_indices_alone():
    space = ToySpace([OneOf("node_2.input", (0, 1), node=2, reads_node=True), OneOf("node_2.op", ("a", "b"), node=2)])

    def spread(key, **settings):
        strategy = make(space, init_range=2.0, locality=None, temperature=None, **settings)
        rows = [{"node_2.input": i, "node_2.op": op} for i in (0, 1) for op in ("a", "b")]
        p = strategy.controller.evaluate(rows)[0].exp().tolist()
        return p[0] + p[1] if key == "input" else p[0] / (p[0] + p[1])

    assert spread("input", tanh_constant=1.0, category_constant=9.0) == pytest.approx(
        spread("input", tanh_constant=1.0)
    )
    assert spread("op", tanh_constant=1.0, category_constant=9.0) != pytest.approx(spread("op", tanh_constant=1.0))
