"""Recurrent cells as free graphs: the space of NAS-Bench-NLP.

Klyuchnikov et al., "NAS-Bench-NLP: Neural Architecture Search Benchmark for Natural Language Processing", 2020, arXiv
2006.07116. A cell is a recipe: node name -> {"op", "input"}, over the inputs `x` and `h_prev_0`, `h_prev_1`, ...; the
nodes `h_new_0`, `h_new_1`, ... are its new states, and `h_new_0` its output. The graph is the genotype: it states no
decisions, so sampling is the benchmark's generator, and a mutation one change of an edge or of an operation, as in
NASLib (https://github.com/automl/NASLib). Checked against the released recipes and their numbers of parameters.

Departures: random numbers are Python's, so a seed gives another cell than the released generator. The generator forbids
an h_new that reads an h_prev directly; the benchmark's own GRU has one, and is read with `direct_memory`.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from optuna.distributions import BaseDistribution, IntDistribution
from pydantic import Field

from lmnas.core.contracts import Diagram, GraphSpace
from lmnas.core.decisions import Choices, Decisions
from lmnas.core.errors import UserError
from lmnas.core.genotype import Genotype
from lmnas.spaces.recurrent import RECURRENT
from lmnas.spaces.recurrent.graph_body import GraphBody
from lmnas.spaces.recurrent.graph_form import (
    ARITY,
    INPUT,
    NEW,
    OLD,
    base_names,
    canonical,
    n_states,
    problem,
    topological,
)
from lmnas.spaces.recurrent.graph_moves import neighbours, random_recipe
from lmnas.spaces.recurrent.published import nas_bench_nlp

MAX_DRAWS = 20_000
"""Largest number of graphs drawn for one cell; about 1,400 of these are cells with three states, at the benchmark's
settings."""
NEAREST = 10
"""Members of a table among which a mutation is drawn."""


def _edge_counts(recipe: Mapping[str, Any]) -> Counter[tuple[str, str]]:
    """Number of edges from nodes of one operation (or an input of the cell) to nodes of another."""
    ops = {name: node["op"] for name, node in recipe.items()}
    return Counter((ops.get(source, source), node["op"]) for node in recipe.values() for source in node["input"])


def _difference(first: Counter[tuple[str, str]], second: Counter[tuple[str, str]]) -> int:
    return (first - second).total() + (second - first).total()


class GraphCounts(Decisions):
    """Stands where other spaces state decisions: a graph has none, and is recorded by what it holds.

    The record and encodings see the numbers of hidden states and of each operation; strategies that need to choose
    step by step are refused.
    """

    NAMES = ("hidden_states", *ARITY)

    def __init__(self) -> None:
        super().__init__(())

    def size(self) -> int:
        """The order of magnitude that the benchmark's users quote (NAS-Bench-x11, 2021)."""
        return 10**53

    def parameters(self, choices: Mapping[str, Any]) -> dict[str, Any]:
        counts = Counter(node["op"] for node in choices.values())
        return {"hidden_states": n_states(choices), **{op: counts[op] for op in ARITY}}

    def distributions(self, choices: Mapping[str, Any]) -> dict[str, BaseDistribution]:
        return {name: IntDistribution(0, 1000) for name in self.NAMES}

    def encode(self, choices: Mapping[str, Any]) -> list[float]:
        return [float(value) for value in self.parameters(choices).values()]

    def suggest(self, trial: Any) -> Choices:
        raise UserError("space 'recurrent-graph' has no decisions to suggest: a graph is drawn whole")


