"""Formats of image data sets, one a file: each finds its files in a folder and decodes them.

A format is a function `find(folder) -> Source | None`; the first one in FORMATS that finds something is taken.
"""

from collections.abc import Callable
from pathlib import Path

from lmnas.tasks.data.formats import cifar, parquet, pictures
from lmnas.tasks.data.formats.source import Source

FORMATS: tuple[Callable[[Path], Source | None], ...] = (parquet.find, cifar.find, pictures.find)
EXPECTED = (
    f"expected train/CLASS/*.png and test/CLASS/*.png, train*.parquet and test*.parquet, or {cifar.ARCHIVE} (or the "
    f"folder that it unpacks to)"
)
"""Formats that are read, for messages."""

__all__ = ["EXPECTED", "FORMATS", "Source", "cifar", "parquet", "pictures"]
