"""Graphs as cells: one form for isomorphic cells, the benchmark's generator, torch's own layers, published sizes."""

import json
import os
import random
from pathlib import Path

import pytest
import torch

from lmnas.core.errors import UserError
from lmnas.core.genotype import Genotype, load_genotype
from lmnas.core.seeds import generator
from lmnas.runs.build import covering_space
from lmnas.spaces.recurrent.graph import RecurrentGraph
from lmnas.spaces.recurrent.graph_form import base_names, canonical, is_state, n_states, problem, renamed
from lmnas.spaces.recurrent.graph_moves import ACTIVATIONS, neighbours, random_recipe

T, B, H = 5, 3, 4
TABLE = Path(os.environ.get("LMNAS_DATA", "data")) / "nas-bench-nlp" / "architectures.jsonl"
needs_table = pytest.mark.skipif(not TABLE.is_file(), reason="the NAS-Bench-NLP table is not in LMNAS_DATA")


@pytest.fixture(scope="module")
def table():
    return [json.loads(line) for line in TABLE.read_text().splitlines()]


def node(op, *inputs):
    return {"op": op, "input": list(inputs)}


RNN = {"f": node("linear", "x", "h_prev_0"), "h_new_0": node("activation_tanh", "f")}


def samples(n, **settings):
    space = RecurrentGraph(**settings)
    return [dict(space.sample(random.Random(seed)).choices) for seed in range(n)]


def body(recipe, layers=(H,), width=H, seed=0):
    built = RecurrentGraph(inner_layers=layers[:-1], direct_memory=True).build(
        Genotype("recurrent-graph", recipe), width
    )
    built.initialise(generator(seed, "init"), 0.1)
    return built.double()


# ------------------------------------------------------------------------------------------------------------ graphs


def shuffled(recipe, rng):
    """The same cell written otherwise: names, order of nodes and of inputs, numbers of the states other than 0."""
    n = n_states(recipe)
    slots = [0, *rng.sample(range(1, n), n - 1)]
    names = {f"{kind}{i}": f"{kind}{slot}" for i, slot in enumerate(slots) for kind in ("h_prev_", "h_new_")}
    inner = [name for name in recipe if not name.startswith("h_new_")]
    names |= dict(zip(inner, rng.sample([f"v{i}" for i in range(len(inner))], len(inner)), strict=True))
    items = []
    for name, value in recipe.items():
        inputs = [names.get(i, i) for i in value["input"]]
        if value["op"] != "blend":
            rng.shuffle(inputs)
        items.append((names[name], node(value["op"], *inputs)))
    rng.shuffle(items)
    return dict(items)


def test_isomorphic_cells_have_one_form():
    for seed, recipe in enumerate(samples(60)):
        assert canonical(recipe) == recipe
        assert json.dumps(canonical(shuffled(recipe, random.Random(seed)))) == json.dumps(recipe)


def test_cells_that_differ_have_different_forms():
    """A shared linear node is not two equal ones, and a blend's inputs have roles."""
    one = {**RNN, "g": node("activation_sigm", "f"), "h_new_0": node("elementwise_prod", "f", "g")}
    two = {**one, "e": node("linear", "x", "h_prev_0"), "g": node("activation_sigm", "e")}
    assert canonical(one) != canonical(two)
    blended = {**two, "t": node("activation_tanh", "f"), "h_new_0": node("blend", "g", "t", "f")}
    assert canonical(blended) != canonical({**blended, "h_new_0": node("blend", "g", "f", "t")})


def test_only_numbered_names_are_states():
    """The benchmark's authors name inner nodes of their LSTM `h_new_1_part1`: the cell is the same as shipped."""
    shipped = load_genotype("nas-bench-nlp-lstm")
    inner = [name for name in shipped.choices if not is_state(name)]
    names = {name: f"h_new_1_part{i}" for i, name in enumerate(inner, start=1)}
    form = RecurrentGraph(direct_memory=True).canonical(Genotype(shipped.space, renamed(shipped.choices, names)))
    assert n_states(form.choices) == 2
    assert form == RecurrentGraph(direct_memory=True).canonical(shipped)


