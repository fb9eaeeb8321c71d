"""Sparse recurrent cells: means over living inputs and nodes, written out plainly."""

import pytest
import torch

from lmnas.core.errors import UserError
from lmnas.core.genotype import Genotype
from lmnas.core.seeds import generator
from lmnas.spaces.recurrent.sparse import RecurrentSparse

F = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid, "identity": lambda a: a}
T, B, H = 3, 2, 4


def genotype(*inputs, first="tanh"):
    choices = {f"node_{i}.inputs": list(taken) for i, taken in enumerate(inputs, start=1)}
    return Genotype("recurrent-sparse", {"node_0.activation": first, **choices})


def made(value):
    body = RecurrentSparse.covering(value).build(value, H)
    body.initialise(generator(0, "init"), 0.7)
    return body.double()


def data():
    noise = generator(0, "data")
    return torch.randn(T, B, H, generator=noise).double(), torch.randn(B, H, generator=noise).double()


def plain(body, inputs, h):
    """Node by node in dictionaries, as the docstring says."""
    outputs = []
    for x in inputs:
        c, a = (torch.cat([x, h], -1) @ body.w_input).chunk(2, -1)
        states = {0: h + torch.sigmoid(c) * (F[body.first](a) - h)}
        weights = iter(body.w_nodes)
        for i, taken in enumerate(body.inputs, start=1):
            if taken:
                w = next(weights)
                terms = []
                for j, op in taken:
                    c, a = (states[j] @ w).chunk(2, -1)
                    terms.append(states[j] + torch.sigmoid(c) * (F[op](a) - states[j]))
                states[i] = sum(terms) / len(terms)
        living = [s for i, s in states.items() if i] or [states[0]]
        h = sum(living) / len(living)
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "value, n_weights",
    [
        (genotype(["0:tanh"], ["0:relu", "1:sigmoid"], ["2:tanh", "2:identity"]), 3),
        (genotype(["0:tanh", "0:relu", "0:sigmoid"], [], ["1:relu", "2:tanh"], first="relu"), 2),
        (genotype([], [], ["0:sigmoid"]), 1),
        (genotype([], ["1:tanh"], ["2:tanh"]), 0),  # all hang from a dead node
    ],
)
def test_means_over_what_lives(value, n_weights):
    body, (inputs, state) = made(value), data()
    assert len(body.w_nodes) == n_weights
    torch.testing.assert_close(body(inputs, state, {})[0], plain(body, inputs, state), rtol=0, atol=1e-12)


def test_the_diagram_shows_all_operations_of_an_edge():
    value = genotype(["0:tanh", "0:relu"], [], ["1:relu", "2:tanh"])
    diagram = RecurrentSparse.covering(value).diagram(value)
    assert ("0", "1", "tanh, relu") in diagram.edges and ("1", "3", "relu") in diagram.edges
    assert {key for key, _, _ in diagram.nodes} == {"x", "h", "0", "1", "3", "out"}


def test_what_is_no_cell_is_refused():
    with pytest.raises(UserError, match="0:swish"):
        RecurrentSparse(n_nodes=1).check(genotype(["0:swish"]))
    with pytest.raises(UserError):
        RecurrentSparse(n_nodes=2).check(genotype(["0:tanh"], ["2:tanh"]))
