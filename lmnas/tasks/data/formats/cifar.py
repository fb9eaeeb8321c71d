"""CIFAR-10's binary archive, or the folder that it unpacks to (https://www.cs.toronto.edu/~kriz/cifar.html).

The archive is read in memory: nothing of it is written to disk. The python archive holds pickles, which are not read.
"""

import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lmnas.core.errors import UserError
from lmnas.tasks.data.formats.source import Arrays, Source, check_labels, content, sha256

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""Names of the classes in the order of the labels, for files that do not give them."""
ARCHIVE = "cifar-10-binary.tar.gz"
_FOLDER, _PYTHON = "cifar-10-batches-bin", "cifar-10-batches-py"
_BATCHES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
_NAMES = "batches.meta.txt"
_WANTED = {_NAMES, *_BATCHES["train"], *_BATCHES["test"]}
_SIDE = 32
"""Pixels of a side."""
_LARGEST_MEMBER = 1 << 28
"""Bytes; ten times a published batch. An archive that says more is not read."""


def find(folder: Path) -> Source | None:
    for place in (folder, folder / _FOLDER):
        if (place / _BATCHES["train"][0]).is_file():
            return _from_batches(place)
    if (folder / ARCHIVE).is_file():
        return from_archive(folder / ARCHIVE)
    for path in (folder / "cifar-10-python.tar.gz", folder / "data_batch_1", folder / _PYTHON):
        if path.exists():
            raise _pickled(path)
    return None


def from_archive(path: Path) -> Source:
    digest = sha256(path)
    return Source([digest], lambda: _decode(path, _members(path, content(path, digest))), path)


def _from_batches(folder: Path) -> Source:
    paths = sorted(path for path in folder.iterdir() if path.name in _WANTED and path.is_file())
    digests = {path: sha256(path) for path in paths}
    identity = [[path.name, digest] for path, digest in digests.items()]
    return Source(
        identity, lambda: _decode(folder, {path.name: content(path, digest) for path, digest in digests.items()})
    )


def _pickled(path: Path) -> UserError:
    return UserError(
        f"{path}: CIFAR-10's python archive holds pickles, which are not read; expected {ARCHIVE}, parquet files or "
        f"train/CLASS/*.png and test/CLASS/*.png"
    )


def _members(path: Path, archive: bytes) -> dict[str, bytes]:
    """Content of the wanted members by file name."""
    wanted = re.compile(rf"(\./)?{_FOLDER}/({'|'.join(map(re.escape, sorted(_WANTED)))})")
    members: dict[str, bytes] = {}
    try:
        with (
            gzip.open(io.BytesIO(archive)) as unzipped,
            tarfile.open(fileobj=unzipped, mode="r:") as bundle,  # type: ignore[arg-type,unused-ignore]
        ):
            for member in bundle:
                if member.name.removeprefix("./").startswith(f"{_PYTHON}/"):
                    raise _pickled(path)
                if not wanted.fullmatch(member.name):
                    continue
                name = member.name.rsplit("/", 1)[-1]
                if not member.isreg():
                    raise UserError(f"{path}: member {member.name!r} is a link or a device, not a file")
                if member.size > _LARGEST_MEMBER:
                    raise UserError(f"{path}: member {member.name!r} says that it has {member.size:,} bytes; not read")
                file = bundle.extractfile(member)
                assert file is not None  # only links and devices give none
                members[name] = file.read()
                if len(members[name]) != member.size:
                    raise UserError(f"{path}: damaged ({member.name} ends too early)")
            while unzipped.read(1 << 20):  # to the end, where its checksum is
                pass
    # ValueError, OverflowError: broken pax headers
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: not a .tar.gz archive, or damaged ({error})") from None
    return members


def _decode(where: Path, members: Mapping[str, bytes]) -> tuple[dict[str, Arrays], list[str]]:
    """Images of the batches, in the order of the files."""
    splits: dict[str, Arrays] = {}
    for split, batches in _BATCHES.items():
        for name in batches:
            if name not in members:
                raise UserError(f"{where}: no CIFAR-10 archive: {name} is missing")
        parts = [_batch(f"{where}: {name.removesuffix('.bin')}", members[name]) for name in batches]
        splits[split] = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
    names = members.get(_NAMES, b"").decode(errors="replace").split() or list(CIFAR10)
    check_labels(where, splits, len(names))
    return splits, names


def _batch(where: str, data: bytes) -> Arrays:
    """Records of one byte of label and 3,072 of pixels: red, green, blue, each row by row."""
    record = 1 + 3 * _SIDE * _SIDE
    if not data or len(data) % record:
        raise UserError(f"{where} has {len(data):,} bytes; expected records of {record:,} (label, 32 x 32 pixels)")
    rows = np.frombuffer(data, np.uint8).reshape(-1, record)
    return rows[:, 1:].reshape(-1, 3, _SIDE, _SIDE), rows[:, 0].astype(np.int64)
