"""Image data sets: train, valid and test as memory-mapped uint8 images with labels.

Names:
    shapes: drawn here (`lmnas.tasks.data.shapes`): needs no network.
    cifar10: from a local folder or downloaded; see `open_images`.
    anything else: a path (`./cifar10` is a path) of an archive, or of a folder in one of the layouts below.

Layouts, all read without unpacking anything to disk, and none with a pickle loader:
    CIFAR-10's archives, `cifar-10-binary.tar.gz` (what is downloaded) and `cifar-10-python.tar.gz`, or the folder that
        one of them unpacks to. The python archive's batches are pickles, read by `lmnas.tasks.data.python_batches`.
    Parquet as Hugging Face lays it out: `train*.parquet`, `test*.parquet` and, optionally, `valid*.parquet`, beside
        each other or under `data/`; a column `img` or `image` of {bytes, path}, and `label`, `labels` or `fine_label`.
        Needs the extra `images`.
    A folder of pictures: `train/CLASS/*.png`, `test/CLASS/*.png` and, optionally, `valid/CLASS/*.png`. Needs the extra.

Without a validation split of its own, the last images of the training split are held out. Decoded images are kept in a
cache, since decoding takes seconds and each worker process would do it again.
"""

import gzip
import hashlib
import importlib
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmnas.core.errors import UserError, nearest
from lmnas.tasks.data import shapes
from lmnas.tasks.data.corpora import replacing
from lmnas.tasks.data.download import REMOTES, SPLITS, STEMS, fetch
from lmnas.tasks.data.python_batches import Refused, read_batch

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""In the order of the labels, for files that do not say."""
ARCHIVES = {
    "cifar-10-binary.tar.gz": REMOTES["cifar10"][0].checksum,
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
}
"""MD5 of the published archives, as their page states them."""
PUBLISHED = {"cifar10": ("cifar10", "cifar-10")}
"""Data set -> names of its folder; the first one is made for a download."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".webp")
IMAGE_COLUMNS, LABEL_COLUMNS = ("img", "image"), ("label", "labels", "fine_label")

_VERSION = 1
"""Enters the fingerprint; to be raised when the decoding changes."""
_SIDE = 32
"""Pixels of a side in CIFAR-10's own formats."""
_TRAIN_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_LARGEST_MEMBER = 1 << 28
"""Bytes; ten times a published batch. An archive that says more is not read."""

