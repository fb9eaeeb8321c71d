"""A job: one piece of work that can be killed anywhere and continued exactly.

It owns a directory (`jobs/train-searched-0`) with its checkpoints, its event log and, once done, its result. Jobs are
values: a kind, a recipe and small arguments; tensors travel as checkpoint files.
"""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmnas.core.checkpoints import Checkpoints
from lmnas.core.errors import Interrupted
from lmnas.core.events import Events
from lmnas.core.files import write_json
from lmnas.core.updates import Incident, Progress, Report, Stop, never, silent


class Job:
    """Directory, reporting and stop signal that a job's code may use.

    Args:
        directory: the job's own.
        report: takes progress and incidents.
        stop: tells whether the user asked to stop.
    """

    def __init__(
        self,
        directory: Path,
        report: Report = silent,
        stop: Stop = never,
    ):
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.name = directory.name
        self._report = report
        self._stop = stop
        self.checkpoints = Checkpoints(directory / "checkpoints", self.warn)
        self.events = Events(directory / "events.jsonl")
        self._index = 0
        self._seconds_before = 0.0
        self._started = time.monotonic()

    # ---------------------------------------------------------------------------------------------- saying things

    def progress(self, done: float, total: float, text: str = "") -> None:
        self._report(Progress(self.name, done, total, text))

    def warn(self, message: str) -> None:
        self._report(Incident(self.name, message))

    @property
    def seconds(self) -> float:
        """Seconds of work, lost work left out."""
        return self._seconds_before + time.monotonic() - self._started

    # -------------------------------------------------------------------------------------------- saving and loading

    def save(self, state: dict[str, Any], *, extra: bool = False) -> None:
        """A checkpoint of `state`, with the position in the event log and the seconds spent."""
        self._index += not extra
        self.checkpoints.save(
            {"index": self._index, "events": self.events.number, "seconds": self.seconds, "state": state}, extra=extra
        )

    def load(self) -> dict[str, Any] | None:
        """The newest good state of an earlier start, or None; events and clock continue from there."""
        saved = self.checkpoints.load()
        if saved is None:
            return None
        self._index = saved["index"]
        self.events.number = saved["events"]
        self._seconds_before = saved["seconds"]
        self._started = time.monotonic()
        return saved["state"]

    def last_good(self) -> dict[str, Any] | None:
        """The state to go back to after NaN: the newest checkpoint that was due. Events and clock go on."""
        saved = self.checkpoints.load(due_only=True)
        return None if saved is None else saved["state"]

    def stop_if_asked(self, state: Callable[[], dict[str, Any]]) -> None:
        """Save and leave if the user asked to stop.

        Raises:
            Interrupted
        """
        if self._stop():
            self.save(state(), extra=True)
            raise Interrupted

    # ------------------------------------------------------------------------------------------------------- results

    def write_spec(self, spec: dict[str, Any]) -> None:
        """Write the specification of this job unless an earlier start did."""
        if read_spec(self.directory) is None:
            write_json(self.directory / SPEC, spec)

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Record the result; a job with one is never run again."""
        write_json(self.directory / RESULT, result)
        return result


SPEC, RESULT = "job.json", "result.json"
PREPARED = "prepared.safetensors"
"""Left in its job's directory by an estimator's `prepare`."""


def read_result(directory: Path) -> dict[str, Any] | None:
    """The result of a finished job, or None."""
    return _read(directory / RESULT)


def read_spec(directory: Path) -> dict[str, Any] | None:
    """Specification of a job, or None if it never started."""
    return _read(directory / SPEC)


def _read(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        document = json.loads(path.read_text(encoding="utf-8"))
        return document if isinstance(document, dict) else None
    return None
