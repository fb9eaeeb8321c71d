"""Image data sets: train, valid and test as memory-mapped uint8 images with labels.

Names:
    shapes: drawn here (`lmnas.tasks.data.shapes`): needs no network.
    cifar10: from a local folder or downloaded; see `open_images`.
    anything else: a path (`./cifar10` is a path) of CIFAR-10's binary archive, or of a folder in one of `formats`.

Without a validation split of its own, the last images of the training split are held out. Decoded images are kept in a
cache, since decoding takes seconds and each worker process would do it again.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmnas.core import places
from lmnas.core.errors import UserError, nearest
from lmnas.tasks.data import shapes
from lmnas.tasks.data.corpora import replacing
from lmnas.tasks.data.download import REMOTES, SPLITS, fetch
from lmnas.tasks.data.formats import EXPECTED, FORMATS, Source, cifar, pictures
from lmnas.tasks.data.formats.source import Arrays, pixels, sha256

PUBLISHED = {"cifar10": ("cifar10", "cifar-10")}
"""Data set -> names of its folder; the first one is made for a download."""
_VERSION = 1
"""Enters the fingerprint; to be raised when the decoding changes."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Decoded images with their labels.

    Attributes:
        name: `shapes`, `cifar10` or the name of the file or folder.
        fingerprint: 16 hex digits over the source's bytes and what is held out; not over its path.
        classes: label -> name.
        images: train (validation images included, at the end), test -> (N, 3, H, W) uint8.
        labels: the same keys -> (N,) int64.
        n_valid: images at the end of train that are for validation.
    """

    name: str
    fingerprint: str
    classes: list[str]
    images: dict[str, Tensor]
    labels: dict[str, Tensor]
    n_valid: int

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of pixels."""
        return self.images["train"].shape[2], self.images["train"].shape[3]

    def split(self, name: str, n_valid: int | None = None) -> tuple[Tensor, Tensor]:
        """Images and labels of one split.

        Args:
            n_valid: number of training images held out instead, for searches (DARTS: half of them).

        Raises:
            UserError: the held-out part leaves nothing to train on.
        """
        images, labels = self.images["test" if name == "test" else "train"], self.labels
        if name == "test":
            return images, labels["test"]
        held = self.n_valid if n_valid is None else n_valid
        cut = len(images) - held
        if cut < 1:
            raise UserError(f"{held} images held out for validation; {self.name} has {len(images)} for both")
        part = slice(None, cut) if name == "train" else slice(cut, None)
        return images[part], labels["train"][part]

    @cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """(3,) mean and standard deviation of each channel over the training split, of values in [0, 1].

        From counts of the 256 values, so they are exact.
        """
        values = np.arange(256) / 255
        mean, std = [], []
        train = self.split("train")[0].numpy()
        for channel in range(3):
            counts = np.bincount(train[:, channel].reshape(-1), minlength=256)
            share = counts / counts.sum()
            mean.append(float(share @ values))
            std.append(max(float(share @ (values - mean[-1]) ** 2) ** 0.5, 1 / 255))  # a constant channel has none
        return torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)

    def info(self) -> dict[str, Any]:
        """Data section of a result: name, fingerprint, sizes."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "images": {split: len(self.split(split)[0]) for split in SPLITS},
            "classes": len(self.classes),
            "size": list(self.size),
        }


def open_images(data: str, *, valid: int | None = None, classes: int | None = None) -> ImageSet:
    """Open a data set by name or path, decoding it on the first call.

    cifar10 is looked for in `places.data()`, in a folder of that name in any of the formats, and downloaded to it;
    decoded images are kept in `places.cache("images")`, a folder per fingerprint.

    Args:
        valid: training images held out for validation, the last ones. None: a tenth (CIFAR-10: 5,000, as ENAS), or
            the split that the data has.
        classes: number of classes there must be; None: as many as there are.

    Raises:
        UserError: unknown name, unreadable or unsuitable data, failed download, unwritable cache.
    """
    name = data
    if data == "shapes":
        # numpy's version: it does not promise the same draws for ever
        source = Source(["shapes", shapes.VERSION, np.__version__], _draw_shapes)
    elif data in PUBLISHED:
        source = _published(data, places.data())
    else:
        path = _existing(data)
        name = path.resolve().name
        source = _from_folder(path) if path.is_dir() else cifar.from_archive(path)
    key = _digest([_VERSION, *source.identity])
    folder = places.cache("images") / key
    meta, arrays = _load(folder) or _build(folder, name, source)
    names = meta["classes"]
    if classes is not None and classes != len(names):
        raise UserError(f"task.classes {classes}: {name} has {len(names)} classes")
    held = _held_out(name, meta["images"], valid)
    return ImageSet(
        name,
        _digest([key, held]),
        names,
        {split: images for split, (images, _) in arrays.items()},
        {split: labels for split, (_, labels) in arrays.items()},
        held,
    )


def read_pictures(folder: Path, classes: list[str], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) and labels (N,) of `folder/CLASS/*.png`, for a trained model.

    Raises:
        UserError: no such folder, an unknown class, no images, or of another size.
    """
    if not folder.is_dir():
        raise UserError(f"images to score: expected a folder of CLASS/*.png, got {str(folder)!r}")
    found = pictures.listed(folder)
    pictures.check_classes(found, classes, "is unknown")
    if not found:
        raise UserError(f"images to score: folder {folder} has no CLASS/*.png")
    images, labels = pictures.decoded(found, classes, {path: sha256(path) for path in found})
    if images.shape[2:] != size:
        raise UserError(f"images of {folder} are {pixels(images)}; the model was trained on {pixels(size)}")
    return torch.from_numpy(images), torch.from_numpy(labels)


