"""The genotype: a frozen value with one id."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmnas.core.genotype import SHIPPED, Genotype, load_document, load_genotype, shipped_names
from lmnas.runs.build import covering_space

VALUES = st.one_of(st.integers(-5, 5), st.text(max_size=4), st.lists(st.integers(0, 3), max_size=3))
CHOICES = st.dictionaries(st.text(min_size=1, max_size=5), VALUES, max_size=6)


@given(CHOICES, st.randoms())
def test_the_order_of_keys_does_not_matter(choices, rng):
    items = list(choices.items())
    rng.shuffle(items)
    first, second = Genotype("toy", choices), Genotype("toy", dict(items))
    assert first == second and hash(first) == hash(second) and first.id == second.id
    assert first != Genotype("other", choices) and first.id != Genotype("other", choices).id


@given(CHOICES)
def test_round_trips(choices):
    genotype = Genotype("toy", choices)
    for again in (
        Genotype.from_dict(json.loads(json.dumps(genotype.to_dict()))),
        pickle.loads(pickle.dumps(genotype)),
        copy.deepcopy(genotype),
    ):
        assert again == genotype and again.choices == genotype.choices and again.id == genotype.id


def test_the_id_is_the_hash_of_the_canonical_text():
    # printf '{"choices":{"layers":1},"space":"lstm"}' | sha256sum
    assert Genotype("lstm", {"layers": 1}).canonical == '{"choices":{"layers":1},"space":"lstm"}'
    assert Genotype("lstm", {"layers": 1}).id == "8849b387ba8b" == load_genotype("lstm-1").id


def test_other_processes_give_the_same_id():
    code = "from lmnas.core.genotype import load_genotype; print(load_genotype('darts-v2').id, end='')"
    for seed in ("1", "2"):  # of Python's own hashing
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": seed})
        assert run.stdout == load_genotype("darts-v2").id


def test_it_is_frozen():
    given_choices = {"a": [1], "b": 2}
    genotype = Genotype("toy", given_choices)
    before = genotype.id
    given_choices["a"].append(3)
    given_choices["c"] = 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        genotype.space = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        genotype.choices["b"] = 5  # type: ignore[index]
    genotype.to_dict()["choices"]["b"] = 5
    assert genotype.choices == {"a": [1], "b": 2}
    assert Genotype.from_dict(genotype.to_dict()).id == before == genotype.id


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_genotypes_are_valid(name):
    genotype = load_genotype(name)
    space = covering_space(genotype)
    space.check(genotype)
    assert genotype == load_genotype(SHIPPED / f"{name}.json")
    assert load_document(name)["name"] == name and load_document(name)["source"]
    assert space.diagram(genotype).nodes


def test_shipped_ids_are_distinct():
    ids = {load_genotype(name).id for name in shipped_names()}
    assert len(ids) == len(shipped_names()) >= 10


def test_notes_beside_the_choices_are_no_part_of_the_value():
    document = load_document("darts-v2")
    assert Genotype.from_dict({**document, "source": "elsewhere", "note": 3}).id == load_genotype("darts-v2").id
