"""The training code against hand computations and PyTorch's own averaged SGD."""

import math

import pytest
import torch

from lmnas.errors import Diverged
from lmnas.files import pack, read_events, unpack
from lmnas.genotype import load_genotype
from lmnas.job import Job
from lmnas.jobs import build_model
from lmnas.protocols import Objective
from lmnas.train import NotFinite, Optimizer, Training, WeightTraining, fit, initialise, should_average

CPU = torch.device("cpu")
MINIMIZE = Objective("perplexity", "per word", "minimize")
MAXIMIZE = Objective("f1", "", "maximize")


def training(epochs=2, **optimizer) -> Training:
    return Training(
        epochs=epochs,
        model={"width": 8, "dropout_output": 0.2, "dropout_hidden": 0.2},
        batches={"batch_size": 8, "bptt": 8},
        optimizer=Optimizer(**{"learning_rate": 5.0, **optimizer}),
        checkpoint_steps=10,
    )


def model_of(task, settings, seed=0):
    return initialise(build_model(task, load_genotype("darts-v1"), settings), seed)


def test_non_monotonic_trigger_by_hand():
    """Worse than the best of all but the last five, and there must be such: v_t > min(v_1 .. v_{t-6})."""
    settings = Optimizer()
    history = [100.0, 90.0, 80.0, 79.0, 78.0, 77.0]
    assert not should_average(history[:5], 200.0, settings, MINIMIZE)
    assert not should_average(history, 99.0, settings, MINIMIZE)
    assert should_average(history, 101.0, settings, MINIMIZE)
    assert should_average([*history, 76.0], 91.0, settings, MINIMIZE)
    assert not should_average([*history, 76.0], 89.0, settings, MINIMIZE)
    assert not should_average(history, 101.0, Optimizer(averaging="none"), MINIMIZE)
    assert not should_average(history, 101.0, Optimizer(averaging_from=78.0), MINIMIZE)
    assert should_average([0.5, 0.6, 0.6, 0.6, 0.6, 0.6], 0.4, settings, MAXIMIZE)


def test_adam_by_hand_and_through_a_checkpoint(tiny_task):
    """Two steps of Kingma & Ba's algorithm 1 on the clipped gradient plus decay; a saved state goes on equally."""
    settings = training(method="adam", learning_rate=0.002, clip=0.05, weight_decay=0.01)
    weights = WeightTraining(model_of(tiny_task, settings), tiny_task, settings, 0, CPU)
    twin, moments = model_of(tiny_task, settings), {}
    carry, states = None, []
    for step in (1, 2):
        batch = weights.draw()
        batch.lr_scale = 1.0
        loss, carry = twin(batch, carry, weights.masks("weights", batch))
        twin.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in twin.parameters()))
        with torch.no_grad():
            for name, p in twin.named_parameters():
                g = p.grad * min(1.0, 0.05 / (norm + 1e-6)) + 0.01 * p
                m, v = moments.get(name, (0.0, 0.0))
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                moments[name] = m, v
                p -= 0.002 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        weights.update(batch)
        states.append(unpack(pack(weights.state_dict())))
    for name, p in weights.model.named_parameters():
        torch.testing.assert_close(p, twin.get_parameter(name), rtol=1e-4, atol=1e-6)
    again = WeightTraining(model_of(tiny_task, settings), tiny_task, settings, 0, CPU)
    again.load_state_dict(states[0])
    batch = again.draw()
    batch.lr_scale = 1.0
    again.update(batch)
    for name, p in weights.model.named_parameters():
        assert torch.equal(p, again.model.get_parameter(name))


def test_one_step_by_hand(tiny_task):
    """Gradient clipped to the global norm, decay added after, rate scaled by the segment's length."""
    settings = training(learning_rate=3.0, clip=0.05, weight_decay=0.01)
    weights = WeightTraining(model_of(tiny_task, settings), tiny_task, settings, 0, CPU)
    twin = model_of(tiny_task, settings)
    batch = weights.draw()
    batch.lr_scale = 0.5
    loss, _ = twin(batch, None, weights.masks("weights", batch))
    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in twin.parameters()))
    assert norm > 0.05, "clipping must be active"
    with torch.no_grad():
        for p in twin.parameters():
            p -= 1.5 * (p.grad * 0.05 / (norm + 1e-6) + 0.01 * p)
    assert weights.update(batch) == pytest.approx(loss.item())
    for ours, expected in zip(weights.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, expected)


