"""Folders of pictures, `train/CLASS/*.png`, and the decoding of single pictures. Needs the extra `images`."""

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from lmnas.core.errors import UserError, nearest
from lmnas.tasks.data.formats.source import (
    SPLIT_STEMS,
    Arrays,
    Source,
    check_complete,
    content,
    extra,
    pixels,
    sha256,
)

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".webp")
_DECODERS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "WEBP")
"""Decoders that a picture may reach, whatever its name: that of PostScript would start an interpreter."""


def find(folder: Path) -> Source | None:
    if not (folder / "train").is_dir():
        return None
    trees: dict[str, list[Path]] = {}
    for split, stems in SPLIT_STEMS.items():
        place = next((folder / stem for stem in stems if (folder / stem).is_dir()), None)
        if place is not None:
            trees[split] = listed(place)
            if not trees[split]:
                raise UserError(f"{place}: the {split} split is empty; expected CLASS/*.png")
    check_complete(folder, trees)
    classes = sorted({path.parent.name for path in trees["train"]})
    for paths in trees.values():
        check_classes(paths, classes, "is not in train")
    digests = {path: sha256(path) for paths in trees.values() for path in paths}
    identity = [[split, [[p.parent.name, p.name, digests[p]] for p in paths]] for split, paths in trees.items()]
    return Source(
        identity, lambda: ({split: decoded(paths, classes, digests) for split, paths in trees.items()}, classes)
    )


def listed(place: Path) -> list[Path]:
    """`place/CLASS/*.png` in an order that mixes the classes and depends on the names alone: a part is held out."""
    found = [path for path in place.glob("*/*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    return sorted(found, key=lambda path: hashlib.sha256(f"{path.parent.name}/{path.name}".encode()).digest())


def check_classes(paths: list[Path], classes: list[str], problem: str) -> None:
    for path in paths:
        if path.parent.name not in classes:
            raise UserError(f"{path}: class {path.parent.name!r} {problem}. {nearest(path.parent.name, classes)}")


def decoded(paths: list[Path], classes: list[str], digests: Mapping[Path, str]) -> Arrays:
    """Images and labels of picture files, whose bytes must have the digests."""
    decode, index = decoder("pictures"), {name: number for number, name in enumerate(classes)}
    images = stack(((str(path), decode(content(path, digests[path]), str(path))) for path in paths), len(paths))
    return images, np.array([index[path.parent.name] for path in paths], np.int64)


def decoder(where: str) -> Callable[[bytes, str], np.ndarray]:
    """Function that gives (3, H, W) uint8 of a picture's bytes; its second argument is the name for messages."""
    pillow = extra("PIL.Image", where)

    def decode(data: bytes, name: str) -> np.ndarray:
        try:
            with pillow.open(io.BytesIO(data), formats=_DECODERS) as picture:
                if picture.mode[0] in "IF":
                    raise UserError(f"{name}: more than 8 bits a channel (mode {picture.mode}); expected 8")
                return np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
        except (OSError, ValueError, TypeError, SyntaxError, pillow.DecompressionBombError) as error:
            raise UserError(f"{name}: not an image, or damaged ({(str(error).splitlines() or [''])[0]})") from None

    return decode


def stack(pictures: Iterator[tuple[str, np.ndarray]], n: int) -> np.ndarray:
    """(N, 3, H, W) of pictures that must have one size."""
    stacked, first = None, ""
    for row, (name, picture) in enumerate(pictures):
        if stacked is None:
            stacked, first = np.empty((n, *picture.shape), np.uint8), name
        if picture.shape != stacked.shape[1:]:
            raise UserError(f"{name} is {pixels(picture)}, {first} {pixels(stacked)}; expected images of one size")
        stacked[row] = picture
    assert stacked is not None
    return stacked
