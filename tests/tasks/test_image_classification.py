"""Image classification: batches against a plain loop over pixels, losses and metrics against hand computations."""

import math

import pytest
import tiny
import torch
import torch.nn.functional as F

from lmnas.core.checkpoints import pack
from lmnas.core.contracts import Batch, ImageBody
from lmnas.core.errors import UserError
from lmnas.core.genotype import load_genotype
from lmnas.core.job import Job
from lmnas.core.seeds import generator
from lmnas.nn.train import fit, initialise, n_parameters
from lmnas.nn.training.settings import Optimizer, Training
from lmnas.runs.build import build_model, matching_width
from lmnas.tasks.image_classification import (
    BatchSettings,
    ImageClassification,
    ImageClassifier,
    ModelSettings,
    augment,
    calibration,
    confusion,
    normalise,
)

MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])


@pytest.fixture(scope="module")
def task(tmp_path_factory, cache):
    """24 training, 9 validation and 9 test pictures of 8 x 8 pixels, three colours."""
    return ImageClassification(data=str(tiny.pictures(tmp_path_factory.mktemp("pictures"), n_train=8, n_valid=3)))


def make(task, seed=0, genotype="resnet-8", **settings):
    training = Training(epochs=1, model={"width": 2, **settings}, batches={"batch_size": 6})
    return initialise(build_model(task, load_genotype(genotype), training), seed)


# ----------------------------------------------------------------------------------------------------------- batches


def plainly(image, settings, down, right, mirrored, centre):
    """One augmented image, pixel by pixel: pad with nothing, crop, mirror, normalise, blank a square."""
    _, height, width = image.shape
    out = torch.zeros(3, height, width)
    for y in range(height):
        for x in range(width):
            source_y = y + down - settings.crop
            source_x = (width - 1 - x if mirrored else x) + right - settings.crop
            blank = False
            if centre is not None:
                top, left = centre[0] - settings.cutout // 2, centre[1] - settings.cutout // 2
                blank = top <= y < top + settings.cutout and left <= x < left + settings.cutout
            if 0 <= source_y < height and 0 <= source_x < width and not blank:
                out[:, y, x] = (image[:, source_y, source_x] / 255 - MEAN) / STD
    return out


@pytest.mark.parametrize(
    "settings",
    [
        BatchSettings(batch_size=1),
        BatchSettings(batch_size=1, crop=2, cutout=3),
        BatchSettings(batch_size=1, crop=0, flip=False, cutout=4),
        BatchSettings(batch_size=1, crop=3, flip=False),
    ],
)
def test_augmentation_is_that_of_a_loop_over_pixels(settings):
    images = torch.randint(256, (12, 3, 6, 7), generator=generator(0, "images"), dtype=torch.uint8)
    found = augment(images, MEAN, STD, settings, generator(0, "noise"))
    noise = generator(0, "noise")

    def draw(high):
        return torch.randint(high, (12, 1), generator=noise).flatten().tolist()

    down, right = draw(2 * settings.crop + 1), draw(2 * settings.crop + 1)
    mirrored = draw(2) if settings.flip else [0] * 12
    centres = list(zip(draw(6), draw(7), strict=True)) if settings.cutout else [None] * 12
    for i in range(12):
        expected = plainly(images[i].float(), settings, down[i], right[i], mirrored[i], centres[i])
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-5)
    assert not settings.flip or 0 < sum(mirrored) < 12
    assert found.shape == images.shape and len(set(down)) > (settings.crop > 0)


def test_nothing_to_do_is_normalisation_alone():
    images = torch.randint(256, (4, 3, 6, 6), dtype=torch.uint8)
    found = augment(images, MEAN, STD, BatchSettings(batch_size=1, crop=0, flip=False), generator(0))
    assert torch.equal(found, normalise(images, MEAN, STD))
    expected = (images / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_pass_shows_every_image_once_in_a_new_order(task):
    settings = BatchSettings(batch_size=6, crop=0, flip=False)
    stream = task.stream("train", settings, 0)
    known = {
        row.numpy().tobytes(): i
        for i, row in enumerate(normalise(task.images.split("train")[0], *task.images.statistics))
    }
    orders = []
    for epoch in range(2):
        batches = [stream.next() for _ in range(stream.steps_per_epoch)]
        assert stream.epoch == epoch + 1 and stream.steps_per_epoch == 4
        order = [known[row.numpy().tobytes()] for batch in batches for row in batch.inputs]
        labels = torch.cat([batch.targets for batch in batches])
        assert torch.equal(labels, task.images.split("train")[1][order])
        orders.append(order)
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(24)) and orders[0] != orders[1]


def test_splits_of_a_search_and_limits(task):
    assert len(task.stream("train", BatchSettings(batch_size=2), 0).images) == 24
    # half and half, as DARTS searches: the task's own validation images are among those held out
    half = BatchSettings(batch_size=2, n_valid=16, max_train_images=10)
    train, valid = (task.stream(split, half, 0) for split in ("train", "valid"))
    assert len(train.images) == 10 and len(valid.images) == 16
    everything = task.images.images["train"]
    assert torch.equal(train.images, everything[:10]) and torch.equal(valid.images, everything[-16:])
    limited = BatchSettings(batch_size=2, max_valid_images=4)
    assert len(task.stream("valid", limited, 0).images) == 4
    assert task.evaluate(make(task), "valid", limited).n_predictions == 4
    assert task.evaluate(make(task), "test", limited).n_predictions == 9


