"""Recurrent cells as free graphs: the space of NAS-Bench-NLP.

Klyuchnikov et al., "NAS-Bench-NLP: Neural Architecture Search Benchmark for Natural Language Processing", 2020, arXiv
2006.07116. A cell is a recipe: node name -> {"op", "input"}, over the inputs `x` and `h_prev_0`, `h_prev_1`, ...; the
nodes `h_new_0`, `h_new_1`, ... are its new states, and `h_new_0` its output. The graph is the genotype: it states no
decisions, so sampling is the benchmark's generator, and a mutation one change of an edge or of an operation, as in
NASLib (https://github.com/automl/NASLib). Checked against the released recipes and their numbers of parameters.

Departures: random numbers are Python's, so a seed gives another cell than the released generator. The generator forbids
an h_new that reads an h_prev directly; the benchmark's own GRU has one, and is read with `direct_memory`.

Shapes: T time, B batch, H a layer's width, n hidden states of the cell.
"""

import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from typing import Annotated, Any

import networkx as nx
import torch
import torch.nn.functional as F
from optuna.distributions import BaseDistribution, IntDistribution
from pydantic import Field
from torch import Tensor, nn

from lmnas.core.contracts import Body, Choice, Diagram, GraphSpace, Masks
from lmnas.core.decisions import Choices, Decisions
from lmnas.core.errors import UserError, nearest
from lmnas.core.genotype import Genotype
from lmnas.nn.ops.dropout import draw_mask
from lmnas.spaces.recurrent import RECURRENT
from lmnas.spaces.recurrent.published import nas_bench_nlp

Recipe = dict[str, dict[str, Any]]

ARITY = {
    "linear": (2, 3),
    "blend": (3,),
    "elementwise_prod": (2,),
    "elementwise_sum": (2,),
    "activation_tanh": (1,),
    "activation_sigm": (1,),
    "activation_leaky_relu": (1,),
}
"""Operation -> how many inputs it takes."""
ACTIVATIONS = ("activation_tanh", "activation_sigm", "activation_leaky_relu")
EXCHANGEABLE = (ACTIVATIONS, ("elementwise_sum", "elementwise_prod"))
"""Operations that a mutation may swap."""
MAX_DRAWS = 20_000
"""Of which about 1,400 are cells with three states, at the benchmark's settings."""
NEAREST = 10
"""Members of a table among which a mutation is drawn."""
INPUT, OLD, NEW = "x", "h_prev_", "h_new_"


# ------------------------------------------------------------------------------------------------------------ graphs


def n_states(recipe: Mapping[str, Any]) -> int:
    """Hidden states of the cell: the nodes named h_new_0, h_new_1, ..."""
    return sum(name.startswith(NEW) and name.removeprefix(NEW).isdigit() for name in recipe)


def base_names(n: int) -> list[str]:
    """The cell's inputs."""
    return [INPUT, *(f"{OLD}{i}" for i in range(n))]


def topological(recipe: Mapping[str, Any]) -> list[str]:
    """Names of the nodes, each after those it reads; nodes on or behind a cycle are left out.

    Nodes that are ready together come in the order of their names, so the order follows from the graph alone.
    """
    waiting, order, done = sorted(recipe), [], set(base_names(n_states(recipe)))
    while ready := next((node for node in waiting if all(i in done for i in recipe[node]["input"])), None):
        waiting.remove(ready)
        order.append(ready)
        done.add(ready)
    return order


def used(recipe: Mapping[str, Any]) -> set[str]:
    """Nodes and inputs that some new state depends on."""
    seen = {f"{NEW}{i}" for i in range(n_states(recipe))}
    waiting = list(seen)
    while waiting:
        for source in recipe.get(waiting.pop(), {"input": ()})["input"]:
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    return seen


