"""Text corpora for language modelling: train, valid and test as memory-mapped token ids.

Names:
    pydoc: the help topics that CPython ships (`pydoc_data.topics`): needs no network. Paragraphs that several topics
        repeat are kept once, ruled lines are dropped, and each topic goes to a split by a hash of its name (about
        80/10/10 of the tokens). Case is kept. The text differs between Python versions; the fingerprint says which.
    ptb, wikitext-2, wikitext-103: from a local folder or downloaded; see `open_corpus`.
    anything else: a path to a text file or to a folder with train, valid and test files (`./ptb` is a path).

Tokenizers, all reading any newline convention, the last newline being optional:
    whitespace: what stands between whitespace, and `<eos>` at each line's end, blank lines included (the convention
        behind the published counts of PTB and WikiText).
    words: numbers, words with inner apostrophes, punctuation marks one by one; `<eos>` ends each line but blank ones.
    level "char": every character is a token, blanks too; a line's end is `<eos>`; a written `<unk>` is five characters.

Vocabulary: counted over train alone; over all splits for ptb and wikitext, whose published vocabularies are that.
`<unk>` is in it, except in a published text that has none.
"""

import codecs
import hashlib
import io
import json
import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO

import numpy as np
import torch

from lmnas.core import places
from lmnas.core.errors import UserError, nearest
from lmnas.tasks.data.download import PUBLISHED, SPLITS, STEMS, published, pydoc_texts, split_files

EOS, UNK = "<eos>", "<unk>"
MIN_TOKENS = 20
"""A split below this is refused: a perplexity over a line or two means nothing."""

_VERSION = 1
"""Enters the fingerprint; to be raised when a tokenizer or pydoc's preparation changes."""
_PIECE = 1 << 16
"""Characters read at a time from a line that is longer, so that a text of a single line does not fill the memory."""
_CHUNK = 1 << 18
"""Token ids held before they are written."""

_WORDS = re.compile(r"<unk>|\d+(?:[.,]\d+)*(?!\w)|\w+(?:['’]\w+)*|[^\w\s]")
_TOKENIZERS: dict[str, Callable[[str], list[str]]] = {"whitespace": str.split, "words": _WORDS.findall, "char": list}