@needs_table
def test_ids_are_the_groups_of_the_published_cells(table):
    """The table's groups were made by another program: equal ids exactly where the groups are equal."""
    space = RecurrentGraph()
    ids = {}
    for entry in table:
        ids.setdefault(entry["group"], set()).add(space.canonical(Genotype(space.name, entry["recipe"])).id)
    assert all(len(found) == 1 for found in ids.values())
    assert len(set.union(*ids.values())) == len(ids) > 1000


@needs_table
def test_parameters_are_those_published(table):
    """Embedding 400, layers 600, 600 and 400, a bias per word; exact for every cell on both corpora."""
    space = RecurrentGraph(inner_layers=(600, 600))
    with torch.device("meta"):
        for entry in table:
            built = space.build(Genotype(space.name, entry["recipe"]), 400)
            size = sum(parameter.numel() for parameter in built.parameters())
            assert size + 10_000 * 401 == entry["ptb"]["params"]
            if entry["wikitext2"]:
                assert size + 33_278 * 401 == entry["wikitext2"]["params"]


@pytest.mark.parametrize("n, accepted", [(1, 0.67), (2, 0.25), (3, 0.07)])
def test_the_generator_is_accepted_as_often_as_the_published_one(n, accepted):
    draws = [random_recipe(random.Random(seed), n, 13) for seed in range(2000)]
    rate = sum(problem(recipe, direct_memory=False) is None for recipe in draws) / len(draws)
    assert rate == pytest.approx(accepted, abs=0.03)  # 3 standard errors at 0.25


@needs_table
def test_the_generator_draws_cells_like_those_published(table):
    """Mean numbers of nodes and of linear nodes; of cells with three states, where hardly one is drawn twice."""
    published = [e["recipe"] for e in table if e["hidden_states"] == 3]
    drawn = samples(300, hidden_states=(3,))
    for count in (len, lambda r: sum(v["op"] == "linear" for v in r.values())):
        ours, theirs = (torch.tensor([float(count(r)) for r in cells]) for cells in (drawn, published))
        error = (ours.var() / len(ours) + theirs.var() / len(theirs)).sqrt()
        assert abs(ours.mean() - theirs.mean()) < 4 * error


def test_settings_that_give_no_cell_are_refused():
    with pytest.raises(UserError, match=r"intermediate_nodes 1: .* 6 hidden states"):
        RecurrentGraph(hidden_states=(6,), intermediate_nodes=1).sample(random.Random(0))


def test_mutants_are_neighbours_and_neighbours_are_mutual():
    space = RecurrentGraph()
    for seed, recipe in enumerate(samples(8, intermediate_nodes=5)):
        around = neighbours(recipe)
        assert recipe not in around and all(problem(other, False) is None for other in around)
        mutant = space.mutate(Genotype(space.name, recipe), random.Random(seed))
        assert dict(mutant.choices) in around
        assert recipe in neighbours(mutant.choices)


def test_neighbours_of_the_plain_network_are_its_two_other_activations():
    ops = [r["h_new_0"]["op"] for r in neighbours(RNN)]
    assert sorted(ops) == sorted(set(ACTIVATIONS) - {"activation_tanh"})


