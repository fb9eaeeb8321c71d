"""The training code against hand computations and PyTorch's own averaged SGD."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lmnas.core.checkpoints import pack, unpack
from lmnas.core.contracts import Batch, Loss, Model, Objective, Score, Stream
from lmnas.core.errors import Diverged, Interrupted, NotFinite, UserError
from lmnas.core.events import read_events
from lmnas.core.genotype import load_genotype
from lmnas.core.job import Job
from lmnas.core.seeds import generator
from lmnas.core.settings import checked, settings_model
from lmnas.nn.train import fit, initialise
from lmnas.nn.training.averaging import averaged_model, should_average
from lmnas.nn.training.settings import Optimizer, Training
from lmnas.nn.training.weights import WeightTraining
from lmnas.runs.build import build_model

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
    states = []
    for step in (1, 2):
        batch = replace(weights.draw(), scale=1.0)
        loss, _ = twin(batch, weights.masks("weights", batch))
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
    batch = replace(again.draw(), scale=1.0)
    again.update(batch)
    for name, p in weights.model.named_parameters():
        assert torch.equal(p, again.model.get_parameter(name))


def test_one_step_by_hand(tiny_task):
    """Gradient clipped to the global norm, decay added after, rate scaled by the segment's length."""
    settings = training(learning_rate=3.0, clip=0.05, weight_decay=0.01)
    weights = WeightTraining(model_of(tiny_task, settings), tiny_task, settings, 0, CPU)
    twin = model_of(tiny_task, settings)
    batch = replace(weights.draw(), scale=0.5)
    loss, _ = twin(batch, weights.masks("weights", batch))
    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in twin.parameters()))
    assert norm > 0.05, "clipping must be active"
    with torch.no_grad():
        for p in twin.parameters():
            p -= 1.5 * (p.grad * 0.05 / (norm + 1e-6) + 0.01 * p)
    assert weights.update(batch) == pytest.approx(loss.item())
    for ours, expected in zip(weights.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, expected)


def test_cosine_and_progress_are_of_the_batch_in_hand(tiny_task):
    """Every batch of an epoch, its last one too; a training that continues from a checkpoint has the same ones."""
    settings = training(epochs=4, learning_rate=1.0, schedule="cosine", learning_rate_min=0.2)
    weights = WeightTraining(model_of(tiny_task, settings), tiny_task, settings, 0, CPU)
    seen, saved = [], None
    while weights.stream.epoch < 4:
        epoch = weights.stream.epoch
        weights.draw()
        seen.append((epoch, weights.learning_rate, weights.progress))
        weights.skip()
        if len(seen) == 9:
            saved = unpack(pack(weights.state_dict()))
    rates = {0: 1.0, 1: 0.6 + 0.4 * math.sqrt(0.5), 2: 0.6, 3: 0.6 - 0.4 * math.sqrt(0.5)}
    for epoch, rate, progress in seen:
        assert rate == pytest.approx(rates[epoch]) and progress == epoch / 4
    again = WeightTraining(model_of(tiny_task, settings), tiny_task, settings, 0, CPU)
    again.load_state_dict(saved)
    for _, rate, progress in seen[9:]:
        again.draw()
        assert (again.progress, again.learning_rate) == (progress, rate)
        again.skip()


def test_a_batch_keeps_every_field_on_another_device():
    tensors = {name: torch.zeros(2) for name in ("inputs", "targets", "lengths")}
    nested = {"source": torch.zeros(2), "target": (torch.ones(1), [torch.ones(3)])}
    batch = Batch(**{**tensors, "inputs": nested}, n_targets=1, scale=0.5, state=(torch.zeros(2), None)).to("meta")
    moved = (batch.inputs["source"], *batch.inputs["target"][:1], batch.inputs["target"][1][0])
    for tensor in (*moved, batch.targets, batch.lengths, batch.state[0]):
        assert tensor.device.type == "meta"
    assert (batch.n_targets, batch.scale, batch.state[1]) == (1, 0.5, None)


