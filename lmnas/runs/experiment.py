"""The experiment: search -> select -> train -> test -> report, each stage in a file of its own.

Every stage reads what the earlier ones recorded and adds to it; each can be repeated or resumed on its own.
"""

import time
from collections.abc import Callable
from typing import Any

from lmnas.core.errors import UserError
from lmnas.core.files import write_json
from lmnas.core.text import seconds_text
from lmnas.report.html import write_report
from lmnas.runs import export
from lmnas.runs.directory import Run
from lmnas.runs.driver import Driver
from lmnas.runs.environment import environment
from lmnas.runs.progress import Display
from lmnas.runs.results import collect
from lmnas.runs.search import search
from lmnas.runs.select import select
from lmnas.runs.start import Start, open_checked, settle_kernel


class Experiment:
    """One open run and its stages.

    Args:
        run: an open run directory.
        display: where progress goes.
        started: the start of this run; default: made now.
    """

    def __init__(self, run: Run, display: Display, started: Start | None = None):
        self.run = run
        self.display = display
        self.started = started or open_checked(run.recipe, run.path, run.asked_kernel)
        self.driver = Driver(run, self.started, display)

    def run_stages(self, stages: "tuple[str, ...] | None" = None) -> dict[str, Any]:
        """Go through `stages` (default: all) in order, continuing where an earlier start stopped.

        Returns:
            The run's results.

        Raises:
            Interrupted: the user asked to stop; everything is saved.
        """
        stages = STAGES if stages is None else stages
        self._check_data()
        if set(stages) != {"report"}:
            settle_kernel(self.started, self.run, self.display.message, self.driver.incident)
        document = {**self.environment(), "data": self.started.opened.task.data()}
        write_json(self.run.path / "environment.json", document)
        self.run.note("start", stages=list(stages), environment=document)
        with self.driver.executing(), self.driver.stop:
            for stage in stages:
                began = time.monotonic()
                DO[stage](self.driver)
                if stage != "report":
                    self._write_results()
                self.display.message(f"{stage}: done in {seconds_text(time.monotonic() - began)}")
        self.run.note("finished", stages=list(stages))
        return self.run.results()

    def environment(self) -> dict[str, Any]:
        """Everything that this run's results depend on besides the recipe."""
        return environment(self.started.opened.device, self.driver.threads, self.run.path)

    def reload(self) -> dict[str, Any]:
        """Load the saved model as its user would and test it again: {"value", "recorded", "difference"}."""
        return export.reload(self.driver)

    def _check_data(self) -> None:
        """A run belongs to one text: scores on another must not mix with it."""
        stored = self.run.results().get("data", {}).get("fingerprint")
        found = self.started.opened.task.data()["fingerprint"]
        if stored is not None and stored != found:
            raise UserError(
                f"run {self.run.path}: its data had fingerprint {stored}, the data found now has {found}; "
                f"give another --run to start anew"
            )
        self._write_results()

    def _write_results(self) -> None:
        self.run.write_results(collect(self.run, self.started.opened, self.environment()))


def report(driver: Driver) -> None:
    """Write report.html."""
    write_report(driver.run.path)


DO: dict[str, Callable[[Driver], None]] = {
    "search": search,
    "select": select,
    "train": export.train,
    "test": export.test,
    "report": report,
}
STAGES = tuple(DO)
