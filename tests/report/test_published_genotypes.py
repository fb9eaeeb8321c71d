"""The shipped genotypes against the notation of their papers' code."""

import json

import pytest

from lmnas.core.genotype import SHIPPED, load_genotype, shipped_names

DARTS_FRAME = {
    "darts-v1": "relu 0, relu 1, tanh 2, relu 3, relu 4, identity 1, relu 5, relu 1",
    "darts-v2": "sigmoid 0, relu 1, relu 1, identity 1, tanh 2, sigmoid 5, tanh 3, relu 5",
    "i-darts-global-v1": "identity 0, relu 1, identity 2, tanh 3, relu 3, relu 5, identity 2, relu 6",
    "i-darts-search-v1": "tanh 0, identity 1, identity 1, identity 0, relu 0, identity 0, identity 1, sigmoid 7",
    "gdas": "relu 0, relu 0, identity 1, relu 1, tanh 0, relu 2, identity 4, identity 2",
    "smoothdarts-random": "sigmoid 0, sigmoid 1, identity 2, sigmoid 1, tanh 2, tanh 2, sigmoid 0, sigmoid 3",
    "smoothdarts-pgd": "relu 0, relu 1, tanh 2, relu 3, identity 2, relu 1, tanh 2, relu 7",
}
# The ENAS cell as DARTS' code writes it: the same graph, its nodes numbered otherwise.
ENAS_IN_DARTS = [
    ("tanh", 0), ("tanh", 1), ("relu", 1), ("tanh", 3), ("tanh", 3), ("relu", 3), ("relu", 4), ("relu", 7),
    ("relu", 8), ("relu", 8), ("relu", 8),
]  # fmt: skip
# google-research/enas_lm: (previous, activation code) of nodes 1 to 8.
ENAS_LM = [0, 2, 1, 0, 2, 1, 2, 2, 4, 0, 5, 0, 3, 2, 6, 2]
CELLS = [*DARTS_FRAME, "enas", "enas-lm"]


def pairs(name):
    choices = load_genotype(name).choices
    n = sum(key.endswith(".input") for key in choices)
    return [(choices[f"node_{i}.activation"], choices[f"node_{i}.input"]) for i in range(1, n + 1)]


def paths(nodes):
    """Every node as the activations on its way from the input node; equal lists mean equal cells."""
    found = ["tanh"]
    for activation, source in nodes:
        found.append(f"{found[source]} {activation}")
    return sorted(found)


def loose_ends(nodes):
    return sorted(set(range(1, len(nodes) + 1)) - {source for _, source in nodes})


def test_all_are_listed():
    assert set(CELLS) <= set(shipped_names())


@pytest.mark.parametrize("name", DARTS_FRAME)
def test_darts_frame(name):
    assert ", ".join(f"{activation} {source}" for activation, source in pairs(name)) == DARTS_FRAME[name]
    assert load_genotype(name).choices["output"] == "all-nodes"


def test_enas():
    assert paths(pairs("enas")) == paths(ENAS_IN_DARTS)
    assert loose_ends(pairs("enas")) == [3, 4, 7, 9, 10, 11]
    assert load_genotype("enas").choices["output"] == "loose-ends"


def test_enas_lm():
    names = ["tanh", "relu", "sigmoid", "identity"]
    assert pairs("enas-lm") == [(names[code], source) for source, code in zip(ENAS_LM[::2], ENAS_LM[1::2], strict=True)]
    assert loose_ends(pairs("enas-lm")) == [7, 8]


@pytest.mark.parametrize("name", CELLS)
def test_files_name_their_source_and_keep_the_order(name):
    document = json.loads((SHIPPED / f"{name}.json").read_text())
    assert [key for key in document if key != "decoder_bias"] == ["format", "name", "source", "space", "choices"]
    assert document["name"] == name
    n = sum(key.endswith(".input") for key in document["choices"])
    wanted = [f"node_{i}.{what}" for i in range(n + 1) for what in ("input", "activation") if (i, what) != (0, "input")]
    assert list(document["choices"]) == [*wanted, "output"]
    assert all(document["choices"][f"node_{i}.input"] < i for i in range(1, n + 1))