def test_validation_batches_are_augmented_on_demand_alone(task):
    plain = {row.numpy().tobytes() for row in normalise(task.images.split("valid")[0], *task.images.statistics)}
    for asked in (False, True):
        batch = task.stream("valid", BatchSettings(batch_size=9, crop=2, augment_valid=asked), 0).next()
        assert ({row.numpy().tobytes() for row in batch.inputs} == plain) is not asked


def test_too_large_a_batch_is_refused(task):
    with pytest.raises(UserError, match="batch_size 25: split 'train' has only 24 images"):
        task.stream("train", BatchSettings(batch_size=25), 0)


# ------------------------------------------------------------------------------------------------------------- model


class Toy(ImageBody):
    """A body whose features are the mean colours; it counts how it is called."""

    auxiliary_channels = 3

    def __init__(self):
        super().__init__(3)

    def initialise(self, generator, init_range):
        pass

    def draw_masks(self, batch_size, rates, generator):
        self.rates = rates
        return {}

    def maps(self, inputs, masks, choice=None):
        return inputs.mean((2, 3)), inputs


def test_the_loss_by_hand():
    """Smoothed cross-entropy of both heads: (1 - s) of the label's, s of the mean over classes."""
    settings = ModelSettings(width=3, auxiliary=0.4, label_smoothing=0.1)
    model = ImageClassifier(Toy(), 5, settings)
    model.initialise(generator(0, "init"))
    inputs = torch.randn(4, 3, 8, 8, generator=generator(0, "inputs"))
    batch = Batch(inputs, torch.tensor([0, 4, 2, 2]), 4)

    def smoothed(logits):
        log = logits.log_softmax(1)
        return -(0.9 * log[range(4), batch.targets] + 0.1 * log.mean(1)).mean()

    logits = inputs.mean((2, 3)) @ model.classifier.weight.t() + model.classifier.bias
    second = model.training_only(inputs)
    assert second.shape == (4, 5)
    loss, carry = model(batch, {})
    torch.testing.assert_close(loss, smoothed(logits) + 0.4 * smoothed(second))
    plain, _ = model(batch, {}, penalised=False)
    torch.testing.assert_close(plain, F.cross_entropy(logits, batch.targets))
    assert carry is None


def test_masks_and_the_rate_of_paths():
    model = ImageClassifier(Toy(), 5, ModelSettings(width=3, dropout=0.5, drop_path=0.3))
    batch = Batch(torch.randn(200, 3, 2, 2), torch.zeros(200, dtype=torch.long), 200)
    masks = model.draw_masks(batch, generator(0), 0.5)
    assert model.body.rates == {"path": 0.15}
    assert masks["features"].shape == (200, 3) and set(masks["features"].unique().tolist()) == {0.0, 2.0}
    expected = (batch.inputs.mean((2, 3)) * masks["features"]) @ model.classifier.weight.t() + model.classifier.bias
    torch.testing.assert_close(model.logits(batch.inputs, masks), expected)


def test_an_auxiliary_head_by_hand():
    """C -> 128 by 1x1, 128 -> 768 by 2x2, no biases, two batch norms, a linear layer; it is not counted."""
    model = ImageClassifier(Toy(), 10, ModelSettings(width=3, auxiliary=0.4))
    head = 3 * 128 + 2 * 128 + 128 * 768 * 4 + 2 * 768 + 768 * 10 + 10
    assert sum(p.numel() for p in model.training_only.parameters()) == head
    assert n_parameters(model) == 3 * 10 + 10
    maps = torch.rand(2, 3, 8, 8, generator=generator(0))
    model.training_only.initialise(generator(0))
    # windows of 5 x 5 at 0 and 3
    windows = [[maps[:, :, y : y + 5, x : x + 5].mean((2, 3)) for x in (0, 3)] for y in (0, 3)]
    pooled = torch.stack([torch.stack(row, -1) for row in windows], -2)
    aux = model.training_only.eval()
    inner = F.relu(aux.norm_1(torch.einsum("oc,bcyx->boyx", aux.conv_1.weight[:, :, 0, 0], pooled)))
    last = F.relu(aux.norm_2(torch.einsum("ocyx,bcyx->bo", aux.conv_2.weight, inner)[:, :, None, None]))
    torch.testing.assert_close(aux(maps), aux.classifier(last[:, :, 0, 0]), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="a map of 7 x 8 pixels, it needs 8 x 8"):
        aux(torch.zeros(1, 3, 8, 7))


def test_matched_width_leaves_the_auxiliary_head_out(task):
    training = Training(epochs=1, model={"width": 8, "auxiliary": 0.4}, batches={"batch_size": 6})
    target = n_parameters(build_model(task, load_genotype("resnet-20"), training))
    assert matching_width(task, load_genotype("resnet-20"), training, target) == 8
    assert matching_width(task, load_genotype("resnet-8"), training, target) > 8


