"""Executors run calls: functions named by text with plain arguments, so that a call can be sent anywhere.

A further executor is one file and one line in the registry. It must run a call once more when a worker is lost, hand
updates and errors over as the values below, and wait for the workers to save when a stop is asked for.
"""

import contextlib
import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from lmnas.core import registry
from lmnas.core.updates import Report, Stop


@dataclass(frozen=True)
class Call:
    """One piece of work, as a value.

    Attributes:
        name: unique among the calls of one `Executor.run`.
        target: `module:function`. It is called as `function(**arguments, report=..., stop=...)`.
        arguments: plain data (what JSON can hold); so is the result.
    """

    name: str
    target: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Setup:
    """Settings of every call of an executor.

    Attributes:
        threads: CPU threads of torch in each call; None: as many as it takes by itself.
        environment: variables that worker processes have besides this process's own.
    """

    threads: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


class Executor(ABC):
    """Runs calls, `capacity` of them at a time.

    Args:
        workers: how many calls may run side by side.
        setup: what holds for all calls.
        report: takes the updates of the calls.
        stop: tells whether a stop was asked for.
    """

    default_from: ClassVar[int | None] = None
    """Least number of workers for which this executor is taken when a recipe names none; None: only when named."""

    capacity: int = 1

    def __init__(self, workers: int, setup: Setup, report: Report, stop: Stop):
        self.setup, self.report, self.stop = setup, report, stop

    @abstractmethod
    def run(self, calls: Iterable[Call | None]) -> Iterator[tuple[str, Any]]:
        """Yield (name, result) as calls finish.

        `calls` is read only while there is room for one more, after the results so far have been yielded, so that it
        may depend on them. It gives None where the next call needs another result first.

        Raises:
            Interrupted: a stop was asked for; the calls that ran have saved.
            UserError: of a call, or a call's workers died again and again.
            Exception: of a call; where it comes from a worker, its text holds type, message and traceback.
        """

    def close(self) -> None:
        """End the workers; those that run a call are asked to stop and may save."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_executor(name: str | None, workers: int, setup: Setup, report: Report, stop: Stop) -> Executor:
    """The executor registered as `name`; without a name the one that fits the number of workers.

    Raises:
        UserError: unknown name.
    """
    if name is not None:
        return registry.component("executor", name)(workers, setup, report, stop)
    known: list[type[Executor]] = [registry.component("executor", each) for each in registry.names("executor")]
    able = [each for each in known if each.default_from is not None and each.default_from <= workers]
    return max(able, key=lambda each: each.default_from or 0)(workers, setup, report, stop)


def perform(call: Call, setup: Setup, report: Report, stop: Stop) -> Any:
    """Do a call in this process, on its number of threads."""
    module, _, function = call.target.partition(":")
    with on_threads(setup.threads):
        return getattr(importlib.import_module(module), function)(**call.arguments, report=report, stop=stop)


@contextlib.contextmanager
def on_threads(threads: int | None) -> Iterator[None]:
    """CPU threads of torch inside the block."""
    if threads is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def default_threads(workers: int) -> int:
    """This machine's cores shared among the workers, at most four each: the products are too small for more."""
    return max(1, min(4, len(os.sched_getaffinity(0)) // workers))