BROKEN = {
    "cycle": ({**RNN, "f": node("linear", "x", "h_prev_0", "h_new_0")}, "'f' is on a cycle"),
    "operation": ({**RNN, "f": node("linea", "x", "h_prev_0")}, "node 'f': operation 'linea'.*'linear'"),
    "missing": ({**RNN, "f": node("linear", "x", "h_prev_1")}, "node 'f' reads 'h_prev_1'.*'h_prev_0'"),
    "unused node": ({**RNN, "g": node("activation_tanh", "f")}, "node 'g' is not used"),
    "unused input": ({**RNN, "f": node("linear", "x", "f0"), "f0": node("linear", "x", "x")}, "'f0' reads 'x' twice"),
    "unused state": (
        {"f": node("linear", "x", "g"), "g": node("activation_tanh", "k"), "k": node("linear", "x", "h_prev_0"),
         "h_new_0": node("activation_tanh", "f"), "h_new_1": node("activation_tanh", "g")},
        "input 'h_prev_1' is not used",
    ),
    "arity": ({**RNN, "f": node("linear", "x")}, "node 'f': linear takes 2 or 3 inputs, got 1"),
    "x": ({**RNN, "h_new_0": node("elementwise_sum", "f", "x")}, "node 'h_new_0': elementwise_sum reads 'x'"),
    "direct": ({**RNN, "h_new_0": node("elementwise_sum", "f", "h_prev_0")}, "'h_new_0' reads 'h_prev_0' directly"),
    "no output": ({"f": node("linear", "x", "h_prev_0")}, "'h_new_0' is missing"),
    "shape": ({**RNN, "f": ["linear", "x"]}, "node name"),
    "keys": ({**RNN, "f": {"op": "linear"}}, "node 'f': expected"),
    "name": ({**RNN, "x": node("activation_tanh", "f")}, "'x' has the name of an input"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_cell_is_refused_by_the_node(kind):
    recipe, message = BROKEN[kind]
    with pytest.raises(UserError, match=message):
        RecurrentGraph().check(Genotype("recurrent-graph", recipe))


# -------------------------------------------------------------------------------------------------------------- body


def plain(layer, recipe, inputs, state):
    """The meaning of a recipe, node by node on demand, from the layer's own matrices."""
    outputs = []
    for x in inputs:
        values = dict(zip(base_names(len(state)), (x, *state), strict=True))

        def value(name, values=values):
            if name not in values:
                op, sources = recipe[name]["op"], [value(i) for i in recipe[name]["input"]]
                if op == "linear":
                    total = layer.biases[layer.linears.index(name)]
                    for position, source in enumerate(sources):
                        total = total + source @ layer.matrix(name, position)[0].t()
                    values[name] = total
                else:
                    values[name] = {
                        "blend": lambda a, b=None, c=None: a * b + (1 - a) * c,
                        "elementwise_prod": lambda a, b=None: a * b,
                        "elementwise_sum": lambda a, b=None: a + b,
                        "activation_tanh": lambda a: a.tanh(),
                        "activation_sigm": lambda a: 1 / (1 + (-a).exp()),
                        "activation_leaky_relu": lambda a: torch.where(a > 0, a, 0.01 * a),
                    }[op](*sources)
            return values[name]

        state = [value(f"h_new_{i}") for i in range(len(state))]
        outputs.append(state[0])
    return torch.stack(outputs), torch.stack(state)


def test_a_layer_computes_its_recipe():
    for recipe in samples(15):
        built = body(recipe)
        inputs, state = torch.randn(T, B, H, dtype=torch.float64), torch.randn(n_states(recipe), B, H).double()
        expected = plain(built.layers[0], recipe, inputs, list(state))
        for found, wanted in zip(built(inputs, state, {}), expected, strict=True):
            torch.testing.assert_close(found, wanted)


def test_layers_stack_with_their_own_widths_and_states():
    recipe = samples(1)[0]
    built = body(recipe, layers=(6, 7, 4))
    state = built.initial_state(B)
    assert state.shape == (n_states(recipe), B, 17)
    inputs, outputs = torch.randn(T, B, 4, dtype=torch.float64), None
    states = []
    for layer, own in zip(built.layers, state.split([6, 7, 4], dim=-1), strict=True):
        outputs, last = plain(layer, recipe, inputs if outputs is None else outputs, list(own))
        states.append(last)
    found, last = built(inputs, state, {})
    torch.testing.assert_close(found, outputs)
    torch.testing.assert_close(last, torch.cat(states, dim=-1))
    torch.testing.assert_close(built.hidden(last)[-1], outputs[-1])


def test_the_plain_network_is_torchs():
    genotype = load_genotype("nas-bench-nlp-rnn")
    built = body(dict(genotype.choices), layers=(6, H))
    theirs = torch.nn.RNN(H, 6).double(), torch.nn.RNN(6, H).double()
    inputs = expected = torch.randn(T, B, H, dtype=torch.float64)
    for layer, net in zip(built.layers, theirs, strict=True):
        with torch.no_grad():
            net.weight_ih_l0.copy_(layer.weights["x"])
            net.weight_hh_l0.copy_(layer.weights["h_prev_0"])
            net.bias_ih_l0.copy_(layer.biases[0])
            net.bias_hh_l0.zero_()
        expected = net(expected)[0]
    torch.testing.assert_close(built(inputs, built.initial_state(B), {})[0], expected)


def test_the_gru_is_torchs_where_the_reset_gate_commutes():
    """torch gates W h, the recipe gates h: the same for a diagonal W without a bias on its side."""
    recipe = dict(load_genotype("nas-bench-nlp-gru").choices)
    built = body(recipe)
    layer, net = built.layers[0], torch.nn.GRU(H, H).double()
    update = recipe["h_new_0"]["input"][0]
    update = recipe[update]["input"][0]
    reset = next(name for name in layer.readers["h_prev_0"] if name != update)
    (candidate,) = set(layer.linears) - {update, reset}
    with torch.no_grad():
        (gated,) = set(recipe[candidate]["input"]) - {"x"}
        layer.weights[gated].copy_(torch.diag(torch.randn(H)).double())
        for row, name in enumerate((reset, update, candidate)):
            rows = slice(row * H, (row + 1) * H)
            inputs = recipe[name]["input"]
            net.weight_ih_l0[rows] = layer.matrix(name, inputs.index("x"))[0]
            net.weight_hh_l0[rows] = layer.matrix(name, 1 - inputs.index("x"))[0]
            net.bias_ih_l0[rows] = layer.biases[layer.linears.index(name)]
        net.bias_hh_l0.zero_()
    inputs, state = torch.randn(T, B, H, dtype=torch.float64), torch.randn(1, B, H, dtype=torch.float64)
    torch.testing.assert_close(built(inputs, state, {})[0], net(inputs, state)[0])


def test_the_lstm_keeps_a_memory():
    """h = tanh(c) · tanh(o), c = f · c' + tanh(i) · j: the output gate is a tanh, as published."""
    recipe = dict(load_genotype("nas-bench-nlp-lstm").choices)
    assert n_states(recipe) == 2 and problem(recipe, direct_memory=False) is None
    assert sum(value["op"] == "linear" for value in recipe.values()) == 4
    assert recipe["h_new_1"]["op"] == "elementwise_sum"
    gates = {recipe[i]["op"] for i in recipe["h_new_0"]["input"]}
    assert recipe["h_new_0"]["op"] == "elementwise_prod" and gates == {"activation_tanh"}


def test_weight_drop_masks_what_does_not_read_x():
    recipe = samples(1)[0]
    built = body(recipe, layers=(5, H))
    masks = built.draw_masks(B, {"weight": 0.5}, generator(1, "masks"))
    assert masks and not any(name.endswith(".x") for name in masks)
    inputs = torch.randn(T, B, H, dtype=torch.float64)
    dropped = built(inputs, built.initial_state(B), masks)[0]
    with torch.no_grad():
        for name, mask in masks.items():
            layer, source = name.removeprefix("weight_").split(".")
            built.layers[int(layer)].weights[source].mul_(mask)
    torch.testing.assert_close(dropped, built(inputs, built.initial_state(B), {})[0])


def test_initialisation_follows_each_layers_width():
    built = body(samples(1)[0], layers=(100, 9), width=9)
    for layer, width in zip(built.layers, (100, 9), strict=True):
        largest = max(p.abs().max().item() for p in layer.parameters())
        assert 0.8 * width**-0.5 < largest <= width**-0.5


def test_a_cell_that_reads_its_memory_directly_is_covered_but_not_sampled():
    gru = load_genotype("nas-bench-nlp-gru")
    covering_space(gru)
    with pytest.raises(UserError, match="direct_memory"):
        RecurrentGraph().check(gru)


def test_the_record_holds_counts_and_the_controller_is_refused():
    from lmnas.core import registry
    from lmnas.core.contracts import Objective

    space = RecurrentGraph()
    counted = space.decisions.parameters(load_genotype("nas-bench-nlp-lstm").choices)
    assert counted["hidden_states"] == 2 and counted["linear"] == 4 and counted["activation_tanh"] == 3
    assert counted.keys() == space.decisions.distributions({}).keys()
    with pytest.raises(UserError, match="no decisions"):
        registry.create("strategy", {"name": "reinforce"}, space, Objective("error", "", "minimize"), 0)
