"""Decisions: everything that follows from a space's choices being data."""

import itertools
import math
import random

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmnas.core.decisions import Decisions, OneOf, Subset
from lmnas.core.errors import UserError
from lmnas.spaces.recurrent.cell import RecurrentCell

TOY = Decisions(
    [
        OneOf("op", ("none", "conv", "pool"), node=0),
        OneOf("kernel", (1, 3, 5), when=("op", ("conv",))),
        Subset("skips", (0, 1), node=1, reads_node=True),
        OneOf("size", (2, 4), when=("op", ("conv", "pool"))),
        OneOf("end", ("same",)),
    ]
)
"""(1 + 3 * 2 + 2) * 4 = 36 architectures."""


def everything(decisions):
    """All choices, by brute force: every value of every decision or its absence, kept if `check` accepts them."""
    values = []
    for decision in decisions:
        if isinstance(decision, Subset):
            subsets = itertools.product((False, True), repeat=len(decision.options))  # of any size: `check` refuses
            options = [[o for o, bit in zip(decision.options, bits, strict=True) if bit] for bits in subsets]
        else:
            options = list(decision.options)
        values.append([(decision.name, option) for option in options] + [None])
    for combination in itertools.product(*values):
        choices = dict(item for item in combination if item is not None)
        try:
            decisions.check(choices, "test")
        except UserError:
            continue
        yield choices


@st.composite
def decision_lists(draw):
    """Small random spaces, conditions and subsets included."""
    made = []
    for number in range(draw(st.integers(1, 4))):
        earlier = [d for d in made if isinstance(d, OneOf)]
        when = None
        if earlier and draw(st.booleans()):
            asked = draw(st.sampled_from(earlier))
            allowed = draw(st.lists(st.sampled_from(asked.options), min_size=1, unique=True))
            when = (asked.name, tuple(allowed))
        if draw(st.booleans()):
            made.append(OneOf(f"d{number}", tuple("abc"[: draw(st.integers(1, 3))]), when=when))
        else:
            options = tuple(range(draw(st.integers(0, 3))))
            size = draw(st.sampled_from([None, *range(1, len(options) + 1)]))
            made.append(Subset(f"d{number}", options, when=when, size=size))
    return Decisions(made)


def seeds():
    return st.integers(0, 10**6).map(random.Random)


def test_toy_has_36():
    assert TOY.size() == len(list(everything(TOY))) == 36


@settings(deadline=None, max_examples=40)
@given(decision_lists())
def test_size_is_the_number_of_valid_choices(decisions):
    assert decisions.size() == len(list(everything(decisions)))


def test_sizes_of_the_papers():
    assert RecurrentCell(n_nodes=8).decisions.size() == math.factorial(8) * 4**8 == 2_642_411_520
    enas = RecurrentCell(n_nodes=11, input_activation="searched", output="loose-ends")
    assert enas.decisions.size() == 4**12 * math.factorial(11)


@settings(deadline=None, max_examples=60)
@given(decision_lists(), seeds())
def test_samples_mutants_and_children_are_valid(decisions, rng):
    first, second = decisions.sample(rng), decisions.sample(rng)
    for choices in (first, second, decisions.mutate(first, rng), decisions.crossover(first, second, rng)):
        decisions.check(choices, "test")


def test_sampling_reaches_everything_and_repeats_with_its_seed():
    rng = random.Random(0)
    drawn = {repr(TOY.sample(rng)) for _ in range(2000)}
    assert len(drawn) == 36
    assert TOY.sample(random.Random(5)) == TOY.sample(random.Random(5))


@settings(deadline=None, max_examples=60)
@given(decision_lists(), seeds())
def test_mutation_changes_one_decision_and_what_depends_on_it(decisions, rng):
    before = decisions.sample(rng)
    after = decisions.mutate(before, rng)
    changed = {d.name for d in decisions if before.get(d.name) != after.get(d.name)}
    free = [name for name in before if decisions[name].count() > 1]
    if not free:
        assert after == before
        return
    # the one that was mutated was decided before and after; all others changed because of it, directly or in turn
    assert changed
    first = next(d.name for d in decisions if d.name in changed)
    assert first in free and first in after
    caused = {first}
    for decision in decisions:
        if decision.when and decision.when[0] in caused and decision.name in changed:
            caused.add(decision.name)
    assert changed == caused


def test_a_subset_mutates_by_one_bit():
    decisions = Decisions([Subset("bits", tuple(range(6)))])
    rng = random.Random(0)
    before = decisions.sample(rng)
    for _ in range(50):
        after = decisions.mutate(before, rng)
        assert len(set(before["bits"]) ^ set(after["bits"])) == 1
        before = after


