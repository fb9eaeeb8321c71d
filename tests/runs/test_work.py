"""Doing jobs: kinds and specs, what is done once, and what is refused."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import tiny

from lmnas.core import registry
from lmnas.core.errors import UserError
from lmnas.runs.job_kinds.estimate import Estimate
from lmnas.runs.job_kinds.fit import Fit
from lmnas.runs.job_kinds.test import Test as TestKind
from lmnas.runs.recipe import load_recipe
from lmnas.runs.work import JobKind, Workplace, job_kind


@dataclass(frozen=True)
class Count(JobKind):
    """Counts how often it was done."""

    kind: ClassVar[str] = "count"
    times: list
    done: ClassVar[int] = 0

    def do(self, place, job):
        type(self).done += 1
        return {"seconds": 0.0, "times": self.times}


@pytest.fixture
def place(tmp_path, monkeypatch, cache):
    (tmp_path / "text.txt").write_text(tiny.text(60))
    (tmp_path / "recipe.yaml").write_text(json.dumps(tiny.recipe(tmp_path / "text.txt")))
    monkeypatch.setitem(registry.COMPONENTS, "job", {**registry.COMPONENTS["job"], "count": f"{__name__}:Count"})
    monkeypatch.setattr(Count, "done", 0)
    return Workplace(tmp_path, "cpu")


def test_specs_are_the_kind_and_its_arguments():
    spec = {"kind": "estimate", "search": 0, "genotypes": [{}], "prepared": None}
    assert Estimate(0, [{}], None).spec() == spec  # as version 0.1.0 wrote it
    assert job_kind(spec) == Estimate(0, [{}], None)
    longer = {**spec, "terms": [{"keep": True}], "parents": [None]}
    assert job_kind(longer).spec() == longer
    for name in registry.names("job"):
        assert registry.component("job", name).kind == name
    assert TestKind("train-searched-0").spec() == {"kind": "test", "fitted": "train-searched-0"}


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"kind": "fitt"}, "job 'fitt' is unknown. Did you mean 'fit'"),
        ({}, "job None is unknown"),
        ({"kind": "test"}, "job of kind 'test': .*fitted"),
        ({"kind": "test", "fitted": "x", "more": 1}, "job of kind 'test': .*more"),
    ],
)
def test_a_spec_that_is_none_is_refused(spec, message):
    with pytest.raises(UserError, match=message):
        job_kind(spec)


def test_a_finished_job_is_not_done_again(place):
    spec = Count([1, 2]).spec()
    assert place.do("once", spec) == place.do("once", spec) | {"status": "ok"}
    assert Count.done == 1


def test_a_finished_job_is_not_taken_for_another(place):
    place.do("once", Count([1]).spec())
    with pytest.raises(UserError, match=r"once: its times is \[1\], expected \[2\]; delete the folder"):
        place.do("once", Count([2]).spec())
    assert Count.done == 1


def test_a_job_without_its_data_is_refused_in_a_line(place):
    with pytest.raises(UserError, match="train-searched-0 to make it anew"):
        place.do("test-searched-0", TestKind("train-searched-0").spec())


def test_recipe_and_data_are_opened_once(place):
    assert place.opened is place.opened
    assert place.opened.recipe == load_recipe(str(place.run / "recipe.yaml"))
    genotype = place.opened.space.sample(__import__("random").Random(0)).to_dict()
    result = place.do("train-searched-0", Fit(genotype, 0, 1, {}).spec())
    assert result["status"] == "ok" and result["files"].keys() == {"model.safetensors"}
    assert place.do("test-searched-0", TestKind("train-searched-0").spec())["split"] == "test"
