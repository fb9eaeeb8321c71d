"""Several trainings as one program: each equals its solo run."""

import pytest
import torch
from safetensors.torch import load_file

from lmnas.core.errors import Diverged, Interrupted
from lmnas.core.files import read_events
from lmnas.core.genotype import load_genotype
from lmnas.core.job import Job
from lmnas.core.seeds import rng
from lmnas.nn.train import Optimizer, Training, WeightTraining, _update_many, fit, fit_many, initialise
from lmnas.runs.jobs import build_model
from lmnas.spaces.recurrent.cell import RecurrentCell

SEEDS = (3, 4, 5)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu])])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return torch.device(request.param)


def training(epochs=2, batches=(), **optimizer):
    return Training(
        epochs=epochs,
        model={
            "width": 8,
            "dropout_output": 0.2,
            "dropout_hidden": 0.2,
            "dropout_x": 0.1,
            "dropout_embedding": 0.1,
            "dropout_input": 0.1,
            "ar": 0.5,
            "tar": 0.5,
        },
        # lengths from 5 to 29: every seed draws its own
        batches={"batch_size": 8, "bptt": 9, "length_std": 3.0, "short_probability": 0.2, **dict(batches)},
        optimizer=Optimizer(**{"learning_rate": 2.0, "weight_decay": 1e-4, "momentum": 0.5, **optimizer}),
        checkpoint_steps=10,
    )


def models_of(task, settings, device, genotypes=None):
    genotypes = genotypes or [load_genotype("darts-v1")] * len(SEEDS)
    return [
        initialise(build_model(task, genotype, settings), seed).to(device)
        for genotype, seed in zip(genotypes, SEEDS, strict=True)
    ]


def epochs(directory):
    return [
        {key: event[key] for key in ("epoch", "step", "train_loss", "valid", "averaging")}
        for event in read_events(directory / "events.jsonl")
        if event["event"] == "epoch"
    ]


def assert_same_curve(ours, alone, tolerance=1e-9):
    assert len(ours) == len(alone)
    for a, b in zip(ours, alone, strict=True):
        assert a == pytest.approx(b, rel=tolerance)


@pytest.mark.parametrize("programs", ["one", "each its own"])
def test_trajectories_equal_the_solo_runs(programs, tiny_task, device, float64):
    """25 steps: losses, weights, momentum, data cursors and carried states, segments of different lengths."""
    settings = training()
    space = RecurrentCell.covering(load_genotype("darts-v1"))
    genotypes = None if programs == "one" else [space.sample(rng(seed, "genotype")) for seed in SEEDS]
    together = [
        WeightTraining(model, tiny_task, settings, seed, device)
        for model, seed in zip(models_of(tiny_task, settings, device, genotypes), SEEDS, strict=True)
    ]
    alone = [
        WeightTraining(model, tiny_task, settings, seed, device)
        for model, seed in zip(models_of(tiny_task, settings, device, genotypes), SEEDS, strict=True)
    ]
    differing = 0
    for _ in range(25):
        batches = [weights.draw() for weights in together]
        differing += len({len(batch.inputs) for batch in batches}) > 1
        losses = _update_many(list(zip(together, batches, strict=True)))
        assert losses == pytest.approx([weights.update(weights.draw()) for weights in alone], rel=1e-9)
    assert differing > 10, "padding must have been at work"
    for ours, theirs in zip(together, alone, strict=True):
        for name, tensor in theirs.model.state_dict().items():
            torch.testing.assert_close(ours.model.state_dict()[name], tensor, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ours.stream.carry, theirs.stream.carry, rtol=1e-9, atol=1e-9)
        assert ours.stream.position == theirs.stream.position
        momenta, expected = ([state["momentum_buffer"] for state in w.optimizer.state.values()] for w in (ours, theirs))
        torch.testing.assert_close(momenta, expected, rtol=1e-9, atol=1e-9)