def problem(recipe: Mapping[str, Any], direct_memory: bool) -> str | None:
    """What is wrong with a cell, naming the node; None if nothing is."""
    if not all(isinstance(name, str) and isinstance(node, Mapping) for name, node in recipe.items()):
        return "expected node name -> {op, input}"
    n = n_states(recipe)
    for i in range(max(n, 1)):
        if f"{NEW}{i}" not in recipe:
            return f"node '{NEW}{i}' is missing; new states are numbered from 0"
    bases = base_names(n)
    for name, node in recipe.items():
        if name in bases:
            return f"node {name!r} has the name of an input of the cell"
        op, inputs = node.get("op"), node.get("input")
        if set(node) != {"op", "input"} or not isinstance(inputs, list) or not all(isinstance(i, str) for i in inputs):
            return f"node {name!r}: expected {{'op': name, 'input': [names]}}"
        if not isinstance(op, str) or op not in ARITY:
            return f"node {name!r}: operation {op!r} is unknown. " + nearest(op, ARITY)
        if len(inputs) not in ARITY[op]:
            takes = " or ".join(map(str, ARITY[op]))
            return f"node {name!r}: {op} takes {takes} inputs, got {len(inputs)}"
        for source in inputs:
            if source not in recipe and source not in bases:
                return f"node {name!r} reads {source!r}, which is neither a node nor an input. " + nearest(
                    source, [*recipe, *bases]
                )
            if source == INPUT and op != "linear":
                return f"node {name!r}: {op} reads 'x'; only linear nodes may, its width is another"
        if len(set(inputs)) < len(inputs):
            return f"node {name!r} reads {Counter(inputs).most_common(1)[0][0]!r} twice"
    order = topological(recipe)
    if len(order) < len(recipe):
        return f"node {min(set(recipe) - set(order))!r} is on a cycle or reads one"
    reached = used(recipe)
    for name in (*bases, *recipe):
        if name not in reached:
            return f"{'input' if name in bases else 'node'} {name!r} is not used by any new state"
    for i in range(n):
        for source in recipe[f"{NEW}{i}"]["input"]:
            if source.startswith(OLD) and not direct_memory:
                return f"node '{NEW}{i}' reads {source!r} directly (setting direct_memory allows it)"
    return None


def _renamed(recipe: Mapping[str, Any], names: Mapping[str, str]) -> Recipe:
    return {
        names.get(name, name): {"op": node["op"], "input": [names.get(i, i) for i in node["input"]]}
        for name, node in recipe.items()
    }


def canonical(recipe: Mapping[str, Any]) -> Recipe:
    """The one form that all isomorphic cells share.

    Names of nodes, the order of inputs (but of `blend`) and the numbering of states other than 0 carry no meaning.
    Colour refinement, then every way to break a tie; the form with the smallest text wins.
    """
    n = n_states(recipe)
    forms = []
    for order in permutations(range(1, n)):
        slots = {f"{kind}{old}": f"{kind}{new}" for new, old in enumerate(order, start=1) for kind in (OLD, NEW)}
        forms.append(_canonical_slots(_renamed(recipe, slots)))
    return min(forms, key=json.dumps)


def _canonical_slots(recipe: Recipe) -> Recipe:
    """As `canonical`, the states' numbers kept."""
    readers: dict[str, list[tuple[str, int]]] = {name: [] for name in (*recipe, *base_names(n_states(recipe)))}
    for name, node in recipe.items():
        for position, source in enumerate(node["input"]):
            readers[source].append((name, position if node["op"] == "blend" else 0))

    def refined(colours: dict[str, int]) -> dict[str, int]:
        while True:
            signatures = {}
            for name, colour in colours.items():
                node = recipe.get(name, {"op": "", "input": []})
                reads = [colours[i] for i in node["input"]]
                seen = sorted((colours[reader], position) for reader, position in readers[name])
                signatures[name] = (colour, reads if node["op"] == "blend" else sorted(reads), seen)
            ranks = sorted(signatures.values())
            finer = {name: ranks.index(signature) for name, signature in signatures.items()}
            if len(set(finer.values())) == len(set(colours.values())):
                return finer
            colours = finer

    def forms(colours: dict[str, int]) -> Iterator[Recipe]:
        sizes = Counter(colours.values())
        tied = [colour for colour, size in sizes.items() if size > 1]
        if not tied:
            yield _ordered(recipe, colours)
            return
        tried = set()
        for name in sorted(name for name, colour in colours.items() if colour == min(tied)):
            # twins, which read and are read alike, give one form
            twin = (tuple(sorted(recipe[name]["input"])), tuple(sorted(readers[name])))
            if twin not in tried:
                tried.add(twin)
                yield from forms(refined({**colours, name: len(colours) + 1}))

    def kind(name: str) -> tuple[int, str]:
        if name not in recipe:
            return (0, name)
        return (1, name) if name.startswith(NEW) else (2, recipe[name]["op"])

    # a new state's operation tells it apart as well, but its name already does
    kinds = sorted({kind(name) for name in readers})
    return min(forms(refined({name: kinds.index(kind(name)) for name in readers})), key=json.dumps)


