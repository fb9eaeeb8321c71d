"""Source of images, the result of a format, and the checks that formats share."""

import hashlib
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmnas.core.errors import UserError
from lmnas.tasks.data.download import STEMS

SPLIT_STEMS = {**STEMS, "valid": (*STEMS["valid"], "validation")}
Arrays = tuple[np.ndarray, np.ndarray]
"""(N, 3, H, W) uint8 images and (N,) int64 labels."""


@dataclass(frozen=True)
class Source:
    """Images that were found.

    Attributes:
        identity: JSON value made of the digests of the files.
        decode: gives split -> arrays, and the names of the classes, None where the files do not say; raises UserError.
        archive: the one file that is read, where there is one: a published data set has its checksum.
    """

    identity: list[Any]
    decode: Callable[[], tuple[dict[str, Arrays], list[str] | None]]
    archive: Path | None = None


def sha256(path: Path) -> str:
    """Digest of a file, in hex digits."""
    return hashlib.sha256(_bytes(path)).hexdigest()


def content(path: Path, digest: str) -> bytes:
    """Bytes of a file that must have the digest under which they will be cached."""
    data = _bytes(path)
    if hashlib.sha256(data).hexdigest() != digest:
        raise UserError(f"{path} changed while it was read; try again")
    return data


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def check_complete(place: Path, splits: Iterable[str]) -> None:
    """Raises UserError where train or test is missing."""
    for split in ("train", "test"):
        if split not in splits:
            raise UserError(f"{place} lacks its {split} split")


def check_labels(where: Path, splits: Mapping[str, Arrays], n_classes: int) -> None:
    """Raises UserError for a label outside 0 to `n_classes` - 1."""
    for split, (_, labels) in splits.items():
        wrong = np.flatnonzero((labels < 0) | (labels >= n_classes))
        if len(wrong):
            raise UserError(
                f"{where}, split {split}: image {wrong[0]} has label {labels[wrong[0]]}; there are {n_classes} "
                f"classes, from 0"
            )


def pixels(images: np.ndarray | tuple[int, ...]) -> str:
    """Size of images (..., H, W), or (H, W) itself, for messages."""
    height, width = images.shape[-2:] if isinstance(images, np.ndarray) else images
    return f"{width} x {height} pixels"


def extra(module: str, what: str) -> Any:
    """Module of the extra `images`, imported when asked for."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0].replace("PIL", "pillow")
        raise UserError(f"{what} need {package}, which is not installed: pip install 'lmnas[images]'") from None
