"""Files that survive a kill: written beside their place, flushed to disk and renamed; log lines appended whole."""

import contextlib
import errno
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmnas.core.errors import UserError

WRITE_ATTEMPTS = 3
"""Number of write attempts before an error ends the run: a file system may be full or away for a moment."""
PAUSE_SECONDS = 1.0
"""Seconds between attempts."""


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
    """Message to the user when the disk is full or away."""
    return (
        f"{path}: cannot be written ({error.strerror or error}); what was saved before is intact. Make room or repair "
        f"the disk, then run the same command again to continue"
    )


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace `path` whole or not at all.

    Raises:
        UserError: it cannot be written; the previous content is untouched.
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


def write_json(path: Path, document: Any) -> None:
    write_atomic(path, json.dumps(document, indent=2) + "\n")


def digest(data: bytes) -> str:
    """First 16 hex digits of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]
