"""Jobs one after the other, in this process: the default."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lmnas.runs.work import NamedSpec, Report, Workplace


def default_threads(workers: int) -> int:
    """This machine's cores shared among the workers, at most four each: the products are too small for more."""
    return max(1, min(4, len(os.sched_getaffinity(0)) // workers))


class Inline:
    """`run(jobs)` yields (name, result) as jobs finish."""

    def __init__(self, run: Path, device: str, threads: int, report: Report, stop: Callable[[], bool]):
        self.place, self.report, self.stop = Workplace(run, device), report, stop
        torch.set_num_threads(threads)

    def run(self, jobs: list[NamedSpec]) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, spec in jobs:
            yield name, self.place.do(name, spec, self.report, self.stop)

    def close(self) -> None:
        pass
