"""The recurrent cell space: published parameter counts, supernet against stand-alone, derivation by hand."""

import pytest
import torch

from lmnas.core.genotype import load_genotype
from lmnas.core.seeds import generator, rng
from lmnas.nn.kernels import edges, first_edge
from lmnas.nn.ops.dropout import draw_mask
from lmnas.nn.train import n_parameters
from lmnas.nn.training.settings import Training
from lmnas.runs.build import count_parameters, covering_space, matching_width
from lmnas.spaces.recurrent.cell import Cell, RecurrentCell
from lmnas.tasks.language_modeling import LanguageModel, ModelSettings

VARIANTS = {
    "darts": {"n_nodes": 8},
    "darts-without-norm": {"n_nodes": 8, "batch_norm": "none"},
    "enas": {
        "n_nodes": 11,
        "input_activation": "searched",
        "output": "loose-ends",
        "sharing": "edge",
        "batch_norm": "output",
        "none": False,
    },
    "small": {"n_nodes": 1, "input_activation": "searched", "output": "loose-ends", "sharing": "edge"},
}
T, B, H = 5, 4, 6


def model_parameters(body, width, vocabulary, bias=True):
    return n_parameters(LanguageModel(body, vocabulary, ModelSettings(width=width, decoder_bias=bias)))


def test_published_parameter_counts():
    """V d + V + 20 d^2 for DARTS (section 2.4 of its sheet), 26 H^2 + V H for ENAS' paper cell."""
    with torch.device("meta"):
        darts = covering_space(load_genotype("darts-v2")).build(load_genotype("darts-v2"), 850)
        assert model_parameters(darts, 850, 10_000) == 22_960_000
        assert model_parameters(RecurrentCell().supernet(300), 300, 10_000) == 4_810_000
        enas = covering_space(load_genotype("enas")).build(load_genotype("enas"), 748)
        assert model_parameters(enas, 748, 10_000, bias=False) == 22_027_104
        lm_code = load_genotype("enas-lm")
        for width, expected in ((800, 20_800_000), (850, 22_950_000)):
            body = covering_space(lm_code).build(lm_code, width)
            assert model_parameters(body, width, 10_000, bias=False) == expected
        shared = RecurrentCell(**VARIANTS["enas"]).supernet(1000)
        assert n_parameters(shared) == 66 * 2 * 1000**2 + 4 * 1000**2


def test_loose_ends_of_the_paper_cell():
    genotype = load_genotype("enas")
    assert covering_space(genotype).program(genotype).outputs == (3, 4, 7, 9, 10, 11)


def inputs_and_masks(dropout: bool):
    noise = generator(7, "inputs")
    inputs, state = torch.randn(T, B, H, generator=noise), torch.randn(B, H, generator=noise)
    masks = {name: draw_mask((B, H), 0.4, noise, inputs) for name in ("x", "hidden")} if dropout else {}
    return inputs, state, masks


def supernet_of(space: RecurrentCell):
    supernet = space.supernet(H)
    supernet.initialise(generator(3, "weights"), 0.5)
    return supernet


def one_hot(space, genotype):
    """The mixture that is all on one architecture."""
    mixture = {}
    for table in space.tables():
        weights = torch.zeros(len(table.edges), len(table.ops), dtype=torch.float64)
        for row, (node, source) in enumerate(table.edges):
            if source in (-1, genotype.choices.get(f"node_{node}.input")):
                weights[row, table.ops.index(genotype.choices[f"node_{node}.activation"])] = 1.0
        mixture[table.name] = weights
    return mixture


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_stand_alone_equals_path_of_supernet(variant, dropout):
    """The central test: inherited weights give the path's output bit for bit, a one-hot mixture to 1e-6."""
    space = RecurrentCell(**VARIANTS[variant])
    supernet = supernet_of(space)
    inputs, state, masks = inputs_and_masks(dropout)
    for k in range(50):
        genotype = space.sample(rng(11, variant, k))
        # batch norm belongs to the search only: the stand-alone cell gets it here to be comparable
        cell = Cell(space.program(genotype), H, batch_norm=space.batch_norm)
        cell.load_state_dict(supernet.inherit(genotype))
        alone, alone_state = cell(inputs, state, masks)
        path, path_state = supernet(inputs, state, masks, genotype)
        assert torch.equal(alone, path) and torch.equal(alone_state, path_state)
        # in float64: batch norm over four rows alone amplifies float32 rounding beyond 1e-6
        double = supernet.double()
        masks64 = {name: mask.double() for name, mask in masks.items()}
        path, _ = double(inputs.double(), state.double(), masks64, genotype)
        mixture, _ = double(inputs.double(), state.double(), masks64, one_hot(space, genotype))
        torch.testing.assert_close(mixture, path, rtol=0, atol=1e-10)
        supernet.float()
        assert space.derive(one_hot(space, genotype)) == genotype