Arrays = tuple[np.ndarray, np.ndarray]
"""(N, 3, H, W) uint8 images and (N,) int64 labels."""


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
            n_valid: hold so many out instead: searches may split the training images otherwise (DARTS: half of them).

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
        """What a result says about its data: name, fingerprint, sizes."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "images": {split: len(self.split(split)[0]) for split in SPLITS},
            "classes": len(self.classes),
            "size": list(self.size),
        }


@dataclass(frozen=True)
class _Source:
    """Where images come from: what identifies them (digests), and how to decode them.

    `decode` gives split -> arrays and the names of the classes, None where the files do not say.
    """

    identity: list[Any]
    decode: Callable[[], tuple[dict[str, Arrays], list[str] | None]]


def open_images(
    data: str,
    *,
    valid: int | None = None,
    classes: int | None = None,
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
) -> ImageSet:
    """Open a data set by name or path, decoding it on the first call.

    Args:
        valid: training images held out for validation, the last ones. None: a tenth (CIFAR-10: 5,000, as ENAS), or
            the split that the data has.
        classes: how many there must be; None: as many as there are.
        data_dir: where cifar10 is looked for, in a folder of that name, in any of the layouts, and downloaded to.
            None: environment variable LMNAS_DATA, else ~/.cache/lmnas/data.
        cache_dir: where decoded images are kept, a folder per fingerprint. None: LMNAS_CACHE, else
            ~/.cache/lmnas/images.

    Raises:
        UserError: unknown name, unreadable or unsuitable data, failed download, unwritable cache.
    """
    name = data
    if data == "shapes":
        # numpy's version: it does not promise the same draws for ever
        source = _Source(["shapes", shapes.VERSION, np.__version__], _draw_shapes)
    elif data in PUBLISHED:
        parent = Path(data_dir or os.environ.get("LMNAS_DATA") or "~/.cache/lmnas/data").expanduser()
        source = _published(data, parent)
    else:
        path = _existing(data)
        name = path.resolve().name
        source = _from_folder(path) if path.is_dir() else _from_archive(path, None)
    key = _digest([_VERSION, *source.identity])
    root = Path(cache_dir or os.environ.get("LMNAS_CACHE") or "~/.cache/lmnas/images").expanduser()
    meta, arrays = _load(root / key) or _build(root / key, name, source)
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
    """Images and labels of `folder/CLASS/*.png`, for a trained model.

    Raises:
        UserError: no such folder, an unknown class, no images, or of another size.
    """
    if not folder.is_dir():
        raise UserError(f"images to score: expected a folder of CLASS/*.png, got {str(folder)!r}")
    found = _pictures(folder)
    for path in found:
        if path.parent.name not in classes:
            raise UserError(f"{path}: class {path.parent.name!r} is unknown. {nearest(path.parent.name, classes)}")
    if not found:
        raise UserError(f"images to score: folder {folder} has no CLASS/*.png")
    images, labels = _decoded(found, {name: number for number, name in enumerate(classes)})
    if images.shape[2:] != size:
        raise UserError(f"images of {folder} are {_shape(images)}; the model was trained on {_pixels(size)}")
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


# ----------------------------------------------------------------------------------------------------- where it lies


def _published(name: str, data_dir: Path) -> _Source:
    """The data set in its folder in `data_dir`, downloaded if it is not there."""
    folders = [data_dir / folder for folder in PUBLISHED[name]]
    for folder in folders:
        if folder.is_dir() and (source := _found(folder, ARCHIVES)) is not None:
            return source
    archive = next(iter(ARCHIVES))
    fetch(name, folders[0], f"Put {archive} into {folders[0]} by hand, or set LMNAS_DATA to its parent folder")
    return _from_archive(folders[0] / archive, ARCHIVES[archive])


def _existing(data: str) -> Path:
    try:
        path = Path(data).expanduser()
        if data and (path.is_file() or path.is_dir()):
            return path
    except (OSError, RuntimeError):  # a name too long for a path; no home for ~
        pass
    known = nearest(data, ["shapes", *PUBLISHED])
    raise UserError(f"data {data!r} is neither a known image set nor an existing archive or folder. {known}")


def _from_folder(folder: Path) -> _Source:
    source = _found(folder, {})
    if source is None:
        raise UserError(
            f"folder {folder} has no images: expected train/CLASS/*.png and test/CLASS/*.png, train*.parquet and "
            f"test*.parquet, or one of {', '.join(ARCHIVES)}"
        )
    return source


def _found(folder: Path, checksums: Mapping[str, str]) -> _Source | None:
    """The source in `folder` by the first layout that is there; None: no images."""
    for place in (folder, folder / "data", folder / "plain_text"):
        files = {
            split: sorted(path for stem in stems for path in place.glob(f"{stem}*.parquet"))
            for split, stems in _STEMS.items()
        }
        if files["train"]:
            return _from_parquet(folder, {split: paths for split, paths in files.items() if paths})
    for place in (folder, folder / "cifar-10-batches-bin", folder / "cifar-10-batches-py"):
        for ending in (".bin", ""):
            if (place / f"{_TRAIN_BATCHES[0]}{ending}").is_file():
                return _from_batches(place)
    for archive in ARCHIVES:
        if (folder / archive).is_file():
            return _from_archive(folder / archive, checksums.get(archive))
    if (folder / "train").is_dir():
        return _from_tree(folder)
    return None


_STEMS = {**STEMS, "valid": (*STEMS["valid"], "validation")}


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _complete(place: Path, splits: Iterable[str]) -> None:
    for split in ("train", "test"):
        if split not in splits:
            raise UserError(f"{place} lacks its {split} split")


# ---------------------------------------------------------------------------------------------- CIFAR-10's own files


def _from_archive(path: Path, md5: str | None) -> _Source:
    """A .tar.gz; `md5` is that of the published one, which must be met."""
    if md5 is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != md5:
            raise UserError(f"{path}: its checksum is md5 {found}, that of the published archive {md5}; delete it")
    return _Source([_sha256(path)], partial(_decode_batches, path, partial(_archived, path)))


def _archived(path: Path) -> dict[str, bytes]:
    """The batches of an archive by file name. They are read into memory: no path of the archive is ever written to."""
    wanted = re.compile(
        r"(\./)?cifar-10-batches-(bin|py)/((data_batch_[1-5]|test_batch)(\.bin)?|batches\.meta(\.txt)?)"
    )
    members: dict[str, bytes] = {}
    try:
        with gzip.open(path) as unzipped, tarfile.open(fileobj=unzipped, mode="r:") as archive:
            for member in archive:
                if not wanted.fullmatch(member.name):
                    continue
                name = member.name.rsplit("/", 1)[-1]
                if not member.isreg():
                    raise UserError(f"{path}: member {member.name!r} is a link or a device, not a file")
                if member.size > _LARGEST_MEMBER:
                    raise UserError(f"{path}: member {member.name!r} says that it has {member.size:,} bytes; not read")
                file = archive.extractfile(member)
                assert file is not None  # only links and devices give none
                members[name] = file.read()
                if len(members[name]) != member.size:
                    raise UserError(f"{path}: damaged ({member.name} ends too early)")
            while unzipped.read(1 << 20):  # to the end, where its checksum is
                pass
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{path}: not a .tar.gz archive, or damaged ({error})") from None
    return members


def _from_batches(folder: Path) -> _Source:
    """The folder that an archive unpacks to."""
    names = re.compile(r"(data_batch_[1-5]|test_batch)(\.bin)?|batches\.meta(\.txt)?")
    paths = sorted(path for path in folder.iterdir() if names.fullmatch(path.name) and path.is_file())

    def members() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in paths}

    return _Source([[path.name, _sha256(path)] for path in paths], partial(_decode_batches, folder, members))


def _decode_batches(where: Path, read: Callable[[], dict[str, bytes]]) -> tuple[dict[str, Arrays], list[str] | None]:
    """Images of CIFAR-10's batches, binary or python, in the order of the files."""
    members = read()
    ending = ".bin" if any(name.endswith(".bin") for name in members) else ""
    one = _binary_batch if ending else _python_batch
    names = _class_names(where, members)
    n_classes = len(names or CIFAR10)
    splits: dict[str, Arrays] = {}
    for split, batches in (("train", _TRAIN_BATCHES), ("test", ("test_batch",))):
        parts = [one(f"{where}: {name}", members[name + ending]) for name in batches if name + ending in members]
        if len(parts) < len(batches):
            lacking = next(name + ending for name in batches if name + ending not in members)
            raise UserError(f"{where}: no CIFAR-10 archive: {lacking} is missing")
        images = np.concatenate([part[0] for part in parts])
        labels = np.concatenate([part[1] for part in parts])
        _check_labels(f"{where}, split {split}", labels, n_classes)
        splits[split] = images, labels
    return splits, names or list(CIFAR10)


