"""Stand-alone trainings of proposals: budgets, and children that go on where their parents ended."""

import random

import pytest
import tiny
import torch

from lmnas.core import registry
from lmnas.core.contracts import Proposal, Strategy
from lmnas.core.errors import Unscored
from lmnas.core.events import read_events
from lmnas.core.genotype import Genotype
from lmnas.core.job import Job, read_result, read_spec
from lmnas.core.length import Length
from lmnas.core.seeds import rng
from lmnas.methods.estimators.standalone import Standalone
from lmnas.nn.training.settings import Optimizer, Training
from lmnas.runs.directory import Run
from lmnas.runs.experiment import Experiment
from lmnas.runs.progress import Display
from lmnas.runs.recipe import load_recipe
from lmnas.spaces.recurrent.cell import RecurrentCell

SPACE = RecurrentCell(n_nodes=2)
GENOTYPE, OTHER = (SPACE.sample(random.Random(seed)) for seed in (0, 1))


def estimator(task):
    training = Training(
        epochs=1,
        model={"width": 6, "dropout_output": 0.2},
        batches={"batch_size": 4, "bptt": 9},
        optimizer=Optimizer(learning_rate=2.0, momentum=0.5, patience=1),
        checkpoint_steps=3,
    )
    return Standalone(SPACE, task, 0, torch.device("cpu"), training=training)


def weights(directory):
    return (directory / "model.safetensors").read_bytes()


def test_a_child_continues_to_the_bits_of_a_training_that_was_never_cut(tiny_task, tmp_path):
    """One epoch, two, four; dropout, momentum, averaging and the carried state are all in it."""
    through = Job(tmp_path / "through")
    whole = estimator(tiny_task).estimate(Proposal(GENOTYPE, Length(4)), 3, through)
    parent = None
    for generation, epochs in enumerate((1, 2, 4)):
        job = Job(tmp_path / str(generation))
        proposal = Proposal(GENOTYPE, Length(epochs), None if parent is None else generation - 1, keep=True)
        score = estimator(tiny_task).estimate(proposal, 3, job, parent)
        parent = job.directory
    assert score == whole
    assert weights(parent) == weights(through.directory)
    assert [e["epoch"] for e in read_events(parent / "events.jsonl") if e["event"] == "epoch"] == [3, 4]


def test_budgets_have_units(tiny_task, tmp_path):
    score = estimator(tiny_task).estimate(Proposal(GENOTYPE, Length(5, "steps")), 0, Job(tmp_path))
    assert score.cost.steps == 5
    assert not (tmp_path / "kept.safetensors").exists()


def test_a_child_of_another_architecture_begins_with_the_weights_that_fit(tiny_task, tmp_path):
    estimator(tiny_task).estimate(Proposal(GENOTYPE, keep=True), 0, Job(tmp_path / "parent"))
    proposal = Proposal(OTHER, Length(1, "steps"), parent=0)
    inherited = estimator(tiny_task).estimate(proposal, 0, Job(tmp_path / "child"), tmp_path / "parent")
    alone = estimator(tiny_task).estimate(proposal, 0, Job(tmp_path / "alone"))
    assert inherited.value < alone.value  # one step from a trained embedding, or from noise


def test_a_parent_that_kept_nothing_gives_a_failed_trial(tiny_task, tmp_path):
    estimator(tiny_task).estimate(Proposal(GENOTYPE), 0, Job(tmp_path / "parent"))
    with pytest.raises(Unscored, match=r"its parent \(parent\) left no training state"):
        estimator(tiny_task).estimate(Proposal(GENOTYPE, parent=0), 0, Job(tmp_path / "child"), tmp_path / "parent")


class Hurdles(Strategy):
    """Evolution with hurdles: the better of two goes on for a second epoch, then its mutant inherits its weights."""

    def __init__(self, space, objective, seed):
        self.space, self.objective, self.seed = space, objective, seed
        self.asked, self.trials = 0, []

    def ask(self, n):
        proposals = [self._propose(self.asked + k) for k in range(min(n, 4 - self.asked))]
        self.asked += len(proposals)
        return proposals

    def _propose(self, k):
        draws = rng(self.seed, "proposal", k)
        if k < 2:
            return Proposal(self.space.sample(draws), Length(1), keep=True)
        number, genotype, _ = min(self.trials, key=lambda trial: self.objective.key(trial[2]))
        if k == 2:
            return Proposal(genotype, Length(2), parent=number, keep=True)
        return Proposal(self.space.mutate(genotype, draws), Length(1), parent=number)

    def tell(self, trials):
        self.trials += [(trial.number, trial.genotype, trial.value) for trial in trials]

    def state_dict(self):
        return {"asked": self.asked, "trials": [[n, g.to_dict(), v] for n, g, v in self.trials]}

    def load_state_dict(self, state):
        self.asked = state["asked"]
        self.trials = [(n, Genotype.from_dict(g), v) for n, g, v in state["trials"]]


def test_an_evolution_with_hurdles_is_one_class_and_one_line(tmp_path, cache, monkeypatch):
    strategies = {**registry.COMPONENTS["strategy"], "hurdles": f"{__name__}:Hurdles"}
    monkeypatch.setitem(registry.COMPONENTS, "strategy", strategies)
    (tmp_path / "text.txt").write_text(tiny.text(60))
    document = tiny.recipe(
        tmp_path / "text.txt",
        strategy={"name": "hurdles"},
        estimator={"name": "standalone", "training": tiny.training()},
        search={"seeds": 1, "candidates": 4, "batch": 1},
    )
    with Run(tmp_path / "run", load_recipe(document)) as run, Display(quiet=True) as display:
        experiment = Experiment(run, display)
        experiment.run_stages(("search",))
        trials = experiment.driver.record("search").trials()
    best = min((0, 1), key=lambda k: trials[k]["value"])
    assert [trial.get("parent") for trial in trials][:3] == [None, None, best]
    assert trials[2]["budget"] == {"amount": 2, "unit": "epochs"} and trials[2]["value"] <= trials[best]["value"]
    assert trials[2]["genotype"] == trials[best]["genotype"] and trials[3]["parent"] in (0, 1, 2)
    jobs = tmp_path / "run" / "jobs"
    assert read_spec(jobs / "search-0-trial-2")["parents"] == [f"search-0-trial-{best}"]
    assert all(read_result(jobs / f"search-0-trial-{k}")["status"] == "ok" for k in range(4))