def test_a_subset_of_fixed_size_keeps_it():
    """Sampled uniformly over all six pairs, mutated by exchanging one option, one parameter of Optuna's."""
    decision = Subset("pair", (0, 1, 2, 3), size=2)
    decisions, rng = Decisions([decision]), random.Random(0)
    pairs = [list(pair) for pair in itertools.combinations(range(4), 2)]
    assert decisions.size() == 6
    drawn = [decisions.sample(rng)["pair"] for _ in range(3000)]
    assert all(400 < drawn.count(pair) < 600 for pair in pairs)  # 500 expected, standard deviation 20
    before = drawn[0]
    for _ in range(50):
        after = decisions.mutate({"pair": before}, rng)["pair"]
        assert after in pairs and len(set(before) & set(after)) == 1
        before = after
    assert decision.distributions()["pair"].choices == ("0,1", "0,2", "0,3", "1,2", "1,3", "2,3")
    assert all(decision.from_parameters(decision.parameters(pair)) == pair for pair in pairs)
    assert decision.check([0, 1, 2]) == "[0, 1, 2] must name 2 of 0, 1, 2, 3"


@settings(deadline=None, max_examples=60)
@given(decision_lists(), seeds())
def test_a_child_takes_every_decision_from_a_parent(decisions, rng):
    first, second = decisions.sample(rng), decisions.sample(rng)
    child = decisions.crossover(first, second, rng)
    for name, value in child.items():
        parents = [parent[name] for parent in (first, second) if name in parent]
        # neither parent has it where one parent's value met a condition of the other's
        assert not parents or value in parents
    assert decisions.crossover(first, first, rng) == first


@settings(deadline=None, max_examples=60)
@given(decision_lists(), seeds())
def test_encoding(decisions, rng):
    length = sum(len(decision.options) for decision in decisions)
    choices = decisions.sample(rng)
    bits = decisions.encode(choices)
    assert len(bits) == length and set(bits) <= {0.0, 1.0}
    start = 0
    for decision in decisions:
        own = bits[start : start + len(decision.options)]
        start += len(decision.options)
        if decision.name not in choices:
            assert not any(own)
        elif isinstance(decision, OneOf):
            assert own.index(1.0) == decision.options.index(choices[decision.name]) and sum(own) == 1
        else:
            assert [o for o, bit in zip(decision.options, own, strict=True) if bit] == choices[decision.name]


def test_distinct_choices_have_distinct_encodings():
    assert len({tuple(TOY.encode(choices)) for choices in everything(TOY)}) == 36


def test_optuna_suggests_valid_choices_and_records_them_again():
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(60):
        trial = study.ask()
        choices = TOY.suggest(trial)
        TOY.check(choices, "test")
        assert trial.params == TOY.parameters(choices)
        assert trial.distributions == TOY.distributions(choices)
        study.tell(trial, 1.0)
        seen.add(repr(choices))
    assert len(seen) > 15
    assert any("kernel" not in trial.params for trial in study.trials)


def test_inactive_choices_are_left_out():
    assert TOY.sample(random.Random(0), {"op": "none", "kernel": 3, "size": 4}).keys() == {"op", "skips", "end"}
    with pytest.raises(UserError, match="'kernel' has no effect here"):
        TOY.check({"op": "none", "kernel": 3, "skips": [], "end": "same"}, "test")


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"opp": "conv"}, "unknown decision 'opp'. Did you mean 'op'?"),
        ({"op": "convv"}, "op: 'convv' is not one of none, conv, pool. Did you mean 'conv'?"),
        ({"kernel": True}, "kernel: True is not one of 1, 3, 5"),
        ({"kernel": 3.0}, "kernel: 3.0 is not one of"),
        ({"kernel": "3"}, "kernel: '3' is not one of"),
        ({"skips": 0}, "skips: 0 is not a list"),
        ({"skips": [2]}, "skips: 2 is not one of 0, 1"),
        ({"skips": [1, 0]}, "must name each option once, in the order 0, 1"),
        ({"skips": [0, 0]}, "must name each option once"),
        ({"skips": [True]}, "skips: True is not one of 0, 1"),
        ({"skips": [[0]]}, "skips: [0] is not one of 0, 1"),
    ],
)
def test_what_is_wrong_is_named(changed, message):
    good = {"op": "conv", "kernel": 3, "skips": [1], "size": 2, "end": "same"}
    TOY.check(good, "test")
    with pytest.raises(UserError) as refusal:
        TOY.check({**good, **changed}, "cell.json")
    assert str(refusal.value).startswith("cell.json: ") and message in str(refusal.value)


@pytest.mark.parametrize(
    "made, message",
    [
        (lambda: [OneOf("a", (1, 2)), OneOf("a", (1, 2))], "share a name"),
        (lambda: [OneOf("a", ())], "no options"),
        (lambda: [Subset("a", (0, 1), size=3)], "a cannot have 3 of 2 options"),
        (lambda: [OneOf("a", (1,), when=("b", (1,))), OneOf("b", (1,))], "not decided before"),
    ],
)
def test_decisions_that_make_no_sense(made, message):
    with pytest.raises(ValueError, match=message):
        Decisions(made())
