"""Cells drawn at random and cells one change away: the benchmark's generator and NASLib's mutations."""

import json
import random
from collections.abc import Mapping
from typing import Any

from lmnas.spaces.recurrent.graph_form import ARITY, NEW, Recipe, base_names, canonical, problem, renamed, used

ACTIVATIONS = ("activation_tanh", "activation_sigm", "activation_leaky_relu")
EXCHANGEABLE = (ACTIVATIONS, ("elementwise_sum", "elementwise_prod"))
"""Operations that a mutation may swap."""


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
    recipe = renamed(nodes, names)
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