def test_whole_trainings_equal_fit(tiny_task, tmp_path, monkeypatch, device, float64):
    """Each with its own validation, its own switch to averaging and its own end; results and files as from `fit`."""
    # by the first validation score, so that the switch falls on another epoch for each seed
    first_scores = []

    def should_average(history, value, *_):
        first = round(history[0] if history else value, 6)
        if first not in first_scores:
            first_scores.append(first)
        return len(history) >= first_scores.index(first)

    monkeypatch.setattr("lmnas.nn.train.should_average", should_average)
    settings = training(epochs=3)
    alone = [
        fit(model, tiny_task, settings, seed, Job(tmp_path / f"alone-{seed}"), device)
        for model, seed in zip(models_of(tiny_task, settings, device), SEEDS, strict=True)
    ]
    jobs = [Job(tmp_path / f"many-{seed}") for seed in SEEDS]
    many = fit_many(models_of(tiny_task, settings, device), tiny_task, settings, SEEDS, jobs, device)
    for seed, ours, theirs in zip(SEEDS, many, alone, strict=True):
        for name in ("value", "n_predictions", "epoch", "steps", "n_parameters"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-9), name
        assert_same_curve(epochs(tmp_path / f"many-{seed}"), epochs(tmp_path / f"alone-{seed}"))
        saved, expected = (load_file(tmp_path / f"{k}-{seed}" / "model.safetensors") for k in ("many", "alone"))
        for name in expected:
            torch.testing.assert_close(saved[name], expected[name], rtol=1e-8, atol=1e-9)
    assert len({result["steps"] for result in many}) > 1, "trainings must end at different steps"
    switches = {tuple(event["averaging"] for event in epochs(tmp_path / f"many-{seed}")) for seed in SEEDS}
    assert len(switches) == 3


def test_one_that_is_lost_leaves_the_others(tiny_task, tmp_path, float64):
    """NaN in one training: it recovers, at last diverges, and the others end as if alone."""
    settings = training(epochs=1)
    device = torch.device("cpu")

    class Sick(type(models_of(tiny_task, settings, device)[0])):
        def _loss(self, raw, batch, masks, penalised):
            loss = super()._loss(raw, batch, masks, penalised)
            return loss * torch.nan if self.sick else loss

    models = models_of(tiny_task, settings, device)
    for number, model in enumerate(models):
        model.__class__ = Sick
        model.sick = number == 1
    jobs = [Job(tmp_path / f"many-{seed}") for seed in SEEDS]
    many = fit_many(models, tiny_task, settings, SEEDS, jobs, device)
    assert isinstance(many[1], Diverged) and "loss is not finite (after 3 recoveries)" in str(many[1])
    for number in (0, 2):
        model = models_of(tiny_task, settings, device)[number]
        alone = fit(model, tiny_task, settings, SEEDS[number], Job(tmp_path / f"alone-{number}"), device)
        assert many[number]["value"] == pytest.approx(alone["value"], rel=1e-9)


def test_stopped_and_continued(tiny_task, tmp_path, float64):
    """A stop is heard by all; each continues from its own checkpoint, in this way or alone."""
    settings = training(epochs=2)
    device = torch.device("cpu")
    expected = [
        fit(model, tiny_task, settings, seed, Job(tmp_path / f"alone-{seed}"), device)["value"]
        for model, seed in zip(models_of(tiny_task, settings, device), SEEDS, strict=True)
    ]
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > 50  # in the middle of a round

    jobs = [Job(tmp_path / str(seed), stop=stop) for seed in SEEDS]
    with pytest.raises(Interrupted):
        fit_many(models_of(tiny_task, settings, device), tiny_task, settings, SEEDS, jobs, device)
    first, *others = models_of(tiny_task, settings, device)
    values = [fit(first, tiny_task, settings, SEEDS[0], Job(tmp_path / str(SEEDS[0])), device)["value"]]
    jobs = [Job(tmp_path / str(seed)) for seed in SEEDS[1:]]
    values += [r["value"] for r in fit_many(others, tiny_task, settings, SEEDS[1:], jobs, device)]
    assert values == pytest.approx(expected, rel=1e-9)


def test_bodies_that_cannot_run_together(tiny_task, tmp_path):
    """The LSTM baseline: one after the other, to the bit."""
    settings = training(epochs=1)
    device = torch.device("cpu")
    genotypes = [load_genotype("lstm-1")] * len(SEEDS)
    alone = [
        fit(model, tiny_task, settings, seed, Job(tmp_path / f"alone-{seed}"), device)["value"]
        for model, seed in zip(models_of(tiny_task, settings, device, genotypes), SEEDS, strict=True)
    ]
    jobs = [Job(tmp_path / f"many-{seed}") for seed in SEEDS]
    models = models_of(tiny_task, settings, device, genotypes)
    assert [r["value"] for r in fit_many(models, tiny_task, settings, SEEDS, jobs, device)] == alone