@dataclass(frozen=True, eq=False)
class Corpus:
    """A tokenised text.

    Attributes:
        name: `pydoc`, `ptb`, ... or the name of the file or folder.
        fingerprint: 16 hex digits over the source's bytes and every setting that shapes the tokens; not over its path.
        vocabulary: id -> text of the token, by falling frequency, then alphabetically.
        splits: train, valid, test -> (N,) int32 ids in a memory map. The map is private: writing to the tensor never
            reaches the file.
        tokenizer: `whitespace`, `words` or `char`.
        unknown_rate: valid, test -> share of the tokens that are `<unk>`, those written so in the text included.
    """

    name: str
    fingerprint: str
    vocabulary: list[str]
    splits: dict[str, torch.Tensor]
    tokenizer: str = "whitespace"
    unknown_rate: dict[str, float] = field(default_factory=dict)
    max_train_tokens: int | None = None

    @cached_property
    def index(self) -> dict[str, int]:
        """Token text -> id."""
        return {token: number for number, token in enumerate(self.vocabulary)}

    def info(self) -> dict[str, Any]:
        """Data section of a result: name, fingerprint, sizes."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "tokens": {split: len(ids) for split, ids in self.splits.items()},
            "vocabulary": len(self.vocabulary),
            "level": "char" if self.tokenizer == "char" else "word",
            "unknown_rate": dict(self.unknown_rate),
            "max_train_tokens": self.max_train_tokens,
        }

    def encode(self, text: str) -> torch.Tensor:
        """(N,) int32 ids of new text; every line, the last too, ends in `<eos>`.

        Raises:
            UserError: a token is not in the vocabulary, and neither is `<unk>`.
        """
        ids: list[int] = []
        for tokens in _Part(lambda: io.StringIO(text, newline=None)).tokens(self.tokenizer):
            for token in tokens:
                number = self.index.get(token, self.index.get(UNK))
                if number is None:
                    raise UserError(f"{token!r} is not in the vocabulary of {self.name}, which has no {UNK} token")
                ids.append(number)
        return torch.tensor(ids, dtype=torch.int32)


def open_corpus(
    data: str,
    *,
    level: Literal["word", "char"] = "word",
    tokenizer: Literal["whitespace", "words"] | None = None,
    min_count: int | None = None,
    max_vocabulary: int | None = None,
    split: tuple[float, float, float] = (0.8, 0.1, 0.1),
    max_train_tokens: int | None = None,
) -> Corpus:
    """Open a corpus by name or path, tokenising it on the first call.

    The text is read in two passes (count, encode), line by line, and never held whole.

    Args:
        tokenizer: None: `whitespace` for ptb and wikitext, `words` for the rest.
        min_count: rarer words become `<unk>`. None: 2 for pydoc, else 1.
        max_vocabulary: keep the most frequent, so that the vocabulary with `<eos>` and `<unk>` has at most this size.
        split: shares of train, valid, test, for a single file: each line goes, in order, to the split in whose share
            of the characters it starts.
        max_train_tokens: only the first of train; the vocabulary stays that of the whole train text.

    ptb and wikitext are looked for, and downloaded to, folders of that name (`penn-treebank`, too) in `places.data()`;
    token ids are kept in `places.cache("corpora")`, a folder per fingerprint.

    Raises:
        UserError: unknown name, bad settings, unreadable or unsuitable text, failed download, unwritable cache.
    """
    _check(level, tokenizer, split)
    for key, value, least in (
        ("min_count", min_count, 1),
        ("max_vocabulary", max_vocabulary, 4),  # <eos>, <unk> and two words
        ("max_train_tokens", max_train_tokens, MIN_TOKENS),
    ):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise UserError(f"{key} is {value!r}; expected an integer of at least {least}")
    name = data
    if data == "pydoc":
        texts = pydoc_texts()
        parts = {key: _Part(partial(io.StringIO, text)) for key, text in texts.items()}
        source = [hashlib.sha256(text.encode()).hexdigest() for text in texts.values()]
    elif data in PUBLISHED:
        parts, source = _from_folder(published(data, places.data()))
    else:
        path = _existing(data)
        name = path.resolve().name
        parts, source = _from_folder(path) if path.is_dir() else _from_file(path, split)
    rule = "char" if level == "char" else tokenizer or ("whitespace" if data in PUBLISHED else "words")
    settings: dict[str, Any] = {
        "version": _VERSION,
        "source": source,
        "tokenizer": rule,
        "min_count": min_count or (2 if data == "pydoc" else 1),
        "max_vocabulary": max_vocabulary,
        "max_train_tokens": max_train_tokens,
        "counted": list(SPLITS) if data in PUBLISHED else ["train"],
    }
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    folder = places.cache("corpora") / fingerprint
    meta, ids = _load(folder) or _build(folder, name, parts, settings)
    return Corpus(name, fingerprint, meta["vocabulary"], ids, rule, meta["unknown_rate"], max_train_tokens)


def _check(level: str, tokenizer: str | None, split: Sequence[float]) -> None:
    if level not in ("word", "char"):
        raise UserError(f"level {level!r} is unknown. {nearest(level, ['word', 'char'])}")
    if tokenizer not in (None, "whitespace", "words"):
        raise UserError(f"tokenizer {tokenizer!r} is unknown. {nearest(tokenizer, ['whitespace', 'words'])}")
    if tokenizer is not None and level == "char":
        raise UserError(f"tokenizer {tokenizer!r} was given with level 'char', which has no use for one")
    numbers = [share for share in split if isinstance(share, int | float) and share > 0]
    if len(numbers) != 3 or len(split) != 3 or abs(sum(numbers) - 1) > 1e-6:
        raise UserError(f"split is {split!r}; expected three positive fractions that add up to 1")


@dataclass(frozen=True)
class _Part:
    """One split's text: the pieces of a stream that start at characters `start` to `stop`."""

    open: Callable[[], TextIO]
    start: float = 0.0
    stop: float = float("inf")
    changed: Callable[[], bool] = lambda: False
    """True if the text is no longer the one whose digest enters the fingerprint."""

    def tokens(self, tokenizer: str) -> Iterator[list[str]]:
        """The tokens of one line, or of a piece of a very long one, at a time."""
        tokenize = _TOKENIZERS[tokenizer]
        with self.open() as stream:
            for position, text, ends_line in _pieces(stream):
                if position >= self.stop:
                    return
                if position < self.start:
                    continue
                tokens = tokenize(text)
                if ends_line and (tokens or tokenizer != "words"):
                    tokens.append(EOS)
                yield tokens


