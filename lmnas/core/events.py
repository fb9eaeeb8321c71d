"""Event logs: append-only JSON lines that repeated work does not write twice."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from lmnas.core.files import append_line


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
