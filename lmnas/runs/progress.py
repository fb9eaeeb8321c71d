"""Progress on standard error: bars with time left on a terminal, plain lines elsewhere."""

import contextlib
import os
import signal
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lmnas.core.text import seconds_text
from lmnas.core.updates import Incident, Update

LINE_SECONDS = 15.0
"""Least time in seconds between plain lines of one job."""


class Display:
    """Shows the updates that jobs send (`lmnas.core.job.Job`), and the driver's own messages."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.console = Console(stderr=True, soft_wrap=True)
        self.bars: Progress | None = None
        self.tasks: dict[str, TaskID] = {}
        self.started: dict[str, float] = {}
        self.printed: dict[str, float] = {}

    def __enter__(self) -> "Display":
        if self.console.is_terminal and not self.quiet:
            self.bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=self.console,
                transient=True,
            )
            self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bars:
            with contextlib.suppress(OSError):
                self.bars.stop()

    def message(self, text: str) -> None:
        if not self.quiet:
            with contextlib.suppress(OSError):  # nobody reads it, and the work goes on
                self.console.print(text, markup=False, highlight=False)

    def update(self, update: Update) -> None:
        """One update of a job; an incident is shown even when quiet, since it tells of trouble."""
        if isinstance(update, Incident):
            say(f"{update.job}: {update.message}")
        elif not self.quiet:
            with contextlib.suppress(OSError):
                self._progress(update.job, update.done, update.total, update.text)

    def _progress(self, job: str, done: float, total: float, text: str) -> None:
        if self.bars:
            if job not in self.tasks:
                self.tasks[job] = self.bars.add_task(job, total=total, text=text)
            self.bars.update(self.tasks[job], completed=done, total=total, text=text)
            if done >= total:
                self.bars.update(self.tasks[job], visible=False)
            return
        now = time.monotonic()
        start = self.started.setdefault(job, now)
        if now - self.printed.get(job, start - LINE_SECONDS / 2) >= LINE_SECONDS:
            self.printed[job] = now
            left = f", {seconds_text((now - start) * (total - done) / done)} left" if done > 0 and now > start else ""
            say(f"{job}: {done / total:.0%}{left}, {text}")


def say(line: str) -> None:
    """A line on standard error; where that is full or closed, the line is lost and the work goes on."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


class Stop:
    """Ctrl-C and SIGTERM ask for a stop inside the block; one that comes later than the first does not wait.

    `timeout` and process managers send a signal to the process and then to its group: two at once are one.
    """

    TOGETHER = 1.0
    """Seconds in which the same signal counts once."""

    def __init__(self, display: Display):
        self.display = display
        self.asked = False
        self.first: tuple[int, float] | None = None
        """The signal that asked, and when."""
        self.previous: dict[int, Any] = {}

    def _ask(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.first is not None:
            if number == self.first[0] and now - self.first[1] < self.TOGETHER:
                return
            os._exit(130)
        self.first, self.asked = (number, now), True
        self.display.message("stopping: saving the state (once more to leave at once) ...")

    def __enter__(self) -> "Stop":
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for number in (int(signal.SIGINT), int(signal.SIGTERM)):
                self.previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}