@pytest.mark.parametrize(
    "optimizer, message",
    [
        ({"nesterov": True}, "nesterov is a form of SGD's momentum"),
        ({"nesterov": True, "momentum": 0.9, "method": "adam"}, "nesterov is of method 'muon' or 'sgd', which is not"),
        ({"schedule": "cosine", "decay": 0.9}, "decay is of schedule 'constant' or 'step-decay', which is not set"),
        ({"schedule": "cosine", "learning_rate": 0.1, "learning_rate_min": 0.2}, "above learning_rate 0.1"),
        (
            {"learning_rate_min": 0.1},
            "learning_rate_min is of schedule 'cosine' or 'warmup-stable-decay', which is not",
        ),
        ({"restart_epochs": 10}, "restart_epochs is of schedule 'cosine', which is not set"),
        ({"schedule": "cosin"}, "schedule 'cosin' is unknown. Did you mean 'cosine'"),
        ({"method": "adan"}, "optimizer 'adan' is unknown. Did you mean 'adam'"),
        ({"betas": [0.9, 0.95]}, "betas is of method 'adam' or 'adamw' or 'muon', which is not set"),
        ({"method": "adafactor", "momentum": 0.9}, "momentum is of method 'muon' or 'sgd', which is not set"),
        ({"method": "muon"}, "set a momentum above 0"),
        ({"schedule": "step-decay"}, "needs a decay below 1"),
        ({"schedule": "inverse-root"}, "set warmup_steps"),
        ({"warmup_steps": 3, "warmup_share": 0.1}, "leave one at 0"),
        ({"stable_share": 0.5}, "stable_share is of schedule 'warmup-stable-decay', which is not set"),
        ({"roles": {"gain": {"rate": 2.0}}}, "unknown setting. Did you mean 'gains'"),
        ({"schedule": "cosine", "restart_factor": 0}, "restart_factor"),
    ],
)
def test_rates_that_contradict_each_other_are_refused(optimizer, message):
    with pytest.raises(UserError, match=message) as refusal:
        checked(settings_model(Training), {"epochs": 1, "optimizer": optimizer}, "train.training")
    assert str(refusal.value).startswith("train.training.optimizer") and "\n" not in str(refusal.value)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_by_hand(tiny_task, nesterov):
    """v <- mu v + g, w <- w - rate v (Nesterov: g + mu v), g clipped and decayed; the velocity is mu v of before."""
    settings = training(learning_rate=0.5, momentum=0.9, nesterov=nesterov, clip=0.05, weight_decay=0.01)
    weights = WeightTraining(model_of(tiny_task, settings), tiny_task, settings, 0, CPU)
    twin, buffers = model_of(tiny_task, settings), {}
    assert not any(value.any() for value in weights.velocity().values())
    for _ in range(3):
        batch = replace(weights.draw(), scale=1.0)
        velocity = weights.velocity()
        loss, _ = twin(batch, weights.masks("weights", batch))
        twin.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in twin.parameters()))
        with torch.no_grad():
            for name, p in twin.named_parameters():
                g = p.grad * min(1.0, 0.05 / (norm + 1e-6)) + 0.01 * p
                if name in buffers:
                    torch.testing.assert_close(velocity[name], 0.9 * buffers[name])
                buffers[name] = 0.9 * buffers.get(name, 0.0) + g
                p -= 0.5 * (g + 0.9 * buffers[name] if nesterov else buffers[name])
        weights.update(batch)
    assert velocity.keys() == buffers.keys()
    for name, p in weights.model.named_parameters():
        torch.testing.assert_close(p, twin.get_parameter(name), rtol=1e-4, atol=1e-6)


def test_momentum_moves_what_has_a_gradient(tiny_task):
    """Weights off the sampled path stay where they are; their first gradient finds a buffer of zero."""
    settings = training(learning_rate=0.5, momentum=0.9, clip=None)
    weights = WeightTraining(model_of(tiny_task, settings), tiny_task, settings, 0, CPU)
    first, second = list(weights.model.parameters())[:2]
    batch = weights.draw()
    steps = [(first,), (first, second), (second,), (first, second)]
    expected = {p: (p.detach().clone(), torch.zeros_like(p)) for p in (first, second)}
    for moved in steps:
        weights.optimizer.zero_grad(set_to_none=True)
        for p in moved:
            p.grad = torch.ones_like(p)
            value, buffer = expected[p]
            buffer = 0.9 * buffer + 1.0
            expected[p] = value - 0.5 * batch.scale * buffer, buffer
        weights.apply(batch, Loss(torch.zeros(())))
    for p, (value, _) in expected.items():
        torch.testing.assert_close(p.detach(), value)


def test_no_velocity_without_momentum(tiny_task):
    for method in ("sgd", "adam"):
        settings = training(method=method, learning_rate=0.001)
        weights = WeightTraining(model_of(tiny_task, settings), tiny_task, settings, 0, CPU)
        weights.update(weights.draw())
        assert weights.velocity() == {}


def test_averaging_against_torch_asgd(tiny_task, tmp_path, monkeypatch):
    """From the switch on validation reads the running mean of the weights: torch's ASGD(t0=0, lambd=0), whose average
    starts one step later and whose rate must be set by hand, since it computes it after each update."""
    monkeypatch.setattr("lmnas.nn.training.averaging.should_average", lambda history, *_: len(history) == 0)
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
        loss, state = twin.model(batch, twin.masks("weights", batch))
        twin.stream.keep(state)
        loss.backward()
        asgd.param_groups[0]["lr"] = 0.5 * batch.scale
        for state in asgd.state.values():
            state["eta"].fill_(0.5 * batch.scale)
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


# ------------------------------------------------------------------------------- models with running statistics


