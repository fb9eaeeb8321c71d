"""Image classification: one label per image, trained on randomly cropped, flipped and cut-out images.

The model around a searched body is that of ENAS's and DARTS's convolutional networks (Pham et al., 2018, section 3.2;
Liu et al., 2019, appendix A.2): pooled features -> dropout -> linear layer, and, while training, an auxiliary
classifier at two thirds of the depth. Augmentation: crop out of the zero-padded image, horizontal flip, cutout (DeVries
& Taylor, 2017, arXiv 1708.04552); pixels are normalised by the training split's channel means and deviations.

Departure: padding is zero after normalisation, that is the mean colour (He et al., 2016, and ENAS), where DARTS's code
pads with black.

Shapes: B batch, C channels, F features, H x W pixels (S x S), K classes.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lmnas.core.contracts import (
    Batch,
    Choice,
    ImageBody,
    Loss,
    Masks,
    Model,
    Objective,
    Score,
    Stream,
    Task,
    UsualModel,
)
from lmnas.core.errors import UserError
from lmnas.core.files import write_json
from lmnas.core.seeds import generator
from lmnas.nn.ops.dropout import draw_mask
from lmnas.tasks.data.images import ImageSet, open_images, read_pictures

Rate = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
USUAL_CHANNELS, USUAL_CLASSES = 36, 10
"""DARTS's network for CIFAR-10."""
CALIBRATION_BINS = 15
"""Bins of equal width of the calibration error (Guo et al., 2017, arXiv 1706.04599)."""
AUXILIARY_SIDE = 8
"""Pixels of a side that an auxiliary head's map needs: pooled 5/3 they leave the 2 x 2 that its convolution takes."""


@dataclass(kw_only=True)
class ModelSettings:
    """Sizes and regularisation of an image classifier."""

    width: Count
    """Number of channels that the body starts from, as the papers count them."""
    dropout: Rate = 0.0
    """Dropout rate on the features before the classifier; 0: none."""
    drop_path: Rate = 0.0
    """Probability that a branch is left out at the end of training; grows linearly from 0 with the epochs. 0: none."""
    auxiliary: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the auxiliary head's loss (DARTS, ENAS: 0.4); 0: no such head."""
    label_smoothing: Rate = 0.0
    """Share of the target probability that is spread evenly over all classes; 0: none."""


@dataclass(kw_only=True)
class BatchSettings:
    """Settings of the batches of images."""

    batch_size: Count
    """Number of images of a training batch; a last batch of a pass that is not full is left out of that pass."""
    eval_batch_size: Count = 250
    """Number of images of a batch in validation and testing."""
    crop: Annotated[int, Field(ge=0)] = 4
    """Pixels of padding on each side, out of which an image's own size is cropped at random; 0: none."""
    flip: bool = True
    """Mirror training images from left to right with probability 1/2."""
    cutout: Annotated[int, Field(ge=0)] = 0
    """Side of a square, in pixels, that is blanked at a random place (DARTS: 16); 0: none."""
    augment_valid: bool = False
    """Augment the validation batches of a search as well (DARTS's architecture steps); never those of scores."""
    n_valid: Count | None = None
    """Training images held out for validation, the last ones, instead of the task's `valid` (DARTS's search: half of
    them). Test images are never among them."""
    max_train_images: Count | None = None
    """Number of first images of the training split to train on, a low fidelity for search; null: all."""
    max_valid_images: Count | None = None
    """Number of first images of the validation split to validate on; null: all."""


