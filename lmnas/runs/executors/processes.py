"""Jobs side by side in worker processes of this machine. They carry values: names and specs out, results back.

Driver and workers share pipes alone, never a lock, since a worker killed while it holds one would stop all others.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from lmnas.core.errors import Interrupted, UserError
from lmnas.runs.work import NamedSpec, Report, Workplace

MAX_LOST = 3
"""How often workers may die (killed, out of memory) before the run gives up."""
LONGEST_TEXT = 500
"""Characters of one text in an update. A pipe takes 4096 bytes whole or not at all, whoever else writes to it."""

_stopping = threading.Event()
_updates: Any = None


def _start_worker(threads: int, updates: Any, alive: Any) -> None:
    global _updates
    # the driver hears the signals and tells the workers by closing its end of `alive`
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(threads)
    _updates = updates
    threading.Thread(target=_watch, args=(alive,), daemon=True).start()


def _watch(alive: Any) -> None:
    """Stop when the driver asks for it; leave at once when it was killed, since nobody waits for this work."""
    driver = multiprocessing.parent_process()
    assert driver is not None
    if driver.sentinel not in connection.wait([driver.sentinel, alive]):
        _stopping.set()
        driver.join()
    os._exit(1)


def _report(update: dict[str, Any]) -> None:
    _updates.send({key: value[:LONGEST_TEXT] if isinstance(value, str) else value for key, value in update.items()})


def _work(run: str, name: str, spec: dict[str, Any], device: str) -> dict[str, Any]:
    if _stopping.is_set():
        raise Interrupted
    return Workplace(Path(run), device).do(name, spec, _report, _stopping.is_set)


class Processes:
    """`run(jobs)` yields (name, result) as jobs finish; a job whose worker died runs once more."""

    def __init__(self, run: Path, device: str, threads: int, report: Report, stop: Callable[[], bool], workers: int):
        self.run_path, self.device, self.threads, self.workers = run, device, threads, workers
        self.report, self.stop = report, stop
        self.context = multiprocessing.get_context("spawn")
        self.incoming, self.updates = self.context.Pipe(duplex=False)
        self.alive, self.asking = self.context.Pipe(duplex=False)
        self.pool = self._open()
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _open(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self.workers,
            mp_context=self.context,
            initializer=_start_worker,
            initargs=(self.threads, self.updates, self.alive),
        )

    def _listen(self) -> None:
        while True:
            try:
                update = self.incoming.recv()
            except (EOFError, OSError):
                return
            with contextlib.suppress(UserError):  # a full disk: it ends the run where results are written
                self.report(update)

    def run(self, jobs: list[NamedSpec]) -> Iterator[tuple[str, dict[str, Any]]]:
        waiting = dict(jobs)
        lost = 0
        while waiting:
            try:
                yield from self._finished(self._submit(waiting), waiting)
            except BrokenProcessPool:
                if self.stop():
                    raise Interrupted from None
                lost += 1
                if lost > MAX_LOST:
                    raise UserError(
                        f"workers died {lost} times while doing {', '.join(sorted(waiting)[:4])} (killed for want of "
                        f"memory?); fewer execution.workers may help, then run the same command again to continue"
                    ) from None
                self.report({"job": "driver", "message": "a worker died; its job starts again from its checkpoint"})
                self.pool.shutdown()
                self.pool = self._open()

    def _submit(self, waiting: dict[str, dict[str, Any]]) -> dict[Future[dict[str, Any]], str]:
        # a worker inherits the blocked Ctrl-C, which is the driver's to hear, until it can ignore it by itself
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return {
                self.pool.submit(_work, str(self.run_path), name, spec, self.device): name
                for name, spec in waiting.items()
            }
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _finished(
        self, futures: dict[Future[dict[str, Any]], str], waiting: dict[str, dict[str, Any]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield results as they come and drop them from `waiting`; on a stop, wait for the workers to save."""
        pending = set(futures)
        interrupted = False
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            if self.stop() and not self.asking.closed:
                self.asking.close()
                for future in pending:
                    future.cancel()
            for future in done:
                if future.cancelled():
                    continue
                try:
                    result = future.result()
                except Interrupted:
                    interrupted = True
                    continue
                waiting.pop(futures[future])
                yield futures[future], result
        if interrupted or self.asking.closed:
            raise Interrupted

    def close(self) -> None:
        self.asking.close()
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.updates.close()  # the last writer, so the listener comes to an end
        self.listener.join(timeout=5)
        self.incoming.close()
        self.alive.close()
