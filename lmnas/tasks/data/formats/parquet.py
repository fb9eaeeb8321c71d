"""Parquet as Hugging Face lays it out: `train*.parquet`, `test*.parquet` and, optionally, `valid*.parquet`.

A column `img` or `image` of {bytes, path}, and `label`, `labels` or `fine_label`. Needs the extra `images`.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lmnas.core.errors import UserError
from lmnas.tasks.data.formats.pictures import decoder, stack
from lmnas.tasks.data.formats.source import (
    SPLIT_STEMS,
    Arrays,
    Source,
    check_complete,
    check_labels,
    content,
    extra,
    sha256,
)

IMAGE_COLUMNS, LABEL_COLUMNS = ("img", "image"), ("label", "labels", "fine_label")
_MOST_CLASSES = 1 << 16
"""Largest number of classes of files that do not name them: a label above counts as a mistake."""


def find(folder: Path) -> Source | None:
    for place in (folder, folder / "data", folder / "plain_text"):
        files = {
            split: sorted(path for stem in stems for path in place.glob(f"{stem}*.parquet"))
            for split, stems in SPLIT_STEMS.items()
        }
        if files["train"]:
            return _source(folder, {split: paths for split, paths in files.items() if paths})
    return None


def _source(folder: Path, files: Mapping[str, list[Path]]) -> Source:
    check_complete(folder, files)
    digests = {split: {path: sha256(path) for path in paths} for split, paths in files.items()}
    identity = [[split, *paths.values()] for split, paths in digests.items()]
    return Source(identity, lambda: _decode(folder, digests))


def _decode(folder: Path, files: Mapping[str, Mapping[Path, str]]) -> tuple[dict[str, Arrays], list[str] | None]:
    decode = decoder(f"{folder}: images in parquet files")
    splits: dict[str, Arrays] = {}
    names: list[str] | None = None
    for split, paths in files.items():
        parts = [_read(folder, path, content(path, digest)) for path, digest in paths.items()]
        rows = [row for part, _, _ in parts for row in part]
        names = names or next((found for _, _, found in parts if found), None)
        if not rows:
            raise UserError(f"{folder}: its {split} split is empty")
        splits[split] = (
            stack(((name, decode(picture, name)) for name, picture in rows), len(rows)),
            np.concatenate([labels for _, labels, _ in parts]),
        )
    largest = max(int(labels.max()) for _, labels in splits.values())
    if names is None and largest >= _MOST_CLASSES:
        raise UserError(f"{folder}: label {largest} would make {largest + 1:,} classes; at most {_MOST_CLASSES:,}")
    check_labels(folder, splits, len(names) if names else largest + 1)
    return splits, names


def _read(folder: Path, path: Path, data: bytes) -> tuple[list[tuple[str, bytes]], np.ndarray, list[str] | None]:
    """(name for messages, bytes) of each image, (N,) labels, and the class names where the file states them."""
    parquet = extra("pyarrow.parquet", f"{folder}: parquet files")
    arrow = extra("pyarrow", f"{folder}: parquet files")
    # ArrowInvalid is a ValueError, ArrowTypeError a TypeError, ArrowNotImplementedError a NotImplementedError
    try:
        schema = parquet.read_schema(io.BytesIO(data))
        image = _column(path, schema.names, IMAGE_COLUMNS)
        label = _column(path, schema.names, LABEL_COLUMNS)
        table = parquet.read_table(io.BytesIO(data), columns=[image, label])
        numbers = table.column(label)
        if table.num_rows and not arrow.types.is_integer(numbers.type):
            raise UserError(f"{path}: column {label!r} has values of type {numbers.type}; expected integers")
        if numbers.null_count:
            raise UserError(f"{path}: column {label!r} lacks the label of {numbers.null_count} images")
        contents = table.column(image).combine_chunks().field("bytes").to_pylist() if table.num_rows else []
        labels = numbers.to_numpy().astype(np.int64)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RecursionError) as error:
        raise UserError(f"{path}: not a parquet file of images ({(str(error).splitlines() or [''])[0]})") from None
    for row, picture in enumerate(contents):
        if not isinstance(picture, bytes):
            raise UserError(f"{path}: column {image!r} has no bytes in row {row}; a path alone cannot be read")
    return [(f"{path}, row {row}", p) for row, p in enumerate(contents)], labels, _class_names(schema.metadata, label)


def _column(path: Path, columns: list[str], known: tuple[str, ...]) -> str:
    for name in known:
        if name in columns:
            return name
    raise UserError(f"{path} has the columns {', '.join(columns)}; expected one of {', '.join(known)}")


def _class_names(metadata: Mapping[bytes, bytes] | None, label: str) -> list[str] | None:
    """Class names that Hugging Face's metadata state."""
    try:
        names: Any = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) and names else None