class AuxiliaryHead(nn.Module):
    """A second classifier on a map inside the body: ReLU, average pooling 5/3, 1x1 to 128, 2x2 to 768, linear."""

    def __init__(self, n_in: int, n_classes: int):
        super().__init__()
        self.conv_1 = nn.Conv2d(n_in, 128, 1, bias=False)
        self.norm_1 = nn.BatchNorm2d(128)
        self.conv_2 = nn.Conv2d(128, 768, 2, bias=False)
        self.norm_2 = nn.BatchNorm2d(768)
        self.classifier = nn.Linear(768, n_classes)

    def initialise(self, generator: torch.Generator) -> None:
        for conv, norm in ((self.conv_1, self.norm_1), (self.conv_2, self.norm_2)):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            norm.reset_running_stats()
            nn.init.ones_(norm.weight)
            nn.init.zeros_(norm.bias)
        _initialise_linear(self.classifier, generator)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, S, S) -> (B, K) logits. Raises UserError where the map is too small."""
        if min(maps.shape[2:]) < AUXILIARY_SIDE:
            raise UserError(
                f"model.auxiliary: the head reads a map of {maps.shape[3]} x {maps.shape[2]} pixels, it needs "
                f"{AUXILIARY_SIDE} x {AUXILIARY_SIDE}; leave it out (0) for images this small"
            )
        pooled = F.avg_pool2d(F.relu(maps), 5, 3)
        outputs = F.relu(self.norm_1(self.conv_1(pooled)))
        outputs = F.relu(self.norm_2(self.conv_2(outputs)))
        return self.classifier(outputs.mean((2, 3)))  # of 1 x 1 where the map had 8 x 8


def _initialise_linear(layer: nn.Linear, generator: torch.Generator) -> None:
    """PyTorch's own weights, uniform in ±1/sqrt(F), and no bias to start with."""
    bound = 1 / math.sqrt(layer.in_features)
    nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
    nn.init.zeros_(layer.bias)