def test_learning_rate_decay():
    """ENAS: 0.96 per epoch from epoch 15 on."""

    class Stream:
        epoch = 0

    weights = object.__new__(WeightTraining)
    weights.settings, weights.stream = Optimizer(learning_rate=20.0, decay=0.96, decay_from=15), Stream()
    rates = {}
    for epoch in (0, 14, 15, 17):
        weights.stream.epoch = epoch
        rates[epoch] = weights.learning_rate
    assert rates == pytest.approx({0: 20.0, 14: 20.0, 15: 19.2, 17: 20 * 0.96**3})


def test_averaging_against_torch_asgd(tiny_task, tmp_path, monkeypatch):
    """From the switch on validation reads the running mean of the weights: torch's ASGD(t0=0, lambd=0), whose average
    starts one step later and whose rate must be set by hand, since it computes it after each update."""
    monkeypatch.setattr("lmnas.train.should_average", lambda history, *_: len(history) == 0)
    settings = training(epochs=2, clip=None, learning_rate=0.5)
    evaluated = []
    real = tiny_task.evaluate

    def spy(model, split, *arguments, **keywords):
        evaluated.append({k: v.clone() for k, v in model.state_dict().items()})
        return real(model, split, *arguments, **keywords)

    monkeypatch.setattr(tiny_task, "evaluate", spy)
    fit(model_of(tiny_task, settings), tiny_task, settings, 0, Job(tmp_path), CPU)

    twin = WeightTraining(model_of(tiny_task, settings), tiny_task, settings, 0, CPU)
    while twin.stream.epoch < 1:
        twin.update(twin.draw())
    asgd = torch.optim.ASGD(twin.model.parameters(), lr=0.5, t0=0, lambd=0.0)
    first, n_steps = None, 0
    while twin.stream.epoch < 2:
        batch = twin.draw()
        asgd.zero_grad()
        loss, twin.stream.carry = twin.model(batch, twin.stream.carry, twin.masks("weights", batch))
        loss.backward()
        asgd.param_groups[0]["lr"] = 0.5 * batch.lr_scale
        for state in asgd.state.values():
            state["eta"].fill_(0.5 * batch.lr_scale)
        asgd.step()
        twin.steps += 1
        n_steps += 1
        first = first or {name: p.detach().clone() for name, p in twin.model.named_parameters()}
    for name, parameter in twin.model.named_parameters():
        expected = (first[name] + (n_steps - 1) * asgd.state[parameter]["ax"]) / n_steps
        torch.testing.assert_close(evaluated[1][name], expected, rtol=1e-4, atol=1e-5)
    assert read_events(tmp_path / "events.jsonl")[-1]["averaging"] is True


def test_fit_learns_and_keeps_the_best(tiny_task, tmp_path):
    """Far below the uniform guess, and the weights handed back are those of the best epoch."""
    settings = training(epochs=15, learning_rate=20.0)
    model = model_of(tiny_task, settings)
    result = fit(model, tiny_task, settings, 0, Job(tmp_path), CPU)
    curve = [e["valid"] for e in read_events(tmp_path / "events.jsonl") if e["event"] == "epoch"]
    assert result["value"] == min(curve) and result["epoch"] == curve.index(min(curve)) + 1
    assert result["value"] < 0.5 * len(tiny_task.vocabulary)
    again = tiny_task.evaluate(model, "valid", settings.batch_settings(tiny_task))
    assert again.value == pytest.approx(result["value"], rel=1e-6)


def test_same_seed_same_bits_other_seed_others(tiny_task, tmp_path):
    settings = training(epochs=1)
    results = []
    for number, seed in enumerate((0, 0, 1)):
        model = model_of(tiny_task, settings, seed)
        fit(model, tiny_task, settings, seed, Job(tmp_path / str(number)), CPU)
        results.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert results[0] == results[1] != results[2]


def test_hopeless_training_counts_as_diverged(tiny_task, tmp_path):
    """A loss that is always NaN ends after a few recoveries, with step and cause on record."""
    settings = training(learning_rate=1e38, clip=None)
    with pytest.raises(Diverged, match="not finite"):
        fit(model_of(tiny_task, settings), tiny_task, settings, 0, Job(tmp_path), CPU)
    events = [e for e in read_events(tmp_path / "events.jsonl") if e["event"] == "diverged"]
    assert len(events) == 4 and all(e["cause"] for e in events)


def test_no_update_from_a_gradient_that_is_not_finite(tiny_task):
    settings = training()
    weights = WeightTraining(model_of(tiny_task, settings), tiny_task, settings, 0, CPU)
    with torch.no_grad():
        weights.model.bias[3] = math.inf
    before = [p.detach().clone() for p in weights.model.parameters()]
    with pytest.raises(NotFinite):
        weights.update(weights.draw())
    assert all(torch.equal(a, b) for a, b in zip(before, weights.model.parameters(), strict=True))