def _binary_batch(where: str, data: bytes) -> Arrays:
    """Records of one byte of label and 3,072 of pixels: red, green, blue, each row by row."""
    record = 1 + 3 * _SIDE * _SIDE
    if not data or len(data) % record:
        raise UserError(f"{where} has {len(data):,} bytes; expected records of {record:,} (label, 32 x 32 pixels)")
    rows = np.frombuffer(data, np.uint8).reshape(-1, record)
    return rows[:, 1:].reshape(-1, 3, _SIDE, _SIDE), rows[:, 0].astype(np.int64)


def _python_batch(where: str, data: bytes) -> Arrays:
    try:
        batch = read_batch(data)
    except Refused as reason:
        raise UserError(f"{where} is no batch of CIFAR-10: {reason}") from None
    pixels, labels = batch.get("data"), batch.get("labels")
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != 3 * _SIDE * _SIDE:
        raise UserError(f"{where}: expected 'data' of (N, {3 * _SIDE * _SIDE}) bytes")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels) or len(labels) != len(pixels):
        raise UserError(f"{where}: expected 'labels', one number for each of the {len(pixels)} images")
    return pixels.reshape(-1, 3, _SIDE, _SIDE), np.array(labels, np.int64)


def _class_names(where: Path, members: Mapping[str, bytes]) -> list[str] | None:
    if "batches.meta.txt" in members:
        return members["batches.meta.txt"].decode(errors="replace").split() or None
    if "batches.meta" in members:
        try:
            names = read_batch(members["batches.meta"]).get("label_names")
        except Refused as reason:
            raise UserError(f"{where}: batches.meta is broken: {reason}") from None
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            return [str(name) for name in names]
    return None