# ----------------------------------------------------------------------------------------------------------- metrics


def test_error_confusion_and_calibration_on_the_test_split(task):
    """Against a plain loop over images, one at a time (evaluation mode: the batch must not matter)."""
    model = make(task)
    stream = task.stream("train", BatchSettings(batch_size=6), 0)
    for _ in range(3):  # running statistics of their own
        model(stream.next(), {})
    score = task.evaluate(model, "test", BatchSettings(batch_size=6, eval_batch_size=4))
    images, labels = task.images.split("test")
    table = [[0] * 3 for _ in range(3)]
    model.eval()
    for image, label in zip(images, labels.tolist(), strict=True):
        logits = model.logits(normalise(image[None], *task.images.statistics), {})
        table[label][int(logits.argmax())] += 1
    wrong = sum(table[i][j] for i in range(3) for j in range(3) if i != j)
    assert score.value == pytest.approx(100 * wrong / 9) and score.n_predictions == 9
    assert score.details["confusion"] == table and score.details["classes"] == ["blue", "green", "red"]
    assert sum(count for count, _, _ in score.details["calibration"]["bins"]) == 9
    assert not task.evaluate(model, "valid", BatchSettings(batch_size=6)).details


def test_confusion_and_calibration_by_hand():
    """Confidences 0.9, 0.9, 0.9, 0.6 and 0.6; of the first three two are right, of the last two none."""

    def row(label, confidence):
        logits = torch.full((3,), math.log((1 - confidence) / 2))
        logits[label] = math.log(confidence)
        return logits

    logits = torch.stack([row(0, 0.9), row(1, 0.9), row(2, 0.9), row(0, 0.6), row(1, 0.6)])
    targets = torch.tensor([0, 1, 0, 2, 2])
    assert confusion(logits, targets).tolist() == [[1, 0, 1], [0, 1, 0], [1, 1, 0]]
    found = calibration(logits, targets)
    assert found["error"] == pytest.approx(3 / 5 * abs(0.9 - 2 / 3) + 2 / 5 * 0.6)
    filled = {i: entry for i, entry in enumerate(found["bins"]) if entry[0]}
    # 0.9 is in (13/15, 14/15], 0.6 = 9/15 in (8/15, 9/15] or, rounded up, in the next one
    assert sorted(filled)[-1] == 13 and filled[13] == [3, pytest.approx(0.9), pytest.approx(2 / 3)]
    assert sum(entry[0] for i, entry in filled.items() if i in (8, 9)) == 2


def test_a_model_that_is_not_finite_has_no_error_rate(task):
    model = make(task)
    with torch.no_grad():
        model.classifier.bias[0] = math.nan
    score = task.evaluate(model, "test", BatchSettings(batch_size=6))
    assert math.isnan(score.value) and not score.details


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_keeps_the_mode_and_the_running_statistics(task, training):
    model = make(task).train(training)
    before = pack(model.state_dict())
    task.evaluate(model, "valid", BatchSettings(batch_size=6))
    task.score_batch(model, task.stream("valid", BatchSettings(batch_size=6), 0).next())
    assert model.training is training and pack(model.state_dict()) == before


def test_new_images_are_a_folder(task, tmp_path):
    folder = tiny.pictures(tmp_path / "new", n_train=0, n_test=2) / "test"
    score = task.score_text(make(task), str(folder))
    assert score.n_predictions == 6 and score.split == "given" and 0 <= score.value <= 100
    with pytest.raises(UserError, match=r"expected a folder of CLASS/\*.png, got 'some text'"):
        task.score_text(make(task), "some text")


def test_it_learns_shapes_that_a_linear_model_does_not(cache, tmp_path):
    """A small residual network is far better after a pass over a part of the shapes than a linear model after ten."""
    task = ImageClassification()
    batches = {"batch_size": 32, "crop": 2, "max_train_images": 3200}
    optimizer = Optimizer(learning_rate=0.05, momentum=0.9, clip=5.0, averaging="none", schedule="cosine")
    training = Training(epochs=3, model={"width": 8}, batches=batches, optimizer=optimizer)
    model = initialise(build_model(task, load_genotype("resnet-8"), training), 0)
    result = fit(model, task, training, 0, Job(tmp_path), torch.device("cpu"))
    images, labels = (part[:3200] for part in task.images.split("train"))
    pixels = normalise(images, *task.images.statistics).flatten(1)
    # the best linear map in the least-squares sense, by its normal equations
    wanted = F.one_hot(labels, 10).float()
    weights = torch.linalg.solve(pixels.t() @ pixels + 100 * torch.eye(pixels.shape[1]), pixels.t() @ wanted)
    valid, valid_labels = task.images.split("valid")
    guessed = (normalise(valid, *task.images.statistics).flatten(1) @ weights).argmax(1)
    linear = 100 * (guessed != valid_labels).double().mean().item()
    assert linear > 75 and result["value"] < 50