def _ordered(recipe: Recipe, colours: Mapping[str, int]) -> Recipe:
    """Nodes renamed node_0, node_1, ... in the topological order that distinct colours fix."""
    waiting, done, names = sorted(recipe, key=colours.__getitem__), set(base_names(n_states(recipe))), {}
    form: Recipe = {}
    while waiting:
        name = next(node for node in waiting if all(i in done for i in recipe[node]["input"]))
        waiting.remove(name)
        done.add(name)
        names[name] = name if name.startswith(NEW) else f"node_{len(form)}"
        node = recipe[name]
        inputs = node["input"] if node["op"] == "blend" else sorted(node["input"], key=colours.__getitem__)
        form[names[name]] = {"op": node["op"], "input": [names.get(i, i) for i in inputs]}
    return form


def random_recipe(rng: random.Random, n: int, intermediate: int) -> Recipe:
    """One draw of the benchmark's generator, acceptable or not (Klyuchnikov et al., 2020, section 3).

    Args:
        n: hidden states.
        intermediate: nodes drawn beside n; a linear node's activation may add one more.
    """
    bases = base_names(n)
    nodes: Recipe = {}
    activations: list[str] = []

    def add(op: str, inputs: list[str]) -> str:
        name = f"node_{len(nodes)}"
        nodes[name] = {"op": op, "input": inputs}
        return name

    while len(nodes) < n + intermediate:
        op = rng.choices(("linear", "blend", "elementwise_prod", "elementwise_sum"), (3, 1, 1, 1))[0]
        if op == "linear":
            pool = bases + activations
            count = min(rng.choices((2, 3), (4, 1))[0], len(pool))
            linear = add(op, rng.sample(pool, count))
            activations.append(add(rng.choice(ACTIVATIONS), [linear]))
        else:
            pool = bases[1:] + list(nodes)
            if ARITY[op][0] <= len(pool):
                add(op, rng.sample(pool, ARITY[op][0]))
    names = {name: f"{NEW}{i}" for i, name in enumerate(rng.sample(list(nodes), n))}
    recipe = _renamed(nodes, names)
    reached = used(recipe)
    return {name: node for name, node in recipe.items() if name in reached}


def neighbours(recipe: Mapping[str, Any], direct_memory: bool = False) -> list[Recipe]:
    """All cells one change away, in canonical form, without repeats, in a fixed order.

    A change redirects one edge that leaves an inner node to another inner node, or swaps an operation for another of
    its class (activations; sum and product). Changes that leave a node or an input unused are no neighbours.
    """
    found: dict[str, Recipe] = {}
    own = json.dumps(canonical(recipe))

    def consider(name: str, node: dict[str, Any]) -> None:
        changed = {**recipe, name: node}
        if problem(changed, direct_memory) is None:
            form = canonical(changed)
            text = json.dumps(form)
            if text != own:
                found.setdefault(text, form)

    for name in sorted(recipe):
        op, inputs = recipe[name]["op"], list(recipe[name]["input"])
        for exchangeable in EXCHANGEABLE:
            if op in exchangeable:
                for other in exchangeable:
                    consider(name, {"op": other, "input": inputs})
        for position, source in enumerate(inputs):
            if source in recipe:
                for other in sorted(recipe):
                    if other not in (name, *inputs):
                        consider(name, {"op": op, "input": [*inputs[:position], other, *inputs[position + 1 :]]})
    return [found[text] for text in sorted(found)]