class ImageClassifier(Model):
    """A body with a linear layer on its features. Calling it gives the loss of one batch."""

    body: ImageBody
    training_only: AuxiliaryHead | None

    def __init__(self, body: ImageBody, n_classes: int, settings: ModelSettings):
        super().__init__()
        self.settings = settings
        self.body = body
        self.classifier = nn.Linear(body.n_features, n_classes)
        if settings.auxiliary > 0:
            self.training_only = AuxiliaryHead(body.auxiliary_channels, n_classes)

    def initialise(self, generator: torch.Generator) -> None:
        # the range is for bodies of embeddings
        self.body.initialise(generator, 1 / math.sqrt(self.body.n_features))
        _initialise_linear(self.classifier, generator)
        if self.training_only is not None:
            self.training_only.initialise(generator)

    def draw_masks(self, batch: Batch, generator: torch.Generator, progress: float = 0.0) -> Masks:
        """`features` (B, F) before the classifier, and the body's own, whose rate grows with the training."""
        s, masks = self.settings, dict[str, Tensor]()
        batch_size, n_features = len(batch.inputs), self.body.n_features
        if s.dropout > 0:
            masks["features"] = draw_mask((batch_size, n_features), s.dropout, generator, self.classifier.weight)
        rates = {"path": s.drop_path * progress}
        return masks | dict(self.body.draw_masks(batch_size, rates, generator))

    def forward(self, batch: Batch, masks: Masks, choice: Choice = None, penalised: bool = True) -> Loss:
        """Mean cross-entropy of an image in nats, with label smoothing and the auxiliary head's if `penalised`.

        Args:
            batch: inputs (B, 3, S, S), targets (B,).
        """
        s = self.settings
        if not penalised:
            return Loss(F.cross_entropy(self.logits(batch.inputs, masks, choice), batch.targets))
        if self.training_only is None:
            logits = self.logits(batch.inputs, masks, choice)
            return Loss(F.cross_entropy(logits, batch.targets, label_smoothing=s.label_smoothing))
        features, maps = self.body.maps(batch.inputs, masks, choice)
        loss = F.cross_entropy(self._classified(features, masks), batch.targets, label_smoothing=s.label_smoothing)
        further = F.cross_entropy(self.training_only(maps), batch.targets, label_smoothing=s.label_smoothing)
        return Loss(loss + s.auxiliary * further)

    def logits(self, inputs: Tensor, masks: Masks, choice: Choice = None) -> Tensor:
        """(B, 3, S, S) -> (B, K)."""
        return self._classified(self.body(inputs, None, masks, choice)[0], masks)

    def _classified(self, features: Tensor, masks: Masks) -> Tensor:
        return self.classifier(features * masks["features"] if "features" in masks else features)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> float, each channel with mean 0 and deviation 1 over the training split.

    Channels come last in memory: convolutions keep it so, and take a fifth less time on a CPU.
    """
    scale, shift = (1 / (255 * std)).view(3, 1, 1), (mean / std).view(3, 1, 1)
    return (images.float() * scale - shift).contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, mean: Tensor, std: Tensor, settings: BatchSettings, noise: torch.Generator) -> Tensor:
    """A batch cropped, flipped, normalised and cut out, on the device of `images`: one gather, one mask.

    All random numbers are drawn on the CPU, so that one seed gives one batch everywhere.

    Args:
        images: (B, 3, H, W) uint8.

    Returns:
        (B, 3, H, W) float32.
    """
    n, _, height, width = images.shape
    device = images.device

    def draw(high: int) -> Tensor:
        return torch.randint(high, (n, 1), generator=noise).to(device)

    # which row and column of the image each pixel comes from; outside of it there is padding
    rows = torch.arange(height, device=device) + draw(2 * settings.crop + 1) - settings.crop
    columns = torch.arange(width, device=device) + draw(2 * settings.crop + 1) - settings.crop
    if settings.flip:
        columns = torch.where(draw(2).bool(), columns.flip(1), columns)
    kept = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    if settings.cutout:
        # DARTS's: the centre anywhere, so that the square may reach over the edge
        top, left = (draw(side) - settings.cutout // 2 for side in (height, width))
        y, x = torch.arange(height, device=device), torch.arange(width, device=device)
        inside_y = (y >= top) & (y < top + settings.cutout)
        inside_x = (x >= left) & (x < left + settings.cutout)
        kept &= ~(inside_y[:, :, None] & inside_x[:, None, :])
    places = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    taken = images.flatten(2).gather(2, places.flatten(1)[:, None].expand(n, 3, -1)).view(images.shape)
    return normalise(taken, mean, std) * kept[:, None]


class ImageStream(Stream):
    """Batches in an order drawn anew for every pass; the training stream of `Task`.

    Order and augmentation are drawn from generators of their own for every pass and batch, so that the cursor is all
    the state there is.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Tensor,
        std: Tensor,
        settings: BatchSettings,
        seed: int,
        purpose: str,
        augmented: bool,
    ):
        if len(images) < settings.batch_size:
            raise UserError(f"batch_size {settings.batch_size}: split {purpose!r} has only {len(images)} images")
        self.images, self.labels, self.mean, self.std = images, labels, mean, std
        self.settings, self.seed, self.purpose, self.augmented = settings, seed, purpose, augmented
        self.position = 0
        self.epoch = 0
        self._order: tuple[int, Tensor] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return len(self.images) // self.settings.batch_size

    def _rows(self) -> Tensor:
        """(N,) the images of this pass, in order."""
        if self._order is None or self._order[0] != self.epoch:
            noise = generator(self.seed, "order", self.purpose, self.epoch)
            self._order = self.epoch, torch.randperm(len(self.images), generator=noise)
        return self._order[1]

    def next(self) -> Batch:
        size = self.settings.batch_size
        rows = self._rows()[self.position * size : (self.position + 1) * size]
        images, targets = self.images[rows], self.labels[rows]
        if self.augmented:
            noise = generator(self.seed, "augment", self.purpose, self.epoch, self.position)
            inputs = augment(images, self.mean, self.std, self.settings, noise)
        else:
            inputs = normalise(images, self.mean, self.std)
        self.position += 1
        if self.position == self.steps_per_epoch:
            self.position = 0
            self.epoch += 1
        return Batch(inputs, targets, len(targets))

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position, self.epoch = state["position"], state["epoch"]


