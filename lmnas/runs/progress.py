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

LINE_SECONDS = 15.0
"""Plain lines of one job are at least so far apart."""


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
            self.bars.stop()

    def message(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, markup=False, highlight=False)

    def update(self, update: dict[str, Any]) -> None:
        """One update of a job; a message is shown even when quiet, since it tells of trouble."""
        if "message" in update:
            print(f"{update['job']}: {update['message']}", file=sys.stderr, flush=True)
            return
        if self.quiet:
            return
        job, done, total, text = update["job"], update["done"], update["total"], update["text"]
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
            print(f"{job}: {done / total:.0%}{left}, {text}", file=sys.stderr, flush=True)


class Stop:
    """Ctrl-C and SIGTERM ask for a stop inside the block; the second one does not wait."""

    def __init__(self, display: Display):
        self.display = display
        self.asked = False
        self.previous: dict[int, Any] = {}

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            os._exit(130)
        self.asked = True
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