def edit_distance(first: Mapping[str, Any], second: Mapping[str, Any], timeout: float | None = None) -> float:
    """Graph edit distance of two cells as labelled digraphs, every edit of a node or an edge costing 1.

    Labels are operations; inputs and new states keep their identity.

    Args:
        timeout: seconds, after which the best distance found so far is given (an upper bound); None: exact.
    """

    def graph(recipe: Mapping[str, Any]) -> Any:
        drawn = nx.DiGraph()
        for name in base_names(n_states(recipe)):
            drawn.add_node(name, label=name)
        for name, node in recipe.items():
            drawn.add_node(name, label=f"{name}:{node['op']}" if name.startswith(NEW) else node["op"])
        drawn.add_edges_from((source, name) for name, node in recipe.items() for source in node["input"])
        return drawn

    return nx.graph_edit_distance(
        graph(first), graph(second), node_match=lambda a, b: a["label"] == b["label"], timeout=timeout
    )


# ------------------------------------------------------------------------------------------------------------- space


def _edge_counts(recipe: Mapping[str, Any]) -> Counter[tuple[str, str]]:
    """How often a node of one operation (or an input of the cell) is read by one of another."""
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
        """Refuse what is not a cell, naming the first node that is wrong."""
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


# -------------------------------------------------------------------------------------------------------------- body


