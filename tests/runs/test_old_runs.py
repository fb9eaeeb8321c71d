"""Run directories made by version 0.1.0, finished and killed: they open, and go on to the numbers they would have had.

How they were made: tests/runs/old/make.py.
"""

import contextlib
import importlib
import json
import os
import tarfile
from pathlib import Path

import pytest
from killing import finished, forked
from scripts import load, script

import lmnas
from lmnas.cli.main import main
from lmnas.core.files import append_line
from lmnas.core.job import Job

make = load(Path(__file__).parent / "old" / "make.py")
same = script("same_results")
KILLED = [name for name, (_, job) in make.RUNS.items() if job]


@pytest.fixture
def unpacked(tmp_path, cache):
    """`unpacked(name)`: the folder of a run with its recipe, the text and the pictures."""
    for module in same.PRELOADED:  # the children inherit it
        importlib.import_module(module)

    def unpack(name):
        with tarfile.open(make.ARCHIVE) as archive:
            members = [member for member in archive.getmembers() if member.name.split("/")[0] == name]
            archive.extractall(tmp_path, members, filter="data")
        make.world(tmp_path / name)
        return tmp_path / name

    return unpack


def call(folder, *command):
    """The JSON answer of a command that runs in `folder`, in a child; loaded.txt tells which jobs found their state."""
    load_state = Job.load

    def load_and_tell(job):
        state = load_state(job)
        if state is not None:
            append_line(folder / "loaded.txt", job.name)
        return state

    def work():
        os.chdir(folder)
        Job.load = load_and_tell
        with open("answer.txt", "w") as file, contextlib.redirect_stdout(file):
            return main(command)

    assert finished(forked(work)) == 0
    (answer,) = (folder / "answer.txt").read_text().splitlines()
    return json.loads(answer)


def left(folder):
    """(what the undisturbed run of 0.1.0 left, what is there)."""
    expected = json.loads((folder / "outcome.json").read_text())
    (folder / "outcome.json").rename(folder / "outcome.txt")
    return expected, same.left_behind(folder)


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_run_continues_to_the_same_numbers(name, unpacked):
    folder = unpacked(name)
    job = make.RUNS[name][1]
    there = folder / ("small" if job == "compress" else "run") / "jobs" / job
    assert (there / "checkpoints").is_dir() and not (there / "result.json").exists()
    for command in make.commands(name):
        call(folder, *command)
    assert (folder / "loaded.txt").read_text() == f"{job}\n"  # from scratch it would come to the same numbers
    expected, found = left(folder)
    assert len(expected) > 10 and same.difference(expected, found) is None


def test_a_finished_run_is_reported_tested_loaded_and_left_as_it_is(unpacked):
    folder = unpacked("finished")
    assert not (folder / "run" / "report.html").exists()
    assert "jobs" not in call(folder, "report", "run", "--json")
    tested = call(folder, "test", "run", "--json")
    assert tested["reloaded"]["value"] == tested["reloaded"]["recorded"]
    assert "perplexity" in (folder / "run" / "report.html").read_text()
    call(folder, *make.commands("finished")[0])
    expected, found = left(folder)
    assert len(expected) > 10 and same.difference(expected, found) is None
    results = expected["run/results.json"]
    (value,) = [row["value"] for row in results["scores"] if row["model"] == "searched" and row["split"] == "test"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # the recipe names its text as the user did
        run = lmnas.load("run")
        assert run.genotype.id == results["genotype"]["id"]
        model = run.model()
    assert (
        model.task.evaluate(model.module, "test", run.recipe.train.training.batch_settings(model.task)).value == value
    )


def test_a_finished_compression_is_left_as_it_is(unpacked):
    folder = unpacked("compressed")
    answers = [call(folder, *make.COMPRESS) for _ in range(2)]
    assert same.difference(answers[0], answers[1]) is None
    expected, found = left(folder)
    assert same.difference(expected, found) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert lmnas.load("small").genotype.id == answers[0]["genotype"]["id"]
