"""Newcomers that the contracts fit: a causal body without a state, and a sequence-to-sequence task with padding."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmnas.core.contracts import Batch, Body, Loss, Model, Objective, Score, Stream
from lmnas.core.job import Job
from lmnas.core.seeds import generator
from lmnas.nn.train import fit, initialise
from lmnas.nn.training.settings import Optimizer, Training
from lmnas.nn.training.weights import WeightTraining
from lmnas.tasks.language_modeling import BatchSettings, LanguageModel, ModelSettings

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------- a causal body without a state


class Attention(Body):
    """One causal layer of attention with learned positions: (T, B, H) -> (T, B, H)."""

    def __init__(self, width, longest=64):
        super().__init__(width)
        self.positions = nn.Parameter(torch.empty(longest, 1, width))
        self.maps = nn.Linear(width, 3 * width)

    def initialise(self, generator, init_range):
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -init_range, init_range, generator=generator)

    def forward(self, inputs, state, masks, choice=None):
        x = inputs + self.positions[: len(inputs)]
        q, k, v = self.maps(x).transpose(0, 1).chunk(3, dim=-1)
        return x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1), None


def test_a_body_without_a_state_is_a_language_model(tiny_task, tmp_path):
    """It trains, evaluates and never sees the future; nothing is carried from segment to segment."""
    settings = Training(
        epochs=2,
        model={"width": 8},
        batches={"batch_size": 8, "bptt": 8},
        optimizer=Optimizer(method="adamw", learning_rate=0.01, schedule="inverse-root", warmup_steps=4),
    )
    body = Attention(8, longest=1024 // 8 + 1)
    model = initialise(LanguageModel(body, len(tiny_task.vocabulary), ModelSettings(width=8)), 0)
    before = tiny_task.evaluate(model, "valid", settings.batch_settings(tiny_task)).value
    result = fit(model, tiny_task, settings, 0, Job(tmp_path), CPU)
    assert result["value"] < 0.9 * before
    stream = tiny_task.stream("train", BatchSettings(batch_size=8, bptt=8), 0)
    batch = stream.next()
    assert batch.state is None and model(batch, {}).state is None
    changed = batch.inputs.clone()
    changed[5:] = 0
    features = [model.features(each)[: 5 * 8] for each in (batch, replace(batch, inputs=changed))]
    torch.testing.assert_close(*features)


# ------------------------------------------------------------------------------ a task with source, target and padding

V, PAD, START = 6, 0, 1


class Reversal(Stream):
    """Sources of 2 to 5 symbols, padded; the target is the source backwards."""

    steps_per_epoch = 4

    def __init__(self, seed):
        self.seed, self.step = seed, 0

    @property
    def epoch(self):
        return self.step // self.steps_per_epoch

    def next(self):
        noise = generator(self.seed, "pairs", self.step)
        self.step += 1
        lengths = torch.randint(2, 6, (16,), generator=noise)
        source = torch.full((5, 16), PAD)
        target = torch.full((5, 16), PAD)
        for column, length in enumerate(lengths.tolist()):
            symbols = torch.randint(2, V, (length,), generator=noise)
            source[:length, column], target[:length, column] = symbols, symbols.flip(0)
        given = torch.cat([torch.full((1, 16), START), target[:-1]])
        inputs = {"source": source, "target": given}
        return Batch(inputs, target, n_targets=int(lengths.sum()), lengths=lengths)

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


class EncoderDecoder(Body):
    """Two recurrences; the decoder starts from the encoder's last state. Inputs are a pair of (T, B, H)."""

    def __init__(self, width):
        super().__init__(width)
        self.encoder, self.decoder = nn.GRU(width, width), nn.GRU(width, width)

    def initialise(self, generator, init_range):
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -init_range, init_range, generator=generator)

    def forward(self, inputs, state, masks, choice=None, lengths=None):
        packed = nn.utils.rnn.pack_padded_sequence(inputs["source"], lengths, enforce_sorted=False)
        return self.decoder(inputs["target"], self.encoder(packed)[1])[0], None


class Translator(Model):
    """Embedding -> body -> softmax; the loss is a mean over what is no padding."""

    def __init__(self, body):
        super().__init__()
        self.embedding = nn.Embedding(V, body.width)
        self.body = body
        self.head = nn.Linear(body.width, V)

    def initialise(self, generator):
        for parameter in (*self.embedding.parameters(), *self.head.parameters()):
            nn.init.uniform_(parameter, -0.5, 0.5, generator=generator)
        self.body.initialise(generator, 0.5)

    def forward(self, batch, masks, choice=None, penalised=True):
        inputs = {name: self.embedding(tokens) for name, tokens in batch.inputs.items()}
        features, _ = self.body(inputs, None, masks, choice, lengths=batch.lengths)
        logits, targets = self.head(features).flatten(0, 1), batch.targets.flatten()
        return Loss(F.cross_entropy(logits, targets, ignore_index=PAD, reduction="sum") / batch.n_targets)


