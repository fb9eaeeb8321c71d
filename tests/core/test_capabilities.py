"""Capabilities: what fits, how a misfit is told, and that nobody may invent a word."""

import copy
import sys
import types

import pytest

from lmnas.core import registry
from lmnas.core.capabilities import WORDS, Example, lacking, phrase, refuse_unfit
from lmnas.core.errors import UserError
from lmnas.core.seeds import generator

RECURRENT = frozenset({"sequence", "causal", "stateful"})


def test_a_part_fits_where_all_that_it_takes_is_made():
    assert not lacking({"sequence", "causal"}, RECURRENT) and not lacking((), ())
    assert lacking({"sequence", "graph"}, RECURRENT) == {"graph"}
    refuse_unfit("task 't'", {"sequence"}, "s", RECURRENT)
    with pytest.raises(UserError) as refusal:
        refuse_unfit("task 't'", {"image"}, "s", RECURRENT)
    assert str(refusal.value) == "task 't' takes image bodies; space 's' makes causal stateful sequence bodies"


def test_a_phrase_has_the_noun_last():
    assert phrase(["sequence", "stateful", "causal"]) == "causal stateful sequence"


@pytest.mark.parametrize("kind", registry.WORDS_OF)
def test_every_component_uses_known_words(kind):
    for name in registry.names(kind):
        assert getattr(registry.component(kind, name), registry.WORDS_OF[kind]) <= WORDS.keys()


@pytest.mark.parametrize(
    "members, message",
    [
        ({"makes": frozenset({"secuence"})}, "space 'odd': capability 'secuence' is unknown. Did you mean 'sequence'?"),
        ({}, "space 'odd': odd:Odd states no 'makes'"),
    ],
)
def test_unknown_words_are_refused_when_a_component_is_loaded(monkeypatch, members, message):
    module = types.ModuleType("odd")
    module.Odd = type("Odd", (), members)
    monkeypatch.setitem(sys.modules, "odd", module)
    monkeypatch.setattr(registry, "COMPONENTS", copy.deepcopy(registry.COMPONENTS))
    monkeypatch.setenv(registry.ENVIRONMENT, "")
    registry.register("space", "odd", "odd:Odd")
    with pytest.raises(UserError) as refusal:
        registry.component("space", "odd")
    assert message in str(refusal.value)


def test_examples_have_the_shapes_of_their_words():
    assert Example.of(RECURRENT, 4, 5, 2, 7) == Example((7, 2, 4), (7, 2, 5))
    image = Example.of({"image"}, 4, 5, 2, 8)
    assert image == Example((2, 3, 8, 8), (2, 5)) and image.draw(generator(0)).shape == image.inputs
    with pytest.raises(UserError, match="no example is known of encoder-decoder bodies"):
        Example.of({"encoder-decoder"}, 4, 5, 2, 8)