# ---------------------------------------------------------------------------------------------- parquet and pictures


def _extra(module: str, what: str) -> Any:
    """A module of the extra `images`, imported when asked for."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0].replace("PIL", "pillow")
        raise UserError(f"{what} need {package}, which is not installed: pip install 'lmnas[images]'") from None


def _decoder(where: str) -> Callable[[bytes, str], np.ndarray]:
    """(3, H, W) uint8 of a picture's bytes."""
    pillow = _extra("PIL.Image", where)

    def decode(content: bytes, name: str) -> np.ndarray:
        try:
            with pillow.open(io.BytesIO(content)) as picture:
                return np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
        except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
            raise UserError(f"{name}: not an image, or damaged ({str(error).splitlines()[0]})") from None

    return decode


def _stack(pictures: Iterator[tuple[str, np.ndarray]], n: int) -> np.ndarray:
    """(N, 3, H, W) of pictures that must have one size."""
    stacked, first = None, ""
    for row, (name, picture) in enumerate(pictures):
        if stacked is None:
            stacked, first = np.empty((n, *picture.shape), np.uint8), name
        if picture.shape != stacked.shape[1:]:
            raise UserError(f"{name} is {_shape(picture)}, {first} {_shape(stacked)}; expected images of one size")
        stacked[row] = picture
    assert stacked is not None
    return stacked


def _shape(images: np.ndarray) -> str:
    return _pixels(images.shape[-2:])


def _pixels(size: tuple[int, ...]) -> str:
    return f"{size[1]} x {size[0]} pixels"


def _from_parquet(folder: Path, files: dict[str, list[Path]]) -> _Source:
    _complete(folder, files)
    return _Source(
        [[split, *map(_sha256, paths)] for split, paths in files.items()], partial(_decode_parquet, folder, files)
    )


