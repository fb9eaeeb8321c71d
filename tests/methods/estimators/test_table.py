"""Published trainings as scores: what the table says, and searches replayed on it."""

import json
import math
import os
import random
from pathlib import Path

import pytest
import tiny
import torch
from command_line import answer, write_recipe

from lmnas.cli.score import sampled
from lmnas.core.contracts import Proposal
from lmnas.core.errors import Unscored, UserError
from lmnas.core.genotype import Genotype
from lmnas.core.job import Job
from lmnas.methods.estimators.table import Table
from lmnas.spaces.recurrent.graph import RecurrentGraph
from lmnas.spaces.recurrent.layers import LSTM

CPU = torch.device("cpu")
PUBLISHED = Path(os.environ.get("LMNAS_DATA", "data")) / "nas-bench-nlp"
CELLS = [genotype for _, genotype in sampled("recurrent-graph", 12, 0)]


def losses(k):
    """Made up; every fourth cell never trained to an end."""
    return [None, None] if k % 4 == 3 else [4.0 + (7 * k % 12) / 10, 4.1 + (7 * k % 12) / 10]


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.jsonl"
    with open(path, "w") as file:
        for k, genotype in enumerate(CELLS):
            runs = [{"id": k, "test_loss": loss} for loss in losses(k)]
            entry = {"id": k, "group": str(k), "recipe": dict(genotype.choices), "ptb": {"runs": runs}}
            file.write(json.dumps(entry) + "\n")
    return path


def renamed(genotype):
    """The same cell, its nodes named otherwise."""
    names = {name: name.replace("node_", "n") for name in genotype.choices}
    return Genotype(
        genotype.space,
        {
            names[name]: {"op": node["op"], "input": [names.get(i, i) for i in node["input"]]}
            for name, node in genotype.choices.items()
        },
    )


def test_it_gives_the_mean_loss_as_perplexity(table, tiny_task, tmp_path):
    estimator = Table(RecurrentGraph(), tiny_task, 0, CPU, data=str(table))
    for k in (0, 1, 2):
        score = estimator.estimate(Proposal(renamed(CELLS[k])), 0, Job(tmp_path / str(k)))
        assert score.value == pytest.approx(math.exp(sum(losses(k)) / 2)) and score.split == "test"
    with pytest.raises(Unscored, match="none of the 2 published trainings of cell 3 came to an end"):
        estimator.estimate(Proposal(CELLS[3]), 0, Job(tmp_path / "3"))
    other = sampled("recurrent-graph", 1, 99)[0][1]
    with pytest.raises(Unscored, match=f"no cell {other.id}"):
        estimator.estimate(Proposal(other), 0, Job(tmp_path / "4"))


def test_what_does_not_fit_is_refused(table, tiny_task, tmp_path):
    with pytest.raises(UserError, match="takes graph bodies; space 'lstm' makes causal stateful sequence bodies"):
        Table(LSTM(), tiny_task, 0, CPU, data=str(table))
    with pytest.raises(UserError, match="nothing: cannot be read"):
        Table(RecurrentGraph(), tiny_task, 0, CPU, data="nothing")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"id": 1}\n')
    with pytest.raises(UserError, match="line 1: expected an entry"):
        Table(RecurrentGraph(), tiny_task, 0, CPU, data=str(broken))
    with pytest.raises(UserError, match="has 0 trained cells of this space, expected at least 2"):
        RecurrentGraph(members=str(write_none(tmp_path)))


def write_none(folder):
    path = folder / "none.jsonl"
    entry = {"id": 1, "group": "a", "recipe": dict(CELLS[0].choices), "ptb": {"runs": []}}
    path.write_text(json.dumps(entry) + "\n")
    return path


def test_a_space_of_members_proposes_them_alone(table):
    space = RecurrentGraph(members=str(table))
    draws = random.Random(0)
    ids = {space.sample(draws).id for _ in range(300)}
    assert ids == {cell.id for cell in CELLS}
    for cell in CELLS:
        mutants = {space.mutate(cell, draws).id for _ in range(200)}
        assert mutants < ids and cell.id not in mutants and len(mutants) == 10  # one of eleven others is too far


def test_a_search_replays_the_table(table, tmp_path, cache):
    """Every cell is found at its published value, those without one fail, and the best is chosen."""
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(150))
    path = write_recipe(
        tmp_path / "recipe.yaml",
        text,
        space={"name": "recurrent-graph", "members": str(table)},
        estimator={"name": "table", "data": str(table)},
        search={"seeds": 1, "candidates": 12, "batch": 5},
        select={"keep": 1, "epochs": 1, "seeds": 1},
        train={"seeds": 1, "training": tiny.training()},
        baselines={},
    )
    found = answer("search", path, "--run", tmp_path / "run")
    rows = [row for row in found["candidates"] if row["stage"] == "search"]
    values = {row["genotype_id"]: row["value"] for row in rows}
    for k, cell in enumerate(CELLS):
        if losses(k)[0] is None:
            assert values[cell.id] is None
        else:
            assert values[cell.id] == pytest.approx(math.exp(sum(losses(k)) / 2))
    assert all(row["is_proxy"] and row["split"] == "test" for row in rows if row["value"] is not None)
    best = min((k for k in range(12) if losses(k)[0]), key=lambda k: losses(k)[0])
    assert found["genotype"]["id"] == CELLS[best].id


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the NAS-Bench-NLP table is not in LMNAS_DATA")
def test_the_published_table(tiny_task, tmp_path):
    space = RecurrentGraph(members="nas-bench-nlp")
    estimator = Table(space, tiny_task, 0, CPU)
    found = []
    for member in space.members:
        try:
            found.append(estimator.loss(member))
        except Unscored:
            continue
    # 1,685 recipes have a loss, isomorphic ones among them
    assert 1400 < len(found) <= 1685 and min(found) == pytest.approx(4.4356, abs=0.2)
    sample = space.sample(random.Random(0))
    assert estimator.cells[sample.id].n_runs >= 1
