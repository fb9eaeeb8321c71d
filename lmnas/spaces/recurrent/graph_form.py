"""Recurrent cells as graphs: their recipes, faults of a recipe, and the form that isomorphic ones share.

A recipe is node name -> {"op", "input"} over the inputs `x`, `h_prev_0`, `h_prev_1`, ...; its nodes `h_new_0`,
`h_new_1`, ... are the new states (Klyuchnikov et al., NAS-Bench-NLP, 2020, arXiv 2006.07116).
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import permutations
from typing import Any

from lmnas.core.errors import nearest

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
"""Operation -> number of its inputs."""
INPUT, OLD, NEW = "x", "h_prev_", "h_new_"


def is_state(name: str) -> bool:
    """True of h_new_0, h_new_1, ..., the names of new states; others may begin alike (h_new_1_part1)."""
    return name.startswith(NEW) and name.removeprefix(NEW).isdigit()


def n_states(recipe: Mapping[str, Any]) -> int:
    """Number of hidden states of the cell."""
    return sum(map(is_state, recipe))


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
    """First fault of a cell, naming the node; None: it has none."""
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


def renamed(recipe: Mapping[str, Any], names: Mapping[str, str]) -> Recipe:
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
        forms.append(_canonical_slots(renamed(recipe, slots)))
    return min(forms, key=json.dumps)


def _canonical_slots(recipe: Recipe) -> Recipe:
    """Canonical form as of `canonical`, with the states' numbers kept."""
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
        return (1, name) if is_state(name) else (2, recipe[name]["op"])

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
        names[name] = name if is_state(name) else f"node_{len(form)}"
        node = recipe[name]
        inputs = node["input"] if node["op"] == "blend" else sorted(node["input"], key=colours.__getitem__)
        form[names[name]] = {"op": node["op"], "input": [names.get(i, i) for i in inputs]}
    return form
