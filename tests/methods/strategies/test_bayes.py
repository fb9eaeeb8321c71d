"""BayesNAS: warm-up and joint training, updates, pruning for good, derivation, and an exact continuation."""

import math
from dataclasses import replace
from typing import get_args

import killing
import pytest
import tiny
import torch

from lmnas.core.checkpoints import pack, unpack
from lmnas.core.contracts import LearnStep, Objective
from lmnas.core.errors import Emptied, UserError
from lmnas.core.events import read_events
from lmnas.core.job import Job
from lmnas.core.settings import settings_model
from lmnas.methods.estimators.shared import Shared
from lmnas.methods.strategies.bayes import Bayes
from lmnas.nn.curvature import METHODS
from lmnas.nn.sparsity import priors as evidence
from lmnas.nn.training.settings import Optimizer, Training
from lmnas.nn.training.weights import WeightTraining
from lmnas.spaces.recurrent.cell import RecurrentCell
from lmnas.spaces.recurrent.sparse import RecurrentSparse

CPU = torch.device("cpu")
OBJECTIVE = Objective("perplexity", "per word", "minimize")


def space(n_nodes=2, **settings):
    return RecurrentCell(n_nodes=n_nodes, **{"batch_norm": "none", "none": False, **settings})


def bayes(n_nodes=2, seed=0, **settings):
    return Bayes(space(n_nodes), OBJECTIVE, seed, **settings)


def step(progress=1.0, gradient=0.0, curvature=1.0, number=0):
    """A joint step with the same gradient and curvature everywhere, or given tables (E, 4) of them."""

    def tables(value, like):
        return {
            name: torch.full_like(table, value) if isinstance(value, float) else value for name, table in like.items()
        }

    def refuse(*arguments):
        raise AssertionError("no further pass is needed")

    like = bayes(2).choice(0)
    return LearnStep(
        step=number,
        train_loss=refuse,
        valid_loss=refuse,
        weights={},
        learning_rate=1.0,
        weight_decay=0.0,
        clip=None,
        progress=progress,
        train_gradient=tables(gradient, like),
        curvature=lambda mixture, method, n: tables(curvature, mixture),
    )


# -------------------------------------------------------------------------------------------------------- the mixture


def test_all_switches_at_one_are_a_mean():
    """Weights of a node's incoming (edge, operation)s sum to one; `none` has weight zero."""
    strategy = Bayes(space(3, none=True), OBJECTIVE, 0)
    table = strategy.choice(0)["nodes"]
    assert table.shape == (6, 5) and (table[:, 0] == 0).all()
    for node, rows in ((1, slice(0, 1)), (2, slice(1, 3)), (3, slice(3, 6))):
        assert table[rows].sum().item() == pytest.approx(1.0)
        torch.testing.assert_close(table[rows, 1:], torch.full_like(table[rows, 1:], 1 / (4 * node)))


def test_tables_of_their_own_are_graphs_of_their_own():
    strategy = Bayes(space(2, input_activation="searched"), OBJECTIVE, 0)
    assert {name: table.shape for name, table in strategy.choice(0).items()} == {"input": (1, 4), "nodes": (3, 4)}
    assert strategy.choice(0)["input"].sum() == 1.0
    assert strategy.statistics()["switches"] == 16


# ------------------------------------------------------------------------------------------------------------ training


def test_switches_stand_still_in_the_warm_up():
    strategy = bayes(warm_up=0.5)
    strategy.learn(step(progress=0.5, gradient=3.0))
    assert (strategy.graphs["nodes"].values == 1).all()
    strategy.learn(step(progress=0.51, gradient=3.0))
    assert (strategy.graphs["nodes"].values < 1).all()


def test_a_step_of_the_switches_by_hand():
    """r <- soft(r - rate dE/dw * scale, rate lambda): before the first update the penalty is sum |r|. Node 2 has two
    edges of four operations: its scale is 1/8."""
    strategy = bayes(prior="independent", strength=0.02, learning_rate=0.5, longest_step=1.0, updates=1)
    strategy.learn(step(progress=0.6, gradient=0.4))
    values = strategy.graphs["nodes"].values
    assert values[0].tolist() == pytest.approx([1 - 0.5 * (0.4 / 4 + 0.02)] * 4)
    assert values[1:].flatten().tolist() == pytest.approx([1 - 0.5 * (0.4 / 8 + 0.02)] * 8)


