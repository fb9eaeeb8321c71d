"""Language modelling: batches, masks, penalties and the metric against hand computations."""

import itertools
import math

import pytest
import torch

from lmnas.core.errors import UserError
from lmnas.core.genotype import load_genotype
from lmnas.core.seeds import generator
from lmnas.nn.train import initialise
from lmnas.nn.training.settings import Training
from lmnas.runs.build import build_model
from lmnas.tasks.language_modeling import BatchSettings, LanguageModeling, ModelSettings, Segments, segment


def make(task, seed=0, **settings):
    training = Training(epochs=1, model={"width": 6, "init_range": 0.3, **settings}, batches={"batch_size": 4})
    return initialise(build_model(task, load_genotype("darts-v1"), training), seed)


def test_segments_cover_every_prediction_once():
    """Four columns of 25 tokens: 24 predictions each, in order, inputs one behind targets, last segment ragged."""
    stream = Segments(torch.arange(103, dtype=torch.int32), BatchSettings(batch_size=4, bptt=7), 0, "train")
    seen = []
    while stream.epoch == 0:
        batch = stream.next()
        assert torch.equal(batch.targets, batch.inputs + 1)
        assert batch.scale == len(batch.inputs) / 7
        seen.append(batch.targets)
    seen = torch.cat(seen)
    assert [len(seen), seen.shape[1]] == [24, 4]
    assert torch.equal(seen, torch.arange(25 * 4).view(4, 25).t()[1:])


def test_carry_is_reset_at_a_new_pass_only():
    stream = Segments(torch.arange(60, dtype=torch.int32), BatchSettings(batch_size=2, bptt=10), 0, "train")
    carries = []
    for _ in range(7):
        carries.append(stream.next().state)
        stream.keep("state")
    assert carries == [None, "state", "state", None, "state", "state", None]


def test_random_lengths():
    """Base 35 with probability 0.95 else 17.5, normal around it (deviation 5), between 5 and 55; replayed exactly."""
    settings = BatchSettings(batch_size=1, bptt=35, length_std=5, short_probability=0.05)
    stream = Segments(torch.zeros(400_000, dtype=torch.int32), settings, 0, "train")
    state, lengths = stream.state_dict(), [len(stream.next().inputs) for _ in range(8000)]
    assert min(lengths) >= 5 and max(lengths) <= 55
    assert sum(lengths) / len(lengths) == pytest.approx(0.95 * 34.5 + 0.05 * 17, abs=0.3)
    assert sum(length < 22 for length in lengths) / len(lengths) == pytest.approx(0.05, abs=0.015)
    stream.load_state_dict(state)
    assert [len(stream.next().inputs) for _ in range(100)] == lengths[:100]


@pytest.mark.parametrize(
    "batch_size,bptt,message", [(9, 50, "longer than the 10 predictions"), (60, 5, "two per stream")]
)
def test_segments_refuse_what_does_not_fit(batch_size, bptt, message):
    with pytest.raises(UserError, match=message):
        Segments(torch.zeros(100, dtype=torch.int32), BatchSettings(batch_size=batch_size, bptt=bptt), 0, "train")


