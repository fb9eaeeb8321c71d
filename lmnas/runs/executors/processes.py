"""Calls side by side in worker processes of this machine.

Each worker has a socket of its own and nothing else in common with anybody: no lock, no shared memory, no module of the
program that started it. Whoever is killed, the others go on.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from multiprocessing import Pipe, connection
from typing import Any

from lmnas.core.errors import Interrupted, UserError
from lmnas.core.updates import Incident, Report, Stop
from lmnas.runs.executors import wire
from lmnas.runs.executors.base import Call, Executor, Setup

MAX_LOST = 3
"""Workers that one call may lose (killed, out of memory) before the run gives up."""
POLL_SECONDS = 0.2
"""Longest time until a wish to stop is heard."""


class Worker:
    """The driver's side of one worker process."""

    def __init__(self, setup: Setup):
        self.call: Call | None = None
        self.asked = False
        ours, theirs = Pipe()
        # the worker inherits blocked signals, which are the driver's to hear, until it can ignore them by itself
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "lmnas.runs.executors.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": _module_path(), **setup.environment},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            theirs.close()
        self.connection = ours
        with contextlib.suppress(OSError):  # it died already: its first call will find out
            wire.send(ours, setup=asdict(setup))

    def start(self, call: Call) -> None:
        self.call = call
        with contextlib.suppress(OSError):
            wire.send(self.connection, call=asdict(call))

    def ask_to_stop(self) -> None:
        if not self.asked:
            self.asked = True
            with contextlib.suppress(OSError):
                wire.send(self.connection, stop=True)

    def end(self) -> None:
        """Close its socket, at which it leaves."""
        self.connection.close()
        self.process.wait()


def _module_path() -> str:
    """Module search path of this process, as PYTHONPATH of another one."""
    folders = [os.path.abspath(entry) for entry in sys.path]
    return os.pathsep.join(dict.fromkeys(folders))


class Processes(Executor):
    """Calls side by side, each in a process of this machine; a call whose worker died runs once more."""

    default_from = 2

    def __init__(self, workers: int, setup: Setup, report: Report, stop: Stop):
        super().__init__(workers, setup, report, stop)
        self.capacity = workers
        self.workers: list[Worker] = []

    def run(self, calls: Iterable[Call | None]) -> Iterator[tuple[str, Any]]:
        waiting, again, lost = iter(calls), deque[Call](), dict[str, int]()
        try:
            more = True
            while True:
                more = self._hand_out(waiting, again) if more or again else False
                if not self._busy():
                    break
                yield from self._answers(again, lost)
                if self.stop():
                    break
            if self.stop():
                yield from self._finish(again, lost)
                raise Interrupted
        finally:
            self._settle()

    def _hand_out(self, waiting: Iterator[Call | None], again: deque[Call]) -> bool:
        """Give calls to idle workers, starting workers as needed; False: there are no further ones."""
        while len(self._busy()) < self.capacity and not self.stop():
            if again:
                call: Call | None = again.popleft()
            else:
                try:
                    call = next(waiting)
                except StopIteration:
                    return False
            if call is None:
                return True
            idle = next((worker for worker in self.workers if worker.call is None), None)
            if idle is None:
                idle = Worker(self.setup)
                self.workers.append(idle)
            idle.start(call)
        return True

    def _busy(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.call is not None]

    def _answers(self, again: deque[Call], lost: dict[str, int]) -> Iterator[tuple[str, Any]]:
        """Wait a little; yield the results that came. Calls of dead workers go to `again`."""
        busy = self._busy()
        ready = connection.wait([worker.connection for worker in busy], timeout=POLL_SECONDS)
        for worker in [worker for worker in busy if worker.connection in ready]:
            call = worker.call
            assert call is not None
            try:
                message = wire.receive(worker.connection)
            except (EOFError, OSError):
                self._bury(worker)
                again.append(call)
                self._count(call.name, lost)
                continue
            if "update" in message:
                with contextlib.suppress(UserError):  # a full disk: it ends the run where results are written
                    self.report(wire.read_update(message["update"]))
                continue
            worker.call = None
            if "error" in message:
                raise wire.read_error(message["error"])
            yield call.name, message["result"]

    def _bury(self, worker: Worker) -> None:
        self.workers.remove(worker)
        worker.process.kill()
        worker.end()

    def _count(self, name: str, lost: dict[str, int]) -> None:
        if self.stop():
            return
        lost[name] = lost.get(name, 0) + 1
        if lost[name] > MAX_LOST:
            raise UserError(
                f"workers died {lost[name]} times while doing {name} (killed for want of memory?); fewer "
                f"execution.workers may help, then run the same command again to continue"
            )
        with contextlib.suppress(UserError):
            self.report(Incident("driver", "a worker died; its job starts again from its checkpoint"))

    def _finish(self, again: deque[Call], lost: dict[str, int]) -> Iterator[tuple[str, Any]]:
        """Ask the workers to stop, and yield what they finish nevertheless."""
        while busy := self._busy():
            for worker in busy:
                worker.ask_to_stop()
            with contextlib.suppress(Interrupted):
                yield from self._answers(again, lost)
        self._dismiss()

    def _settle(self) -> None:
        """After an error or an early end: let no call of this run go on."""
        while busy := self._busy():
            for worker in busy:
                worker.ask_to_stop()
            with contextlib.suppress(Exception):  # the first error is the one that counts
                for _ in self._answers(deque(), {}):
                    pass
        self._dismiss()

    def _dismiss(self) -> None:
        """Workers that were told to stop do no further calls."""
        for worker in [worker for worker in self.workers if worker.asked]:
            self.workers.remove(worker)
            worker.end()

    def close(self) -> None:
        self._settle()
        for worker in self.workers:
            worker.connection.close()
        for worker in self.workers:
            worker.process.wait()
        self.workers = []