def test_a_steep_loss_moves_a_switch_no_further_than_the_longest_step():
    strategy = bayes(prior="independent", strength=1e-9, learning_rate=5.0, longest_step=0.1)
    strategy.learn(step(progress=0.6, gradient=-1e6))
    assert strategy.graphs["nodes"].values.flatten().tolist() == pytest.approx([1.1] * 12)


def test_the_gradient_of_its_own_pass_is_that_of_the_update(tiny_task, tmp_path, monkeypatch):
    """`train_gradient` equals a second pass over the same batch, masks and carried state; the weights move as ever."""
    found = []

    class Checking(Bayes):
        def learn(self, step):
            if step.step in (0, 5):
                weights, mixture = kept.pop()
                leaves = {name: table.clone().requires_grad_() for name, table in mixture.items()}
                again = torch.autograd.grad(step.train_loss(weights, leaves), list(leaves.values()))
                found.append([a - b for a, b in zip(again, step.train_gradient.values(), strict=True)])
                assert again[0].abs().max() > 1e-6
            super().learn(step)

    update, kept = WeightTraining.update, []

    def spy(self, batch, choice=None):
        weights = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        kept[:] = [(weights, choice)]
        return update(self, batch, choice)

    monkeypatch.setattr(WeightTraining, "update", spy)
    shared = estimator(tiny_task)
    shared.prepare(Checking(shared.space, tiny_task.objective, 0), Job(tmp_path))
    assert len(found) == 2
    assert all(difference.abs().max() < 1e-7 for row in found for difference in row)


def estimator(task, epochs=1, **model):
    training = Training(
        epochs=epochs,
        model={"width": 8, "dropout_output": 0.2, "dropout_x": 0.2, **model},
        batches={"batch_size": 6, "bptt": 8},
        optimizer=Optimizer(learning_rate=5.0, averaging="none"),
        checkpoint_steps=5,
    )
    return Shared(space(3), task, 0, CPU, training=training)


def test_one_pass_on_a_small_text(tiny_task, tmp_path):
    """Updates come where they are due, the weights learn, switches move and are pruned, and one cell is proposed."""
    shared = estimator(tiny_task, epochs=2)
    strategy = Bayes(shared.space, tiny_task.objective, 0, strength=6e-4, updates=3, warm_up=0.2, learning_rate=40.0)
    shared.prepare(strategy, Job(tmp_path))
    progress = [note["progress"] for note in strategy.history]
    assert progress[-1] == 1.0 and len(progress) == 3
    assert progress == pytest.approx([0.2 + 0.8 / 3, 0.2 + 1.6 / 3, 1.0], abs=0.02)
    for note in strategy.history:
        before, after = note["tables"]["nodes"]["objective"]
        assert after < before and math.isfinite(after)
    losses = [event["train_loss"] for event in read_events(tmp_path / "events.jsonl")]
    assert losses[1] < losses[0]
    values = strategy.graphs["nodes"].values
    assert (values != 1).all() and values.isfinite().all()
    alive = strategy.statistics()["alive"]
    assert 0 < alive < 24 and min(note["alive"] for note in strategy.history) == alive
    (proposal,) = strategy.ask(3)
    shared.space.check(proposal.genotype)
    assert strategy.ask(1) == []
    assert len(strategy.survivors()["nodes"]) == alive