def _decode_parquet(folder: Path, files: dict[str, list[Path]]) -> tuple[dict[str, Arrays], list[str] | None]:
    parquet = _extra("pyarrow.parquet", f"{folder}: parquet files")
    decode = _decoder(f"{folder}: images in parquet files")
    splits: dict[str, Arrays] = {}
    names: list[str] | None = None
    for split, paths in files.items():
        parts: list[tuple[list[tuple[str, bytes]], np.ndarray]] = []
        for path in paths:
            # ArrowInvalid is a ValueError, ArrowTypeError a TypeError; a schema that lacks a column gives a KeyError
            try:
                schema = parquet.read_schema(path)
                image = _column(path, schema.names, IMAGE_COLUMNS)
                label = _column(path, schema.names, LABEL_COLUMNS)
                names = names or _names_in(schema.metadata, label)
                table = parquet.read_table(path, columns=[image, label])
                if not table.num_rows:
                    continue
                contents = table.column(image).combine_chunks().field("bytes").to_pylist()
                labels = table.column(label).to_numpy().astype(np.int64)
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
                raise UserError(f"{path}: not a parquet file of images ({str(error).splitlines()[0]})") from None
            if any(content is None for content in contents):
                raise UserError(f"{path}: column {image!r} has an image without bytes; its path alone cannot be read")
            parts.append(([(f"{path}, row {row}", content) for row, content in enumerate(contents)], labels))
        rows = [row for part, _ in parts for row in part]
        if not rows:
            raise UserError(f"{folder}: its {split} split is empty")
        splits[split] = (
            _stack(((name, decode(content, name)) for name, content in rows), len(rows)),
            np.concatenate([labels for _, labels in parts]),
        )
    n_classes = len(names) if names else max(int(labels.max()) for _, labels in splits.values()) + 1
    for split, (_, labels) in splits.items():
        _check_labels(f"{folder}, split {split}", labels, n_classes)
    return splits, names


def _column(path: Path, columns: list[str], known: tuple[str, ...]) -> str:
    for name in known:
        if name in columns:
            return name
    raise UserError(f"{path} has the columns {', '.join(columns)}; expected one of {', '.join(known)}")


def _names_in(metadata: Mapping[bytes, bytes] | None, label: str) -> list[str] | None:
    """The class names that Hugging Face's metadata state."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) and names else None


def _from_tree(folder: Path) -> _Source:
    trees: dict[str, list[Path]] = {}
    for split, stems in _STEMS.items():
        place = next((folder / stem for stem in stems if (folder / stem).is_dir()), None)
        if place is not None:
            trees[split] = _pictures(place)
            if not trees[split]:
                raise UserError(f"{place}: the {split} split is empty; expected CLASS/*.png")
    _complete(folder, trees)
    classes = sorted({path.parent.name for path in trees["train"]})
    for paths in trees.values():
        for path in paths:
            if path.parent.name not in classes:
                raise UserError(
                    f"{path}: class {path.parent.name!r} is not in train. {nearest(path.parent.name, classes)}"
                )
    index = {name: number for number, name in enumerate(classes)}
    identity = [[split, [[p.parent.name, p.name, _sha256(p)] for p in paths]] for split, paths in trees.items()]
    return _Source(identity, lambda: ({split: _decoded(paths, index) for split, paths in trees.items()}, classes))


def _pictures(place: Path) -> list[Path]:
    """`place/CLASS/*.png` in an order that mixes the classes and depends on the names alone: a part is held out."""
    found = [path for path in place.glob("*/*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    return sorted(found, key=lambda path: hashlib.sha256(f"{path.parent.name}/{path.name}".encode()).digest())


def _decoded(paths: list[Path], index: Mapping[str, int]) -> Arrays:
    decode = _decoder("pictures")
    images = _stack(((str(path), decode(path.read_bytes(), str(path))) for path in paths), len(paths))
    return images, np.array([index[path.parent.name] for path in paths], np.int64)


def _check_labels(where: str, labels: np.ndarray, n_classes: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= n_classes))
    if len(wrong):
        raise UserError(
            f"{where}: image {wrong[0]} has label {labels[wrong[0]]}; there are {n_classes} classes, from 0"
        )


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


def _build(folder: Path, name: str, source: _Source) -> _Entry:
    """Decode into `folder`; safe beside another process that does the same, as in `corpora`."""
    splits, names = source.decode()
    sizes = {split: len(labels) for split, (_, labels) in splits.items()}
    size = splits["train"][0].shape[2:]
    for split, (images, _) in splits.items():
        if images.shape[2:] != size:
            raise UserError(f"{name}: images of {split} are {_shape(images)}, those of train {_pixels(size)}")
    if names is None:
        n_classes = max(int(labels.max()) for _, labels in splits.values()) + 1
        names = list(CIFAR10) if name in PUBLISHED and n_classes == 10 else [str(number) for number in range(n_classes)]
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
