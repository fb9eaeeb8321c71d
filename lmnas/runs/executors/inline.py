"""Calls one after the other, in this process."""

from collections.abc import Iterable, Iterator
from typing import Any

from lmnas.core.errors import Interrupted
from lmnas.runs.executors.base import Call, Executor, perform


class Inline(Executor):
    """One call at a time, in this process."""

    default_from = 1

    def run(self, calls: Iterable[Call | None]) -> Iterator[tuple[str, Any]]:
        for call in calls:
            if self.stop():
                raise Interrupted
            if call is not None:
                yield call.name, perform(call, self.setup, self.report, self.stop)