def test_the_warm_up_trains_weights_alone(tiny_task, tmp_path):
    shared = estimator(tiny_task)
    seen = []

    class Watching(Bayes):
        def learn(self, step):
            super().learn(step)
            seen.append((step.progress, self.graphs["nodes"].values.detach().clone()))

    before = [p.detach().clone() for p in shared.model.parameters()]
    shared.prepare(Watching(shared.space, tiny_task.objective, 0, warm_up=0.3), Job(tmp_path))
    assert all((values == 1).all() == (progress <= 0.3) for progress, values in seen)
    assert all(not torch.equal(old, new) for old, new in zip(before, shared.model.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------- updates and pruning


def test_an_update_is_that_of_evidence():
    """gamma of independent switches: the limit of w^2 / 2 + sqrt(w^4 / 4 + w^2 / h) with h = H scale^2 / lambda."""
    strategy = bayes(prior="independent", strength=0.01, updates=1, iterations=300, learning_rate=1e-9)
    curvature = torch.arange(1.0, 13.0).view(3, 4)
    strategy.learn(step(curvature=curvature))
    graph = strategy.graphs["nodes"]
    h = curvature.double() * graph.scale.double() ** 2 / 0.01
    torch.testing.assert_close(graph.gamma, 0.5 + (0.25 + 1 / h).sqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(graph.rows(graph.h), h)
    assert graph.alive.all()


def test_negative_curvature_counts_as_none():
    strategy = bayes(updates=1)
    strategy.learn(step(curvature=-3.0))
    assert (strategy.graphs["nodes"].h == 0).all() and strategy.graphs["nodes"].gamma.isfinite().all()


def small(strategy, rows, columns=slice(None)):
    strategy.graphs["nodes"].values[rows, columns] = 1e-3


def test_dead_switches_stay_dead():
    """Through later steps and later updates; their variance no longer feeds a node."""
    strategy = bayes(updates=2, warm_up=0.0, prior="independent", learning_rate=1e-6)
    small(strategy, 1, 2)
    strategy.learn(step(progress=0.5, curvature=1e5))
    graph = strategy.graphs["nodes"]
    assert graph.alive.flatten().tolist() == [i != 6 for i in range(12)]
    died_with = graph.gamma[1, 2].item()
    assert 0 < died_with <= evidence.THRESHOLD
    for progress in (0.6, 0.7, 1.0):
        strategy.learn(step(progress=progress, gradient=-50.0, curvature=1e5))
        assert graph.values[1, 2] == 0 and strategy.choice(0)["nodes"][1, 2] == 0
    assert len(strategy.history) == 2 and not graph.alive[1, 2]
    assert graph.gamma[1, 2].item() == died_with
    assert graph.s[6] == evidence.LOWEST


def test_a_switch_at_zero_is_pruned_whatever_its_variance():
    strategy = bayes(updates=1, warm_up=0.0, iterations=1)
    strategy.graphs["nodes"].values[0, 1] = 0.0
    strategy.learn(step(curvature=1e-3))
    graph = strategy.graphs["nodes"]
    assert graph.gamma[0, 1] > evidence.THRESHOLD and not graph.alive[0, 1]
    assert graph.alive.sum() == 11


def test_what_hangs_from_a_dead_node_dies_with_it():
    strategy = bayes(updates=1, prior="independent", learning_rate=1e-9)
    small(strategy, 0)  # node 1
    strategy.learn(step(curvature=1e5))
    assert strategy.graphs["nodes"].alive.any(1).tolist() == [False, True, False]
    assert {(s["node"], s["input"]) for s in strategy.survivors()["nodes"]} == {(2, 0)}


def test_when_everything_dies_the_message_says_what_to_change():
    """A slope of 40 by the mixture is 10 by a switch of node 1 (scale 1/4); its first average is 5 % of it, 0.5.
    A lambda of nine tenths of that is suggested, but a tenth of the old one at least and a half at most."""
    for strength, suggested in ((3.0, "0.45"), (0.6, "0.3"), (30.0, "3")):
        strategy = bayes(updates=1, strength=strength, prior="independent", learning_rate=10.0)
        strategy.graphs["nodes"].values[:] = 0.0
        strategy.longest_step = 1e-9
        expected = (
            rf"died at update 1: strategy.strength {strength:g} .* largest slope by one is 0.5\); try {suggested}$"
        )
        with pytest.raises(Emptied, match=expected):
            strategy.learn(step(gradient=40.0, curvature=1e5))


def test_a_run_in_which_everything_dies_ends_with_that_message(tiny_text, tmp_path):
    document = tiny.recipe(
        tiny_text,
        space={"name": "recurrent-cell", "n_nodes": 2, "batch_norm": "none"},
        strategy={"name": "bayes", "strength": 50.0, "learning_rate": 1.0},
    )
    for _ in range(2):  # and says it again
        with pytest.raises(UserError, match=r"every candidate failed \(every switch died at .*; try [0-9.e-]+\)$"):
            killing.go(tmp_path / "run", document, ("search",))


# ------------------------------------------------------------------------------------------------------------ deriving


def test_a_node_takes_the_largest_variance_then_the_largest_influence():
    strategy = bayes()
    graph = strategy.graphs["nodes"]
    graph.gamma[0, 3] = 5.0
    graph.h[:] = 1.0
    graph.values[2, 1] = 1.5  # gamma 1 as all of node 2's
    genotype = strategy.derived()
    assert [genotype.choices[f"node_{i}.{what}"] for i in (1, 2) for what in ("input", "activation")] == [
        0,
        "identity",
        1,
        "relu",
    ]


def test_the_ranking_by_influence():
    strategy = bayes(ranking="influence")
    graph = strategy.graphs["nodes"]
    graph.gamma[0, 3] = 5.0
    graph.h[:] = 1.0
    graph.h[1] = 2.0
    genotype = strategy.derived()
    assert (genotype.choices["node_1.input"], genotype.choices["node_1.activation"]) == (0, "relu")


def test_a_dead_node_is_neither_read_nor_left_without_an_input():
    """Node 1 died: node 2 reads node 0, however large the variances out of node 1; node 1 has its steepest switch."""
    strategy = bayes()
    graph = strategy.graphs["nodes"]
    graph.alive[0] = graph.alive[2] = False
    graph.slope[0] = torch.tensor([0.01, 0.02, -0.03, 0.01])
    graph.gamma[2] = 9.0
    graph.gamma[1, 1] = 2.0
    genotype = strategy.derived()
    assert (genotype.choices["node_1.input"], genotype.choices["node_1.activation"]) == (0, "sigmoid")
    assert (genotype.choices["node_2.input"], genotype.choices["node_2.activation"]) == (0, "relu")


def test_a_space_that_keeps_all_survivors_gets_them():
    """Two operations on one edge, a node that died, and nothing that hangs from it."""
    strategy = Bayes(RecurrentSparse(n_nodes=3), OBJECTIVE, 0)
    graph = strategy.graphs["nodes"]
    graph.alive[:] = False
    for row, k in ((0, 0), (0, 3), (3, 1), (4, 2)):  # 1 <- 0 twice, 3 <- 0, 3 <- 1; node 2 is dead
        graph.alive[row, k] = True
    genotype = strategy.ask(1)[0].genotype
    assert dict(genotype.choices) == {
        "node_0.activation": "tanh",
        "node_1.inputs": ["0:tanh", "0:identity"],
        "node_2.inputs": [],
        "node_3.inputs": ["0:relu", "1:sigmoid"],
    }


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_it_cannot_judge_is_refused():
    for settings, message in (
        ({"batch_norm": "nodes"}, "space.batch_norm 'nodes': expected 'none'"),
        ({"output": "loose-ends"}, "space.output 'loose-ends': expected 'all-nodes'"),
    ):
        with pytest.raises(UserError, match=message):
            Bayes(space(2, **settings), OBJECTIVE, 0)


def test_every_curvature_may_be_named():
    annotation = settings_model(Bayes).model_fields["curvature"].annotation
    assert set(get_args(annotation)) == set(METHODS)


def test_an_estimator_without_curvature_is_refused():
    strategy = bayes(updates=1)
    with pytest.raises(UserError, match="curvature"):
        strategy.learn(replace(step(), curvature=None))


# ------------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("prior", sorted(evidence.PRIORS))
def test_it_continues_from_the_middle_of_an_interval(prior):
    """Between two updates: values, variances, the frozen penalty and what is dead."""

    def make():
        return bayes(updates=2, warm_up=0.1, prior=prior, learning_rate=0.5, strength=0.05, curvature_batches=1)

    def learn(strategy, number):
        noise = torch.Generator().manual_seed(number)
        strategy.learn(
            step(
                progress=(number + 1) / 10,
                gradient=torch.randn(3, 4, generator=noise),
                curvature=torch.rand(3, 4, generator=noise) * 1e4,
                number=number,
            )
        )

    strategy, continued = make(), make()
    for number in range(7):
        learn(strategy, number)
    assert len(strategy.history) == 1
    continued.load_state_dict(unpack(pack(strategy.state_dict())))
    for number in range(7, 10):
        learn(strategy, number), learn(continued, number)
    assert len(strategy.history) == 2
    assert pack(strategy.state_dict()) == pack(continued.state_dict())
    assert strategy.ask(1) == continued.ask(1)