class ImageClassification(Task):
    """The task: labelled images, the model above, the share of wrong labels in percent."""

    name = "image-classification"
    takes = frozenset({"image"})
    kernels: frozenset[str] = frozenset()
    model_settings = ModelSettings
    batch_settings = BatchSettings

    def __init__(self, *, data: str = "shapes", valid: Count | None = None, classes: Count | None = None):
        """
        Args:
            data: `shapes` (embedded), `cifar10`, or the path of a folder of pictures or of parquet files, or of one of
                CIFAR-10's archives.
            valid: training images held out for validation, the last ones; default: a tenth, or the data's own split.
            classes: how many classes the data must have; default: as many as they have.
        """
        self.images: ImageSet = open_images(data, valid=valid, classes=classes)
        self.objective = Objective("error", "%", "minimize", worst=100.0, items="images")

    @classmethod
    def usual_model(cls, genotype: str, given: Mapping[str, Any]) -> UsualModel:
        if "vocabulary" in given:
            raise UserError(f"--vocabulary: genotype {genotype} is a network for images")
        settings = ModelSettings(width=given.get("width", USUAL_CHANNELS))
        return UsualModel(
            width=settings.width,
            vocabulary=None,
            decoder_bias=None,
            build=lambda body: ImageClassifier(body, USUAL_CLASSES, settings),
            words=f"{{model:,}} as a classifier of {settings.width} channels at first and {USUAL_CLASSES} classes, "
            "{body:,} in the body",
        )

    def data(self) -> dict[str, Any]:
        return self.images.info()

    def model(self, body: ImageBody, settings: ModelSettings) -> ImageClassifier:
        return ImageClassifier(body, len(self.images.classes), settings)

    def _split(self, split: str, settings: BatchSettings) -> tuple[Tensor, Tensor]:
        images, labels = self.images.split(split, settings.n_valid)
        limit = {"train": settings.max_train_images, "valid": settings.max_valid_images}.get(split)
        return images[:limit], labels[:limit]

    def stream(self, split: str, settings: BatchSettings, seed: int) -> ImageStream:
        images, labels = self._split(split, settings)
        augmented = split == "train" or settings.augment_valid
        return ImageStream(images, labels, *self.images.statistics, settings, seed, split, augmented)

    def largest_batch(self, settings: BatchSettings) -> Batch:
        """A batch of zeros, from which memory is forecast."""
        n = settings.batch_size
        return Batch(torch.zeros(n, 3, *self.images.size), torch.zeros(n, dtype=torch.long), n)

    @torch.no_grad()
    def score_batch(self, model: Model, batch: Batch, choice: Choice = None) -> Score:
        """The error rate on one batch without dropout: a reward."""
        with evaluating(model):
            logits = _own(model).logits(batch.inputs, {}, choice)
        return Score(_error(logits, batch.targets), "valid", len(batch.targets))

    @torch.no_grad()
    def evaluate(
        self,
        model: Model,
        split: str,
        settings: BatchSettings,
        choice: Choice = None,
        tick: Callable[[float], None] | None = None,
        max_segments: int | None = None,
    ) -> Score:
        """The error rate over a whole split, in evaluation mode. For the test split `details` has the confusion table
        and the calibration.

        Args:
            tick: called with the fraction done.
            max_segments: number of batches after which to stop (cheap proxies).
        """
        images, labels = self._split(split, settings)
        return self._measured(model, images, labels, split, settings, choice, tick, max_segments)

    def _measured(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        split: str,
        settings: BatchSettings,
        choice: Choice = None,
        tick: Callable[[float], None] | None = None,
        max_segments: int | None = None,
    ) -> Score:
        device = next(model.parameters()).device
        mean, std = (part.to(device) for part in self.images.statistics)
        found, targets = [], []
        # nearly equal parts: a supernet normalises by the batch, and one of a few images would be another network
        n_batches = math.ceil(len(images) / settings.eval_batch_size)
        batches = list(zip(images.tensor_split(n_batches), labels.tensor_split(n_batches), strict=True))[:max_segments]
        with evaluating(model):
            for number, (part, part_labels) in enumerate(batches):
                inputs = normalise(part.to(device), mean, std)
                found.append(_own(model).logits(inputs, {}, choice).float().cpu())
                targets.append(part_labels)
                if tick:
                    tick((number + 1) / len(batches))
        logits, target = torch.cat(found), torch.cat(targets)
        details = {}
        if split == "test" and bool(torch.isfinite(logits).all()):
            details = {
                "classes": self.images.classes,
                "confusion": confusion(logits, target).tolist(),
                "calibration": calibration(logits, target),
            }
        return Score(_error(logits, target), split, len(target), details)

    @torch.no_grad()
    def score_text(self, model: Model, text: str) -> Score:
        """The error rate on new images; `text` is the path of a folder of `CLASS/*.png`.

        Raises:
            UserError: no such folder, an unknown class, no images, or of another size.
        """
        images, labels = read_pictures(Path(text), self.images.classes, self.images.size)
        return self._measured(model, images, labels, "given", BatchSettings(batch_size=1))

    def save_assets(self, directory: Path) -> None:
        """Write the file that the trained model needs besides its weights: names of the classes, size of an image in
        pixels, and the mean and deviation by which its channels, in [0, 1], are normalised."""
        mean, std = self.images.statistics
        document = {
            "classes": self.images.classes,
            "size": list(self.images.size),
            "mean": mean.tolist(),
            "std": std.tolist(),
        }
        write_json(directory / "images.json", document)