class Translation:
    objective = Objective("loss", "nats", "minimize")

    def stream(self, split, settings, seed):
        return Reversal(seed)

    def evaluate(self, model, split, settings, **keywords):
        batch = Reversal(99).next()
        with torch.no_grad():
            return Score(model(batch, {}).value.item(), split, batch.n_targets)


@pytest.fixture
def translation(monkeypatch):
    monkeypatch.setattr(Training, "batch_settings", lambda *_: None)
    return Translation()


def learning(**length):
    return Training(**length, optimizer=Optimizer(method="adam", learning_rate=0.02, clip=1.0))


def test_padding_counts_nowhere(translation):
    """Loss and lengths are of real symbols: what stands behind a sequence's end changes nothing."""
    model, batch = initialise(Translator(EncoderDecoder(8)), 0), Reversal(0).next()
    assert batch.n_targets == int((batch.targets != PAD).sum()) < batch.targets.numel()
    source = batch.inputs["source"].clone()
    source[source == PAD] = 3
    changed = replace(batch, inputs={**batch.inputs, "source": source})
    torch.testing.assert_close(model(batch, {}).value, model(changed, {}).value)
    weights = WeightTraining(model, translation, learning(epochs=1), 0, CPU)
    drawn = [weights.draw() for _ in range(2)]
    assert weights.targets == sum(each.n_targets for each in drawn)


def test_it_learns(translation, tmp_path):
    model = initialise(Translator(EncoderDecoder(8)), 0)
    before = translation.evaluate(model, "valid", None).value
    result = fit(model, translation, learning(steps=60), 0, Job(tmp_path), CPU)
    assert result["steps"] == 60 and math.isfinite(before) and result["value"] < 0.75 * before


# ------------------------------------------------------------------------------------------------ lengths of training


def test_a_length_in_epochs_is_one_in_steps(translation, tmp_path):
    """Three passes of four steps are twelve steps; validation is due after every pass in both."""
    results = [
        fit(
            initialise(Translator(EncoderDecoder(8)), 0),
            translation,
            learning(**length),
            0,
            Job(tmp_path / str(number)),
            CPU,
        )
        for number, length in enumerate(({"epochs": 3}, {"steps": 12}))
    ]
    first, second = ({name: result[name] for name in ("value", "epoch", "steps")} for result in results)
    assert first == second and first["steps"] == 12


def test_tokens_are_real_ones(translation, tmp_path):
    stream, counts = Reversal(0), []
    while sum(counts) < 150:
        counts.append(stream.next().n_targets)
    settings = learning(tokens=150)
    result = fit(initialise(Translator(EncoderDecoder(8)), 0), translation, settings, 0, Job(tmp_path), CPU)
    assert result["steps"] == len(counts) < 4  # validated though no pass has ended


def test_validation_every_few_steps(translation, tmp_path):
    settings = replace(learning(steps=7), evaluate_steps=3)
    job = Job(tmp_path)
    seen = []
    job.events.emit = lambda event, **fields: seen.append((event, fields.get("step")))
    fit(initialise(Translator(EncoderDecoder(8)), 0), translation, settings, 0, job, CPU)
    assert seen == [("epoch", 3), ("epoch", 6), ("epoch", 7)]


def test_seconds_count_those_before(translation, tmp_path, monkeypatch):
    """A second a step; stopped after three of five, the continued training takes two more."""
    now = [0.0]
    monkeypatch.setattr("lmnas.core.job.time.monotonic", lambda: now[0])
    update = WeightTraining.update

    def ticking(self, batch, choice=None):
        now[0] += 1.0
        return update(self, batch, choice)

    monkeypatch.setattr(WeightTraining, "update", ticking)
    model = initialise(Translator(EncoderDecoder(8)), 0)
    with pytest.raises(BaseException) as stopped:
        fit(model, translation, learning(seconds=5.0), 0, Job(tmp_path, stop=lambda: now[0] >= 3), CPU)
    assert type(stopped.value).__name__ == "Interrupted"
    now[0] += 100.0  # nobody works meanwhile
    result = fit(model, translation, learning(seconds=5.0), 0, Job(tmp_path), CPU)
    assert result["steps"] == 5 and result["seconds"] == 5.0


def test_the_rate_follows_the_length(translation):
    """A cosine over eight steps, whatever a pass is; drop-path's progress as well."""
    optimizer = Optimizer(learning_rate=1.0, schedule="cosine")
    settings = Training(steps=8, optimizer=optimizer)
    weights = WeightTraining(initialise(Translator(EncoderDecoder(8)), 0), translation, settings, 0, CPU)
    rates, progress = [], []
    while not weights.over():
        weights.draw()
        rates.append(weights.learning_rate)
        progress.append(weights.progress)
        weights.skip()
    assert rates == pytest.approx([(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)])
    assert progress == [step / 8 for step in range(8)] and weights.share == 1.0


@pytest.mark.parametrize("length", [{}, {"epochs": 1, "steps": 5}])
def test_exactly_one_length(length):
    with pytest.raises(ValueError, match="expected exactly one length"):
        Training(**length)
