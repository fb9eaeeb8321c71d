"""Files that survive a kill: written beside, flushed to disk and renamed into place; checkpoints carry their digest."""

import contextlib
import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from lmnas.core.errors import UserError

WRITE_ATTEMPTS = 3
"""Writing is tried so often before an error ends the run: a file system may be full or away for a moment."""
PAUSE_SECONDS = 1.0
"""Between attempts."""


def _attempt(path: Path, write: Callable[[], None]) -> None:
    """Raises UserError with the last error after `WRITE_ATTEMPTS` tries."""
    for attempt in range(1, WRITE_ATTEMPTS + 1):
        try:
            return write()
        except OSError as error:
            if attempt == WRITE_ATTEMPTS:
                raise UserError(not_written(path, error)) from error
            time.sleep(PAUSE_SECONDS)


def not_written(path: Path, error: OSError) -> str:
    """What to tell the user when the disk is full or away."""
    return (
        f"{path}: cannot be written ({error.strerror or error}); what was saved before is intact. Make room or repair "
        f"the disk, then run the same command again to continue"
    )


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace `path` whole or not at all.

    Raises:
        UserError: it cannot be written; what stood there before is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    # always the same name, so that a continued run writes over what a kill left behind
    beside = path.with_name(f".{path.name}.tmp")

    def write() -> None:
        try:
            with open(beside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise
        # the rename itself must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    _attempt(path, write)


def move_into_place(beside: Path, path: Path) -> None:
    """Rename a whole file that another library wrote `beside` its place.

    Raises:
        UserError: it cannot be done.
    """
    _attempt(path, lambda: os.replace(beside, path))


def append_line(path: Path, line: str) -> None:
    """Add one line to a log; a part of it that a failed attempt wrote is taken back.

    Raises:
        UserError: it cannot be written.
    """
    data = line.encode() + b"\n"

    def write() -> None:
        with open(path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                written = file.write(data)
                if written != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)
                raise

    _attempt(path, write)


PREPARED = "prepared.safetensors"
"""What an estimator's `prepare` leaves in its job's directory."""


def write_json(path: Path, document: Any) -> None:
    write_atomic(path, json.dumps(document, indent=2) + "\n")


def digest(data: bytes) -> str:
    """First 16 hex digits of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------ checkpoints


def pack(state: Any) -> bytes:
    """Nested dicts and lists of tensors, numbers, texts and None as one safetensors file (no pickles).

    Tensors become entries `0`, `1`, ...; the structure around them travels as JSON in the header.
    """
    tensors: dict[str, Tensor] = {}

    def skeleton(value: Any) -> Any:
        if isinstance(value, Tensor):
            key = str(len(tensors))
            # a copy: safetensors refuses two entries that share memory
            tensors[key] = value.detach().to("cpu", copy=True).contiguous()
            return {"t": key}
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, (bool, int, float, str, type(None))):
                    raise TypeError(f"a checkpoint cannot hold a dict with a key of type {type(key).__name__}")
            return {"d": [[key, skeleton(item)] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            return {"l" if isinstance(value, list) else "u": [skeleton(item) for item in value]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")

    document = json.dumps(skeleton(state))
    return save_tensors(tensors, {"state": document})


def unpack(data: bytes) -> Any:
    """The inverse of `pack`; tensors come back on the CPU."""
    # the header is 8 bytes of length, then JSON
    length = int.from_bytes(data[:8], "little")
    document = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["state"])
    tensors = load_tensors(data)

    def restore(value: Any) -> Any:
        if isinstance(value, dict):
            ((kind, content),) = value.items()
            if kind == "t":
                return tensors[content]
            if kind == "d":
                return {key: restore(item) for key, item in content}
            items = [restore(item) for item in content]
            return items if kind == "l" else tuple(items)
        return value

    return restore(document)


class Checkpoints:
    """The checkpoints of one job: `000012-<digest>.safetensors`, newest last, the last two kept.

    A name holds the digest of its content, so one rename makes a checkpoint whole and verifiable. An extra one written
    when the user interrupts is marked: recovery from NaN must not depend on when somebody pressed Ctrl-C.
    """

    PATTERN = re.compile(r"(\d{6})(-extra)?-([0-9a-f]{16})\.safetensors")

    def __init__(self, directory: Path, warn: Callable[[str], None]):
        self.directory = directory
        self.warn = warn

    def _found(self) -> list[tuple[int, bool, str, Path]]:
        """(index, extra, digest, path), oldest first."""
        if not self.directory.is_dir():
            return []
        matches = [(self.PATTERN.fullmatch(path.name), path) for path in self.directory.iterdir()]
        return sorted((int(m[1]), bool(m[2]), m[3], path) for m, path in matches if m)

    def save(self, state: Any, *, extra: bool = False) -> None:
        """Write `state`; `extra` marks one that was not due. `state["index"]` orders them."""
        self.directory.mkdir(parents=True, exist_ok=True)
        data = pack(state)
        name = f"{state['index']:06d}{'-extra' if extra else ''}-{digest(data)}.safetensors"
        write_atomic(self.directory / name, data)
        found = self._found()
        # one of this number or a later one is broken: work goes on from before it
        before = [path for index, is_extra, _, path in found if not is_extra and index < state["index"] + extra]
        keep = {*before[-1 - extra :], self.directory / name}
        for _, _, _, path in found:
            if path not in keep:
                path.unlink(missing_ok=True)
        self._sweep()

    def load(self, *, due_only: bool = False) -> Any | None:
        """The newest good state, or None. A broken one is named and passed over."""
        broken = 0
        for _, extra, expected, path in reversed(self._found()):
            if extra and due_only:
                continue
            try:
                data = path.read_bytes()
                if digest(data) != expected:
                    raise ValueError("its content does not match its digest")
                return unpack(data)
            except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
                self.warn(f"checkpoint {path} is broken ({error}); it is passed over")
                broken += 1
        if broken:
            self.warn("no good checkpoint is left; starting over")
        return None

    def delete(self) -> None:
        for _, _, _, path in self._found():
            path.unlink(missing_ok=True)
        self._sweep()
        with contextlib.suppress(OSError):
            self.directory.rmdir()

    def _sweep(self) -> None:
        """Remove what a kill left of a checkpoint half written."""
        for path in self.directory.glob(".*.tmp"):
            path.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------- events


class Events:
    """An append-only log of JSON lines with running numbers.

    Work that is repeated after a kill emits its events again; those already on file are not written twice, so the log
    of a continued run equals that of one never killed (but for its wall-clock fields).
    """

    def __init__(self, path: Path):
        self.path = path
        self.number = 0
        """Number of events emitted so far; part of the checkpointed state."""
        self._on_file = self._repair()

    def _repair(self) -> int:
        """Cut a torn last line off and count the rest."""
        if not self.path.exists():
            return 0
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with open(self.path, "r+b") as file:
                file.truncate(whole)
        return data[:whole].count(b"\n")

    def emit(self, event: str, **fields: Any) -> None:
        self.number += 1
        if self.number <= self._on_file:
            return
        line = json.dumps({"seq": self.number, "event": event, "time": round(time.time(), 3), **fields})
        append_line(self.path, line)
        self._on_file = self.number


def read_events(path: Path) -> list[dict[str, Any]]:
    """All whole lines of an event log."""
    if not path.exists():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            events.append(json.loads(line))
    return events


def to_device(value: Any, device: torch.device) -> Any:
    """A nested state with its tensors on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(item, device) for item in value)
    return value