class RecurrentGraph(GraphSpace):
    """Cells that are free graphs of linear maps, gates and activations (NAS-Bench-NLP)."""

    name = "recurrent-graph"
    makes = RECURRENT | {"graph"}
    noun = "cell"

    def __init__(
        self,
        *,
        hidden_states: Annotated[tuple[Annotated[int, Field(ge=1, le=8)], ...], Field(min_length=1)] = (1, 2, 3),
        intermediate_nodes: Annotated[int, Field(ge=1, le=100)] = 13,
        inner_layers: tuple[Annotated[int, Field(ge=1)], ...] = (),
        direct_memory: bool = False,
        members: str | None = None,
    ):
        """
        Args:
            hidden_states: how many states a sampled cell may have, each as likely.
            intermediate_nodes: I of the generator; 13 gives the released cells.
            inner_layers: widths of the layers before the last, which has the model's width (the benchmark: 600, 600
                before 400).
            direct_memory: a new state may read an old one directly (the GRU does).
            members: a published table (its file or folder, or `nas-bench-nlp`): only its cells are proposed, whatever
                the settings of the generator.
        """
        self.hidden_states = tuple(hidden_states)
        self.intermediate_nodes = intermediate_nodes
        self.inner_layers = tuple(inner_layers)
        self.direct_memory = direct_memory
        self.members = None if members is None else self._members(members)
        self.decisions = GraphCounts()

    @classmethod
    def covering(cls, genotype: Genotype) -> "RecurrentGraph":
        return cls(direct_memory=True)

    @classmethod
    def from_table(cls, entry: Mapping[str, Any]) -> dict[str, Any] | None:
        """Of NAS-Bench-NLP: `id` and `recipe`."""
        if not isinstance(entry.get("recipe"), dict):
            return None
        named = {key: entry[key] for key in ("name", "id") if key in entry}
        return {"format": 1, "space": cls.name, "choices": entry["recipe"], **named}

    def _members(self, data: str) -> list[Genotype]:
        """The trained cells of a table, isomorphic ones once.

        Raises:
            UserError: no such table, or it has none.
        """
        trained = [cell for cell in nas_bench_nlp(data, "space.members") if cell.n_runs]
        found: dict[str, Genotype] = {}
        for cell in trained:
            if problem(cell.recipe, self.direct_memory) is None:
                genotype = Genotype(self.name, canonical(cell.recipe))
                found.setdefault(genotype.id, genotype)
        if len(found) < 2:
            raise UserError(f"space.members {data}: has {len(found)} trained cells of this space, expected at least 2")
        return list(found.values())

    def canonical(self, genotype: Genotype) -> Genotype:
        """The form that isomorphic cells share.

        Raises:
            UserError: it is not a cell.
        """
        self.check(genotype)
        return Genotype(self.name, canonical(genotype.choices))

    def sample(self, rng: random.Random) -> Genotype:
        """A cell of the benchmark's generator: draws until one uses all inputs and keeps the rule on h_new.

        With `members`: one of them, each as likely.

        Raises:
            UserError: settings that hardly ever give a cell.
        """
        if self.members is not None:
            return rng.choice(self.members)
        n = rng.choice(self.hidden_states)
        for _ in range(MAX_DRAWS):
            recipe = random_recipe(rng, n, self.intermediate_nodes)
            if problem(recipe, direct_memory=False) is None:
                return Genotype(self.name, canonical(recipe))
        raise UserError(
            f"space.intermediate_nodes {self.intermediate_nodes}: none of {MAX_DRAWS:,} graphs with {n} hidden states "
            "uses all inputs; expected more nodes or fewer states"
        )

    def mutate(self, genotype: Genotype, rng: random.Random) -> Genotype:
        """A uniformly drawn neighbour; a fresh cell where there is none.

        With `members`: one of the NEAREST that differ least in how many edges lead from operation to operation.
        """
        if self.members is not None:
            own = _edge_counts(genotype.choices)
            others = [member for member in self.members if member.id != genotype.id]
            near = sorted(others, key=lambda member: _difference(own, _edge_counts(member.choices)))
            return rng.choice(near[:NEAREST])
        around = neighbours(genotype.choices, self.direct_memory)
        return Genotype(self.name, rng.choice(around)) if around else self.sample(rng)

    def _check_choices(self, genotype: Genotype) -> None:
        """Refuse a graph that is not a cell, naming the first node that is wrong."""
        wrong = problem(genotype.choices, self.direct_memory)
        if wrong:
            raise UserError(f"genotype {genotype.id}: {wrong}")

    def build(self, genotype: Genotype, width: int) -> "GraphBody":
        return self.stack(genotype, width, (*self.inner_layers, width))

    def stack(self, genotype: Genotype, width: int, layers: Sequence[int]) -> "GraphBody":
        """A body that reads `width` and has layers of the given widths, whatever the settings (quick predictors)."""
        self.check(genotype)
        return GraphBody(genotype.choices, width, layers)

    def diagram(self, genotype: Genotype) -> Diagram:
        recipe, n = genotype.choices, n_states(genotype.choices)
        nodes = [(name, "x[t]" if name == INPUT else f"{name}[t-1]", "input") for name in base_names(n)]
        links = []
        for name in topological(recipe):
            op = recipe[name]["op"]
            nodes.append((name, op.removeprefix("activation_").removeprefix("elementwise_"), "op"))
            for position, source in enumerate(recipe[name]["input"]):
                # blend(a, b, c) = a b + (1 - a) c: its inputs have roles
                links.append((source, name, "abc"[position] if op == "blend" else ""))
        for i in range(n):
            nodes.append((f"out_{i}", f"h_{i}[t]" if i else "h_0[t], output", "output"))
            links.append((f"{NEW}{i}", f"out_{i}", ""))
        labelled = tuple((key, label.replace(OLD, "h_"), kind) for key, label, kind in nodes)
        return Diagram(f"{self.name}, hidden states: {n}", labelled, tuple(links))
