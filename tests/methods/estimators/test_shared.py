"""The shared estimator: what it leaves alone, and what it does about paths that explode."""

import pytest
import torch

from lmnas.core.contracts import Proposal
from lmnas.core.errors import Diverged, NotFinite
from lmnas.core.events import read_events
from lmnas.core.job import Job
from lmnas.core.seeds import rng
from lmnas.methods.estimators.shared import Shared
from lmnas.methods.strategies.random_search import RandomSearch
from lmnas.methods.strategies.reinforce import Reinforce
from lmnas.nn.training.settings import Optimizer, Training
from lmnas.nn.training.weights import WeightTraining
from lmnas.spaces.recurrent.cell import RecurrentCell

CPU = torch.device("cpu")


def estimator(task, epochs=1):
    training = Training(
        epochs=epochs,
        model={"width": 8},
        batches={"batch_size": 6, "bptt": 8},
        optimizer=Optimizer(learning_rate=5.0, averaging="none"),
        checkpoint_steps=5,
    )
    return Shared(RecurrentCell(n_nodes=3, batch_norm="none", none=False), task, 0, CPU, training=training)


def copies(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def test_rewards_leave_the_weights_and_training_leaves_the_policy(tiny_task, tmp_path, monkeypatch):
    """The controller's phase must not move a bit of the shared weights, the weights' phase none of the controller."""
    shared = estimator(tiny_task)
    policy = Reinforce(shared.space, tiny_task.objective, 0, rewards_per_round=6, rewards_per_update=2)
    seen = []
    reward = shared._reward

    def spy(*arguments):
        before = copies(shared.model.state_dict())
        controller = copies(policy.controller.state_dict())
        assert not seen or all(torch.equal(seen[-1][name], controller[name]) for name in controller)
        reward(*arguments)
        after = shared.model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        seen.append(copies(policy.controller.state_dict()))
        assert any(not torch.equal(controller[name], seen[-1][name]) for name in controller)

    monkeypatch.setattr(shared, "_reward", spy)
    start = copies(policy.controller.state_dict())
    update = WeightTraining.update

    def check(self, *arguments):
        if not seen:
            assert all(torch.equal(start[n], t) for n, t in policy.controller.state_dict().items())
        return update(self, *arguments)

    monkeypatch.setattr(WeightTraining, "update", check)
    shared.prepare(policy, Job(tmp_path))
    assert len(seen) == 3


def explode(monkeypatch, when):
    update = WeightTraining.update

    def poisoned(self, batch, choice=None):
        if when(self.steps):
            raise NotFinite("loss is not finite")
        return update(self, batch, choice)

    monkeypatch.setattr(WeightTraining, "update", poisoned)


def test_a_path_that_explodes_is_left_out(tiny_task, tmp_path, monkeypatch):
    """Its batch makes no update, the step and cause are on record, and training goes on without going back."""
    explode(monkeypatch, lambda step: step in (7, 8, 20))
    shared = estimator(tiny_task)
    shared.prepare(RandomSearch(shared.space, tiny_task.objective, 0), Job(tmp_path))
    events = read_events(tmp_path / "events.jsonl")
    assert [(e["step"], e["cause"]) for e in events if e["event"] == "skipped"] == [
        (step, "loss is not finite") for step in (7, 8, 20)
    ]
    assert not [e for e in events if e["event"] == "diverged"]


def test_a_supernet_that_only_explodes_diverges(tiny_task, tmp_path, monkeypatch):
    explode(monkeypatch, lambda step: step > 12)
    shared = estimator(tiny_task, epochs=3)
    with pytest.raises(Diverged, match="not finite"):
        shared.prepare(RandomSearch(shared.space, tiny_task.objective, 0), Job(tmp_path))


def test_estimates_are_the_paths_of_the_supernet(tiny_task, tmp_path):
    """A proxy score is the validation score of the stand-alone cell with the weights it inherits (no batch norm)."""
    shared = estimator(tiny_task)
    shared.prepare(RandomSearch(shared.space, tiny_task.objective, 0), Job(tmp_path))
    for k in range(5):
        genotype = shared.space.sample(rng(k))
        alone = shared.space.build(genotype, 8)
        alone.load_state_dict(shared.model.body.inherit(genotype))
        model = tiny_task.model(alone, shared.model.settings)
        outer = {name: t for name, t in shared.model.state_dict().items() if not name.startswith("body.")}
        model.load_state_dict({**outer, **{f"body.{name}": t for name, t in alone.state_dict().items()}})
        expected = tiny_task.evaluate(model, "valid", shared.batches)
        assert shared.estimate(Proposal(genotype), 0, Job(tmp_path)).value == expected.value