def _own(model: Model) -> ImageClassifier:
    assert isinstance(model, ImageClassifier)
    return model


class evaluating:
    """A block in which a model is in evaluation mode; afterwards it is in the mode it was in."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __enter__(self) -> None:
        self.was_training = self.model.training
        self.model.eval()

    def __exit__(self, *exception: object) -> None:
        self.model.train(self.was_training)


def _error(logits: Tensor, targets: Tensor) -> float:
    """Percent; NaN where a logit is not finite."""
    if not bool(torch.isfinite(logits).all()):
        return math.nan
    return 100 * int((logits.argmax(1) != targets).sum()) / len(targets)


def confusion(logits: Tensor, targets: Tensor) -> Tensor:
    """(K, K) counts: rows are the true classes, columns the predicted ones."""
    k = logits.shape[1]
    return torch.bincount(targets * k + logits.argmax(1), minlength=k * k).view(k, k)


def calibration(logits: Tensor, targets: Tensor) -> dict[str, Any]:
    """Calibration error (Guo et al., 2017, eq. 3): mean difference of confidence and accuracy over bins of confidence.

    Args:
        logits: (N, K).
        targets: (N,) class ids.

    Returns:
        {"error": expected calibration error in [0, 1], "bins": [[images, mean confidence, accuracy], ...]}; the i-th of
        M bins holds the confidences in ((i-1)/M, i/M], and an empty one has None for both.
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    right = (predicted == targets).double()
    index = (confidence * CALIBRATION_BINS).ceil().long().sub(1).clamp(0, CALIBRATION_BINS - 1)
    bins: list[list[Any]] = []
    error = 0.0
    for number in range(CALIBRATION_BINS):
        rows = index == number
        count = int(rows.sum())
        if count:
            sure, accurate = float(confidence[rows].mean()), float(right[rows].mean())
            bins.append([count, sure, accurate])
            error += count / len(targets) * abs(sure - accurate)
        else:
            bins.append([0, None, None])
    return {"error": error, "bins": bins}