class GraphLayer(nn.Module):
    """One layer: (T, B, in) -> (T, B, H). State: (n, B, H).

    All matrices that read one source are one parameter, `weights[source]` of (k H, in), for the k linear nodes in
    `readers[source]`: one product a source and step. `bias` is (linear nodes · H).
    """

    def __init__(self, recipe: Mapping[str, Any], in_width: int, width: int):
        super().__init__()
        self.recipe = {name: {"op": node["op"], "input": list(node["input"])} for name, node in recipe.items()}
        self.in_width, self.width = in_width, width
        self.n_states = n_states(recipe)
        self.order = topological(recipe)
        self.linears = [name for name in self.order if recipe[name]["op"] == "linear"]
        self.readers: dict[str, list[str]] = {}
        for name in self.linears:
            for source in recipe[name]["input"]:
                self.readers.setdefault(source, []).append(name)
        self.weights = nn.ParameterDict(
            {
                source: torch.empty(len(names) * width, in_width if source == INPUT else width)
                for source, names in self.readers.items()
            }
        )
        self.bias = nn.Parameter(torch.empty(len(self.linears) * width))

    @property
    def biases(self) -> Tensor:
        """(linear nodes, H), a view of `bias`."""
        return self.bias.view(-1, self.width)

    def matrix(self, name: str, position: int) -> tuple[Tensor, Tensor]:
        """(H, in): the matrix of linear node `name` for its input at `position`, and its gradient (zero before any)."""
        source = self.recipe[name]["input"][position]
        weight, row = self.weights[source], self.readers[source].index(name) * self.width
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        return weight.detach()[row : row + self.width], gradient[row : row + self.width]

    def forward(
        self, inputs: Tensor, state: Tensor, masks: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        masks = masks or {}
        weights = {s: weight * masks[s] if s in masks else weight for s, weight in self.weights.items()}
        biases = dict(zip(self.linears, self.biases, strict=True))
        # x is known for all steps: one product
        read_x = F.linear(inputs, weights[INPUT]) if INPUT in weights else inputs
        outputs = []
        for t in range(len(inputs)):
            values = {f"{OLD}{i}": state[i] for i in range(self.n_states)}
            parts: dict[str, dict[str, Tensor]] = {}
            for name in self.order:
                op, sources = self.recipe[name]["op"], self.recipe[name]["input"]
                if op == "linear":
                    value = biases[name]
                    for source in sources:
                        if source not in parts:
                            whole = read_x[t] if source == INPUT else F.linear(values[source], weights[source])
                            pieces = whole.chunk(len(self.readers[source]), dim=-1)
                            parts[source] = dict(zip(self.readers[source], pieces, strict=True))
                        value = value + parts[source][name]
                    values[name] = value
                else:
                    values[name] = apply(op, [values[source] for source in sources])
            state = torch.stack([values[f"{NEW}{i}"] for i in range(self.n_states)])
            outputs.append(state[0])
        return torch.stack(outputs), state


def apply(op: str, inputs: Sequence[Tensor]) -> Tensor:
    """An operation without weights."""
    a = inputs[0]
    if op == "blend":
        return a * inputs[1] + (1 - a) * inputs[2]
    if op == "elementwise_prod":
        return a * inputs[1]
    if op == "elementwise_sum":
        return a + inputs[1]
    if op == "activation_tanh":
        return torch.tanh(a)
    if op == "activation_sigm":
        return torch.sigmoid(a)
    assert op == "activation_leaky_relu", op
    return F.leaky_relu(a, 0.01)


class GraphBody(Body):
    """A stack of layers of one cell: (T, B, H) -> (T, B, H). State: (n, B, sum of the layers' widths)."""

    def __init__(self, recipe: Mapping[str, Any], width: int, layers: Sequence[int]):
        super().__init__(width)
        self.widths = list(layers)
        self.layers = nn.ModuleList(
            GraphLayer(recipe, before, own) for before, own in zip((width, *layers), layers, strict=False)
        )
        self.n_states = n_states(recipe)

    def initialise(self, generator: torch.Generator, init_range: float) -> None:
        """Uniform in ±1/sqrt(H) of each layer, as in the benchmark; `init_range` is for cells that have none."""
        for layer, width in zip(self.layers, self.widths, strict=True):
            bound = 1.0 / math.sqrt(width)
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def stacked(self) -> list[nn.Module]:
        return list(self.layers)

    def hidden(self, state: Tensor) -> list[Tensor]:
        """Per layer (B, H): state 0, which was the layer's output."""
        return [own[0] for own in state.split(self.widths, dim=-1)]

    def salient(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(matrix, its gradient) of every linear node's inputs but the first: what synaptic saliency sums."""
        for layer in self.layers:
            assert isinstance(layer, GraphLayer)
            for name in layer.linears:
                for position in range(1, len(layer.recipe[name]["input"])):
                    yield layer.matrix(name, position)

    def initial_state(self, batch_size: int) -> Tensor:
        return next(self.parameters()).new_zeros(self.n_states, batch_size, sum(self.widths))

    def draw_masks(self, batch_size: int, rates: Mapping[str, float], generator: torch.Generator) -> Masks:
        """`x` before the first layer, `hidden` between layers, `weight` on every matrix that does not read x."""
        like = next(self.parameters())
        masks = {}
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, GraphLayer)
            rate = rates.get("hidden" if i else "x", 0.0)
            if rate > 0:
                masks[f"hidden_{i}" if i else "x"] = draw_mask((batch_size, layer.in_width), rate, generator, like)
            if rates.get("weight", 0.0) > 0:
                for source, weight in layer.weights.items():
                    if source != INPUT:
                        masks[f"weight_{i}.{source}"] = draw_mask(weight.shape, rates["weight"], generator, like)
        return masks

    def forward(self, inputs: Tensor, state: Tensor, masks: Masks, choice: Choice = None) -> tuple[Tensor, Tensor]:
        """`choice` is ignored: a stand-alone body can do one thing."""
        outputs, states = inputs, []
        for i, (layer, own) in enumerate(zip(self.layers, state.split(self.widths, dim=-1), strict=True)):
            between = f"hidden_{i}" if i else "x"
            if between in masks:
                outputs = outputs * masks[between]
            prefix = f"weight_{i}."
            dropped = {name.removeprefix(prefix): mask for name, mask in masks.items() if name.startswith(prefix)}
            outputs, last = layer(outputs, own, dropped)
            states.append(last)
        return outputs, torch.cat(states, dim=-1)