def test_paths_differ():
    """The test above could not fail if every path gave the same."""
    space = RecurrentCell()
    supernet = supernet_of(space)
    inputs, state, _ = inputs_and_masks(False)
    outputs = {supernet(inputs, state, {}, space.sample(rng(0, k)))[0].pow(3).sum().item() for k in range(20)}
    assert len(outputs) == 20


def test_derivation_by_hand():
    """Per node the strongest edge by its largest weight that is not `none`, then that operation (k = 1)."""
    space = RecurrentCell(n_nodes=2)
    table = torch.tensor(
        [
            # none, tanh, relu, sigmoid, identity
            [0.90, 0.02, 0.05, 0.02, 0.01],  # (1, 0)
            [0.10, 0.30, 0.20, 0.20, 0.20],  # (2, 0)
            [0.55, 0.05, 0.05, 0.05, 0.30],  # (2, 1): 0.30 too, the earlier row wins the tie
        ]
    )
    choices = space.derive({"nodes": table}).choices
    assert choices == {
        "node_0.activation": "tanh",
        "node_1.input": 0,
        "node_1.activation": "relu",
        "node_2.input": 0,
        "node_2.activation": "tanh",
        "output": "all-nodes",
    }
    table[2, 4] = 0.31
    assert space.derive({"nodes": table}).choices["node_2.input"] == 1


def test_mixture_against_a_loop_over_operations():
    """The mixed node against the plain formula of the paper, edge by edge and operation by operation."""
    space = RecurrentCell(n_nodes=3, batch_norm="none")
    supernet = supernet_of(space)
    inputs, state, masks = inputs_and_masks(True)
    table = torch.rand(6, 5, generator=generator(1, "p")).softmax(-1)
    functions = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid, "identity": lambda v: v}
    h, expected = state, []
    for x in inputs:
        c, a = (torch.cat([x * masks["x"], h * masks["hidden"]], -1) @ supernet.w_input).chunk(2, -1)
        states = [h + torch.sigmoid(c) * (torch.tanh(a) - h)]
        for node in (1, 2, 3):
            total = torch.zeros_like(h)
            for source in range(node):
                c, a = ((states[source] * masks["hidden"]) @ supernet.w_nodes[node - 1]).chunk(2, -1)
                for k, op in enumerate(space.tables()[0].ops):
                    if op != "none":
                        value = states[source] + torch.sigmoid(c) * (functions[op](a) - states[source])
                        total = total + table[first_edge(node) + source, k] * value
            states.append(total)
        h = sum(states[1:]) / 3
        expected.append(h)
    actual, _ = supernet(inputs, state, masks, {"nodes": table})
    torch.testing.assert_close(actual, torch.stack(expected))


def test_edge_rows():
    assert edges(3) == [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    assert [edges(3)[first_edge(i)] for i in (1, 2, 3)] == [(1, 0), (2, 0), (3, 0)]


def test_single_path_leaves_other_weights_without_gradient():
    """ENAS sharing: what the sampled path does not use is not touched by its step, weight decay included."""
    space = RecurrentCell(**VARIANTS["enas"])
    supernet = supernet_of(space)
    inputs, state, masks = inputs_and_masks(False)
    supernet(inputs, state, masks, space.sample(rng(5)))[0].sum().backward()
    used = sum(weight.grad is not None for weight in supernet.w_nodes)
    assert used == space.n_nodes and len(supernet.w_nodes) == 66


def test_matching_width(tiny_task):
    """The chosen width is the nearest of all."""
    training = Training(epochs=1, model={"width": 20}, batches={"batch_size": 4})
    target = count_parameters(tiny_task, load_genotype("darts-v2"), training)
    width = matching_width(tiny_task, load_genotype("lstm-1"), training, target)

    def distance(w):
        changed = Training(epochs=1, model={"width": w}, batches={"batch_size": 4})
        return abs(count_parameters(tiny_task, load_genotype("lstm-1"), changed) - target)

    assert distance(width) == min(distance(w) for w in range(1, 60))