def _held_out(name: str, sizes: Mapping[str, int], valid: int | None) -> int:
    """Images at the end of the decoded training split that are for validation."""
    own = sizes.get("valid", 0)
    if own:
        if valid is not None:
            raise UserError(f"task.valid {valid}: {name} has a validation split of its own; leave the setting out")
        return own
    n_train = sizes["train"]
    held = n_train // 10 if valid is None else valid
    if not 1 <= held < n_train:
        raise UserError(f"task.valid {held}: {name} has {n_train} training images; expected 1 to {n_train - 1}")
    return held


def _digest(parts: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:16]


def _draw_shapes() -> tuple[dict[str, Arrays], list[str]]:
    sizes = {"train": shapes.N_TRAIN, "test": shapes.N_TEST}
    return {split: shapes.draw(split, n) for split, n in sizes.items()}, list(shapes.CLASSES)


def _published(name: str, data_dir: Path) -> Source:
    """The data set in its folder in `data_dir`, downloaded if it is not there; its archive has the known checksum."""
    remote = REMOTES[name][0]
    folders = [data_dir / folder for folder in PUBLISHED[name]]
    source = next((found for folder in folders if folder.is_dir() and (found := _found(folder))), None)
    if source is None:
        fetch(
            name, folders[0], f"Put {cifar.ARCHIVE} into {folders[0]} by hand, or set LMNAS_DATA to its parent folder"
        )
        source = cifar.from_archive(folders[0] / cifar.ARCHIVE)
    if source.archive is not None:
        with source.archive.open("rb") as file:
            md5 = hashlib.file_digest(file, "md5").hexdigest()
        if md5 != remote.checksum:
            published = f"that of the published archive {remote.checksum}"
            raise UserError(f"{source.archive}: its checksum is md5 {md5}, {published}; delete it")
    return source


def _existing(data: str) -> Path:
    try:
        path = Path(data).expanduser()
        if data and (path.is_file() or path.is_dir()):
            return path
    except (OSError, RuntimeError):  # a name too long for a path; no home for ~
        pass
    known = nearest(data, ["shapes", *PUBLISHED])
    raise UserError(f"data {data!r} is neither a known image set nor an existing archive or folder. {known}")


def _from_folder(folder: Path) -> Source:
    if (source := _found(folder)) is None:
        raise UserError(f"folder {folder} has no images: {EXPECTED}")
    return source


def _found(folder: Path) -> Source | None:
    """The source in `folder` by the first format that is there; None: no images."""
    return next((source for find in FORMATS if (source := find(folder)) is not None), None)


# ------------------------------------------------------------------------------------------------------------- cache

_Entry = tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor]]]


def _load(folder: Path) -> _Entry | None:
    """A complete cache entry; None if there is none, or it is broken."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        arrays = {}
        for split in ("train", "test"):
            # mode c, copy on write: see `corpora`
            images = np.load(folder / f"{split}-images.npy", mmap_mode="c")
            labels = np.load(folder / f"{split}-labels.npy")
            n = meta["images"][split] + (meta["images"].get("valid", 0) if split == "train" else 0)
            if images.shape != (n, 3, *meta["size"]) or images.dtype != np.uint8 or labels.shape != (n,):
                return None
            arrays[split] = torch.from_numpy(images), torch.from_numpy(labels)
        meta["classes"]
        return meta, arrays
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None


def _build(folder: Path, name: str, source: Source) -> _Entry:
    """Decode into `folder`; safe beside another process that does the same, as in `corpora`."""
    splits, names = source.decode()
    sizes = {split: len(labels) for split, (_, labels) in splits.items()}
    size = splits["train"][0].shape[2:]
    for split, (images, _) in splits.items():
        if images.shape[2:] != size:
            raise UserError(f"{name}: images of {split} are {pixels(images)}, those of train {pixels(size)}")
    if names is None:
        n_classes = max(int(labels.max()) for _, labels in splits.values()) + 1
        names = (
            list(cifar.CIFAR10)
            if name in PUBLISHED and n_classes == 10
            else [str(number) for number in range(n_classes)]
        )
    if len(names) < 2:
        raise UserError(f"{name} has one class, {names[0]!r}; expected at least two")
    kept = {"train": splits["train"], "test": splits["test"]}
    if "valid" in splits:
        (images, labels), (more, further) = splits["train"], splits["valid"]
        kept["train"] = np.concatenate([images, more]), np.concatenate([labels, further])
    meta = {"classes": names, "images": sizes, "size": list(size)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for split, (images, labels) in kept.items():
            for kind, array in (("images", images), ("labels", labels)):
                with replacing(folder / f"{split}-{kind}.npy") as file:
                    np.save(file, np.ascontiguousarray(array))
        with replacing(folder / "meta.json") as file:  # last: it says that the entry is complete
            file.write(json.dumps(meta).encode())
    except OSError as error:
        raise UserError(f"cannot write the image cache {folder} ({error.strerror}); set LMNAS_CACHE") from error
    if (entry := _load(folder)) is None:
        raise UserError(f"the image cache {folder} cannot be read back; set LMNAS_CACHE")
    return entry
