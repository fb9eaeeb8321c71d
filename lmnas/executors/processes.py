"""Jobs side by side in worker processes of this machine. They carry values: names and specs out, results back."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from lmnas.errors import Interrupted
from lmnas.executors.inline import NamedSpec
from lmnas.jobs import Report, run_job

MAX_LOST = 3
"""How often workers may die (killed, out of memory) before the run gives up."""

_report: Report
_stop: Callable[[], bool]


def _start_worker(threads: int, updates: Any, stopping: Any, driver: int) -> None:
    global _report, _stop
    # the driver hears the signals and tells the workers through `stopping`
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(threads)
    _report = updates.put

    def stop() -> bool:
        if os.getppid() != driver:  # the driver was killed: nobody waits for this work
            os._exit(1)
        return stopping.is_set()

    _stop = stop


def _work(run: str, name: str, spec: dict[str, Any], device: str) -> dict[str, Any]:
    return run_job(Path(run), name, spec, device, _report, _stop)


class Processes:
    """`run(jobs)` yields (name, result) as jobs finish; a job whose worker died runs once more."""

    def __init__(self, run: Path, device: str, threads: int, report: Report, stop: Callable[[], bool], workers: int):
        self.run_path, self.device, self.threads, self.workers = run, device, threads, workers
        self.report, self.stop = report, stop
        self.context = multiprocessing.get_context("spawn")
        self.updates = self.context.Queue()
        self.stopping = self.context.Event()
        self.pool = self._open()
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _open(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self.workers,
            mp_context=self.context,
            initializer=_start_worker,
            initargs=(self.threads, self.updates, self.stopping, os.getpid()),
        )

    def _listen(self) -> None:
        while (update := self.updates.get()) is not None:
            self.report(update)

    def run(self, jobs: list[NamedSpec]) -> Iterator[tuple[str, dict[str, Any]]]:
        waiting = dict(jobs)
        lost = 0
        while waiting:
            futures: dict[Future[dict[str, Any]], str] = {
                self.pool.submit(_work, str(self.run_path), name, spec, self.device): name
                for name, spec in waiting.items()
            }
            try:
                yield from self._finished(futures, waiting)
            except BrokenProcessPool:
                lost += 1
                if lost > MAX_LOST:
                    raise
                self.report({"job": "driver", "message": "a worker died; its job starts again from its checkpoint"})
                self.pool = self._open()

    def _finished(
        self, futures: dict[Future[dict[str, Any]], str], waiting: dict[str, dict[str, Any]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield results as they come and drop them from `waiting`; on a stop, wait for the workers to save."""
        pending = set(futures)
        interrupted = False
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            if self.stop() and not self.stopping.is_set():
                self.stopping.set()
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
        if interrupted or self.stopping.is_set():
            raise Interrupted

    def close(self) -> None:
        self.stopping.set()
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.updates.put(None)
        self.listener.join(timeout=5)
        self.updates.close()