def test_uniform_model_has_perplexity_of_the_vocabulary(tiny_task):
    """Logits that are all zero: every word has probability 1 / V, over exactly N - 1 predictions a stream."""
    model = make(tiny_task)
    with torch.no_grad():
        model.embedding.zero_()
    tokens = tiny_task.data()["tokens"]
    settings = BatchSettings(batch_size=4, eval_batch_size=3, test_batch_size=1)
    score = tiny_task.evaluate(model, "test", settings)
    assert score.value == pytest.approx(len(tiny_task.vocabulary), rel=1e-5)
    assert score.n_predictions == tokens["test"] - 1
    assert tiny_task.evaluate(model, "valid", settings).n_predictions == 3 * (tokens["valid"] // 3 - 1)


def test_perplexity_does_not_depend_on_segment_length(tiny_task):
    """State is carried: the whole split in one segment gives the same."""
    model = make(tiny_task)
    values = [
        tiny_task.evaluate(model, "valid", BatchSettings(batch_size=1, bptt=bptt, eval_batch_size=1)).value
        for bptt in (3, 35, 10**6)
    ]
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


def test_evaluation_against_a_loop_over_tokens(tiny_task):
    """Perplexity from probabilities computed one token at a time."""
    model = make(tiny_task)
    tokens = tiny_task.corpus.splits["test"][:40].long()
    state, nats = model.body.initial_state(1), 0.0
    with torch.no_grad():
        for current, following in itertools.pairwise(tokens):
            raw, state = model.body(model.embedding[current][None, None], state, {})
            logits = raw[0, 0] @ model.embedding.t() + model.bias
            nats -= logits.log_softmax(-1)[following].item()
    text = " ".join(tiny_task.vocabulary[i] for i in tokens.tolist()).replace("<eos>", "\n")
    assert model(segment(tokens[:, None]), {})[0].item() == pytest.approx(nats / 39, rel=1e-5)
    assert tiny_task.score_text(model, text).n_predictions >= 39


def test_penalties_by_hand(tiny_task):
    """AR: mean square of the dropped output. TAR: mean square of the raw output's steps. Neither unless asked."""
    model = make(tiny_task, ar=2.0, tar=3.0, dropout_output=0.5)
    batch = tiny_task.stream("train", BatchSettings(batch_size=4, bptt=6), 0).next()
    masks = model.draw_masks(batch, generator(1))
    plain, _ = model(batch, masks, penalised=False)
    penalised, _ = model(batch, masks)
    raw, _ = model.body(model.embedding[batch.inputs], model.body.initial_state(4), masks)
    expected = 2.0 * (raw * masks["output"]).square().mean() + 3.0 * (raw[1:] - raw[:-1]).square().mean()
    torch.testing.assert_close(penalised - plain, expected)


def test_masks(tiny_task):
    """Locked over time, whole words dropped, rates right on average, the same for the same generator."""
    rates = {f"dropout_{name}": 0.25 for name in ("embedding", "input", "x", "hidden", "output")}
    model = make(tiny_task, **rates)
    batch = segment(torch.zeros(6, 2000, dtype=torch.long))
    masks = model.draw_masks(batch, generator(0))
    assert {name: tuple(mask.shape) for name, mask in masks.items()} == {
        "embedding": (len(tiny_task.vocabulary), 1),
        **dict.fromkeys(("input", "output", "x", "hidden"), (2000, 6)),
    }
    for name in ("input", "output", "x", "hidden"):
        assert masks[name].unique().tolist() == pytest.approx([0.0, 4 / 3])
        assert (masks[name] == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    again = model.draw_masks(batch, generator(0))
    assert all(torch.equal(masks[name], again[name]) for name in masks)
    assert make(tiny_task).draw_masks(batch, generator(0)) == {}


def test_carry_is_detached(tiny_task):
    model = make(tiny_task)
    stream = tiny_task.stream("train", BatchSettings(batch_size=4, bptt=6), 0)
    state = model(stream.next(), {}).state
    assert not state.requires_grad


def test_character_level_counts_bits(tiny_text):
    task = LanguageModeling(data=str(tiny_text), level="char")
    model = make(task)
    with torch.no_grad():
        model.embedding.zero_()
    score = task.evaluate(model, "valid", BatchSettings(batch_size=4))
    assert task.objective.name == "bits" and score.value == pytest.approx(math.log2(len(task.vocabulary)), rel=1e-5)


def test_decoder_bias_is_optional(tiny_task):
    assert make(tiny_task, decoder_bias=False).bias is None
    assert ModelSettings(width=3).decoder_bias


def test_published_counts_of_ptb(shared_data):
    task = LanguageModeling(data="ptb")
    assert task.data()["tokens"] == {"train": 929_589, "valid": 73_760, "test": 82_430}
    assert len(task.vocabulary) == 10_000