_Source = tuple[dict[str, _Part], list[Any]]
"""The splits' text, and values that identify it."""
_Entry = tuple[dict[str, Any], dict[str, torch.Tensor]]
"""Content of the cache: the metadata, and split -> ids."""


def _pieces(stream: TextIO) -> Iterator[tuple[int, str, bool]]:
    """(position, text, True if a line ends after it): lines, and pieces of a line that is longer than _PIECE."""
    position, carry = 0, ""
    while read := stream.readline(_PIECE):
        text, cut = carry + read, 0
        if text.endswith("\n"):
            cut = len(text)
            yield position, text[:-1], True
        elif len(read) == _PIECE:
            # Before the last word, not after it, so that the rest of the line is never blank.
            cut = text.rstrip().rfind(" ") + 1
            if cut:
                yield position, text[:cut], False
        position, carry = position + cut, text[cut:]
    if carry:
        yield position, carry, True


def _open(path: Path) -> TextIO:
    try:  # utf-8-sig: the mark that Windows editors put before the first character is not text
        return path.open(encoding="utf-8-sig", newline=None)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _scan(path: Path) -> tuple[str, int]:
    """sha256 of the bytes; characters of the text with every line ended by one newline. Refuses non-text files."""
    digest, n_bytes, n_characters, last = hashlib.sha256(), 0, 0, ""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    try:
        with path.open("rb") as file:
            block = b" "
            while block:
                block = file.read(1 << 20)
                if (nul := block.find(b"\0")) >= 0:
                    raise UserError(f"{path} is not UTF-8 text: NUL byte at offset {n_bytes + nul}")
                digest.update(block)
                n_bytes += len(block)
                text = decoder.decode(block, final=not block)
                n_characters += len(text)
                last = text[-1:] or last
    except UnicodeDecodeError as error:
        # The decoder's object is the end of what was read so far: the block and what it had kept of the one before.
        offset = n_bytes - len(error.object) + error.start
        byte = error.object[error.start]
        raise UserError(f"{path} is not UTF-8 text: byte 0x{byte:02x} at offset {offset}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not n_characters:
        raise UserError(f"{path} is empty; expected text")
    return digest.hexdigest(), n_characters + (last != "\n")


def _state(path: Path) -> tuple[int, ...]:
    """Identity of a file, equal if it was neither written to nor replaced in between."""
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _watch(path: Path) -> Callable[[], bool]:
    """A function that is true once the file was written to or replaced after this call."""
    before = _state(path)
    return lambda: _state(path) != before


def _from_file(path: Path, split: tuple[float, float, float]) -> _Source:
    changed = _watch(path)
    digest, n_characters = _scan(path)
    bounds = (0.0, split[0] * n_characters, (split[0] + split[1]) * n_characters, float("inf"))
    parts = {name: _Part(partial(_open, path), bounds[i], bounds[i + 1], changed) for i, name in enumerate(SPLITS)}
    return parts, [digest, *split]


def _from_folder(folder: Path) -> _Source:
    files = split_files(folder)
    for split in SPLITS:
        if split not in files:
            names = " or ".join(f"{stem}.txt" for stem in STEMS[split])
            raise UserError(f"folder {folder} lacks its {split} file; expected {names}")
    parts = {name: _Part(partial(_open, path), changed=_watch(path)) for name, path in files.items()}
    return parts, [_scan(path)[0] for path in files.values()]


def _existing(data: str) -> Path:
    try:
        path = Path(data).expanduser()
        if data and (path.is_file() or path.is_dir()):
            return path
    except (OSError, RuntimeError):  # a name too long for a path; no home for ~
        pass
    known = nearest(data, ["pydoc", *PUBLISHED])
    raise UserError(f"data {data!r} is neither a known corpus nor an existing text file or folder. {known}")


def _load(folder: Path) -> _Entry | None:
    """A complete cache entry; None if there is none, or it is broken."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        ids = {}
        for split in SPLITS:
            # Mode c, copy on write: the file is opened for reading alone, yet torch takes the array without the
            # warning (and the crash on writing) that it has for a read-only one.
            array = np.load(folder / f"{split}.npy", mmap_mode="c")
            if array.shape != (meta["tokens"][split],) or array.dtype != np.int32:
                return None
            ids[split] = torch.from_numpy(array)
        meta["vocabulary"], meta["unknown_rate"]["valid"], meta["unknown_rate"]["test"]
        return meta, ids
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None


def _build(folder: Path, name: str, parts: Mapping[str, _Part], settings: Mapping[str, Any]) -> _Entry:
    """Tokenise into `folder`. An entry's content follows from its name, and files are replaced whole: processes that
    build the same one at once write the same bytes over each other."""
    rule = settings["tokenizer"]
    counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    for split in SPLITS:
        for tokens in parts[split].tokens(rule):
            counts[split].update(tokens)
        if (n_tokens := counts[split].total()) < MIN_TOKENS:
            raise UserError(f"the {split} split of {name} has {n_tokens} tokens; expected at least {MIN_TOKENS}")
    vocabulary = _vocabulary(name, counts, settings)
    index = {token: number for number, token in enumerate(vocabulary)}
    sizes = {split: counts[split].total() for split in SPLITS}
    sizes["train"] = min(sizes["train"], settings["max_train_tokens"] or sizes["train"])
    unknown = {}
    for split in ("valid", "test"):
        outside = sum(count for token, count in counts[split].items() if token == UNK or token not in index)
        unknown[split] = outside / sizes[split]
    meta = {"vocabulary": vocabulary, "tokens": sizes, "unknown_rate": unknown}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            with replacing(folder / f"{split}.npy") as file:
                whole = _write(file, parts[split].tokens(rule), index, sizes[split])
                if not whole or any(part.changed() for part in parts.values()):
                    raise UserError(f"the {split} text of {name} changed while it was read; try again")
        with replacing(folder / "meta.json") as file:  # last: it says that the entry is complete
            file.write(json.dumps(meta).encode())
    except OSError as error:
        raise UserError(f"cannot write the token cache {folder} ({error.strerror}); set LMNAS_CACHE") from error
    if (entry := _load(folder)) is None:
        raise UserError(f"the token cache {folder} cannot be read back; set LMNAS_CACHE")
    return entry


def _by_falling(frequency: Mapping[str, int], tokens: Iterable[str]) -> list[str]:
    return sorted(tokens, key=lambda token: (-frequency[token], token))


def _vocabulary(name: str, counts: Mapping[str, Counter[str]], settings: Mapping[str, Any]) -> list[str]:
    counted: Counter[str] = Counter()
    for split in settings["counted"]:
        counted.update(counts[split])
    types = set().union(*counts.values()) - {EOS, UNK}
    least, limit = settings["min_count"], settings["max_vocabulary"]
    kept = [token for token in _by_falling(counted, types) if counted[token] >= least]
    # a vocabulary counted on the training split alone must be ready for new words in text to come
    open_ended = set(settings["counted"]) != set(SPLITS)
    needs_unknown = open_ended or len(kept) < len(types) or any(UNK in counter for counter in counts.values())
    if limit is not None and 1 + needs_unknown + len(kept) > limit:
        needs_unknown, kept = True, kept[: limit - 2]
    if len(kept) < 2:  # <eos> and <unk> aside: a text without anything to predict
        raise UserError(f"{name}: distinct tokens that occur {least} times or more: {len(kept)}; expected at least 2")
    frequency = {token: counted[token] for token in (EOS, *kept)}
    if needs_unknown:
        frequency[UNK] = counted.total() - sum(frequency.values())
    return _by_falling(frequency, frequency)


def _write(file: BinaryIO, lines: Iterator[list[str]], index: Mapping[str, int], n_tokens: int) -> bool:
    """Write the ids of the first `n_tokens` as .npy; False where there are fewer, or one has no id."""
    np.lib.format.write_array_header_1_0(file, {"descr": "<i4", "fortran_order": False, "shape": (n_tokens,)})
    left, known, unknown = n_tokens, True, index.get(UNK, -1)
    while left:
        ids: list[int] = []
        while len(ids) < min(_CHUNK, left) and (tokens := next(lines, None)) is not None:
            ids += [index.get(token, unknown) for token in tokens]
        array = np.asarray(ids[:left], "<i4")
        if not len(array):
            return False
        left, known = left - len(array), known and bool((array >= 0).all())
        file.write(array.tobytes())
    return known


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file under a name of its own, renamed to `path` when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
