"""Random search: uniform, without repeats, the same however it is asked."""

from collections import Counter

import pytest
import tiny
from scipy.stats import chisquare

from lmnas.core.contracts import Objective
from lmnas.core.decisions import Decisions, OneOf, Subset
from lmnas.core.genotype import Genotype
from lmnas.methods.strategies.random_search import RandomSearch

OBJECTIVE = Objective("error", "", "minimize")


class ToySpace:
    """12 architectures: three ops, and two bits where the op is not `none` (1 + 2 * 4 + 3)."""

    name = "toy"
    decisions = Decisions(
        [
            OneOf("op", ("none", "conv", "pool", "norm"), node=0),
            Subset("skips", ("a", "b"), when=("op", ("conv", "pool"))),
            OneOf("kind", (1, 2, 3), when=("op", ("norm",))),
        ]
    )

    def sample(self, rng):
        return Genotype(self.name, self.decisions.sample(rng))


def make(seed=0, **settings):
    return RandomSearch(ToySpace(), OBJECTIVE, seed, **settings)


def test_proposals_and_paths_are_uniform_over_decisions():
    n = 4000
    probability = {"none": 1 / 4, "conv": 1 / 4 / 4, "pool": 1 / 4 / 4, "norm": 1 / 4 / 3}  # of one architecture
    search = make(distinct=False)
    for drawn in ([p.genotype for p in search.ask(n)], [search.choice(step) for step in range(n)]):
        counts = Counter(drawn)
        assert len(counts) == ToySpace.decisions.size() == 12
        expected = [n * probability[genotype.choices["op"]] for genotype in counts]
        assert chisquare(list(counts.values()), expected).pvalue > 1e-3


def test_distinct_proposes_the_whole_space_once_and_then_stops():
    search = make()
    proposed = search.ask(5) + search.ask(100)
    assert len(proposed) == len(set(proposed)) == 12
    assert search.ask(1) == []


def test_repeats_where_they_are_allowed():
    assert len(set(make(distinct=False).ask(100))) <= 12


@pytest.mark.parametrize("distinct", [True, False])
def test_proposals_do_not_depend_on_how_many_are_asked_or_told(distinct):
    together, single = make(distinct=distinct), make(distinct=distinct)
    one_by_one = []
    for _ in range(8):
        one_by_one += single.ask(1)
        single.tell([tiny.trial(one_by_one[-1], None)])
        single.choice(3)
    assert together.ask(8) == one_by_one
    assert make(seed=1, distinct=distinct).ask(8) != one_by_one


def test_state_round_trip_continues():
    search, restored = make(), make()
    before = search.ask(4)
    restored.load_state_dict(search.state_dict())
    after = search.ask(8)
    assert restored.ask(8) == after
    assert not set(before) & set(after)


def test_is_a_sharing_strategy_that_asks_for_no_rewards():
    search = make()
    assert (search.needs, search.rewards_per_round, search.rewards_per_update) == (frozenset(), 0, 1)
    assert search.statistics() == {}
    assert search.choice(7) == make().choice(7) != search.choice(8)