class Colours:
    """A task of 3 x 4 x 4 images, made up as they are asked for: which channel is the brightest?"""

    objective = Objective("error", "%", "minimize")

    class Model(Model):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
            self.linear = nn.Linear(6, 3)
            self.modes = []

        def initialise(self, generator):
            for parameter in (self.conv.weight, self.linear.weight):
                nn.init.normal_(parameter, 0.0, 0.3, generator=generator)
            nn.init.zeros_(self.linear.bias)

        def forward(self, batch, masks, choice=None, penalised=True):
            self.modes.append(self.training)
            logits = self.linear(torch.relu(self.norm(self.conv(batch.inputs))).mean((2, 3)))
            return Loss(nn.functional.cross_entropy(logits, batch.targets))

    class Stream(Stream):
        steps_per_epoch = 7

        def __init__(self, seed):
            self.seed, self.step = seed, 0

        @property
        def epoch(self):
            return self.step // self.steps_per_epoch

        def next(self):
            inputs = 2 + torch.randn(8, 3, 4, 4, generator=generator(self.seed, "images", self.step))
            self.step += 1
            return Batch(inputs, inputs.mean((2, 3)).argmax(1), 8)

        def state_dict(self):
            return {"step": self.step}

        def load_state_dict(self, state):
            self.step = state["step"]

    def stream(self, split, settings, seed):
        return self.Stream(seed)

    def evaluate(self, model, split, settings, **keywords):
        """By running statistics."""
        was_training = model.training
        model.eval()
        with torch.no_grad():
            loss, _ = model(self.Stream(99).next(), {})
        model.train(was_training)
        return Score(loss.item(), split, 8)


@pytest.fixture
def colours(monkeypatch):
    monkeypatch.setattr(Training, "batch_settings", lambda *_: None)
    return Colours()


def colour_training(**optimizer):
    settings = {"learning_rate": 0.05, "momentum": 0.9, "nesterov": True, "schedule": "cosine", "averaging": "none"}
    return Training(epochs=4, optimizer=Optimizer(**{**settings, **optimizer}), checkpoint_steps=5)


def test_a_model_with_running_statistics_trains_and_continues_exactly(colours, tmp_path):
    """Updates in training mode, validation outside of it; stopped after any step and continued: the same bits, running
    statistics included."""
    model = initialise(Colours.Model(), 0).eval()
    whole = fit(model, colours, colour_training(), 0, Job(tmp_path / "whole"), CPU)
    assert model.modes == ([True] * 7 + [False]) * 4
    saved = load_file(tmp_path / "whole" / "model.safetensors")
    assert saved["norm.num_batches_tracked"] == 7 * whole["epoch"] and saved["norm.running_mean"].abs().min() > 0
    assert colours.evaluate(model, "valid", None).value == whole["value"]

    ticks = itertools.count()
    for _ in range(40):
        try:
            job = Job(tmp_path / "parts", stop=lambda: next(ticks) % 3 == 2)
            parts = fit(initialise(Colours.Model(), 0), colours, colour_training(), 0, job, CPU)
            break
        except Interrupted:
            continue
    assert next(ticks) > 27 and parts["value"] == whole["value"]
    found, expected = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("parts", "whole"))
    assert found == expected


def test_running_statistics_are_averaged_with_the_weights(colours, tmp_path, monkeypatch):
    """From the switch after the first epoch on: means over the later steps, of weights and statistics; counts are
    those of the model."""
    monkeypatch.setattr("lmnas.nn.training.averaging.should_average", lambda history, *_: len(history) == 0)
    evaluated = []
    monkeypatch.setattr(
        colours, "evaluate", lambda m, *_: evaluated.append(copy_state(m)) or Score(1.0 / len(evaluated), "valid", 8)
    )
    settings = colour_training(averaging="nonmonotonic")
    settings.epochs = 2
    fit(initialise(Colours.Model(), 0), colours, settings, 0, Job(tmp_path), CPU)

    twin, states = WeightTraining(initialise(Colours.Model(), 0), colours, settings, 0, CPU), []
    while twin.stream.epoch < 2:
        twin.update(twin.draw())
        states.append(copy_state(twin.model))
    for name, value in evaluated[1].items():
        if value.is_floating_point():
            torch.testing.assert_close(value, torch.stack([state[name] for state in states[7:]]).mean(0))
        else:
            assert value == states[-1][name] == 14


def copy_state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_an_average_is_a_copy(colours):
    model = initialise(Colours.Model(), 0)
    averaged = averaged_model(model)
    averaged.update_parameters(model)
    assert all(torch.equal(a, b) for a, b in zip(averaged.module.parameters(), model.parameters(), strict=True))
    before = copy_state(averaged)
    with torch.no_grad():
        model.conv.weight += 1
        model.norm.running_mean += 1
    assert all(torch.equal(before[name], value) for name, value in averaged.state_dict().items())
