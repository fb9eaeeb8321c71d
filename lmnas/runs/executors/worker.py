"""A worker process: `python -m lmnas.runs.executors.worker FD` does the calls that come over the socket FD.

It knows nothing of the program that started it but its module path, which comes in PYTHONPATH.
"""

import json
import os
import queue
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from lmnas.core.errors import Interrupted
from lmnas.core.updates import Progress, Update
from lmnas.runs.executors import wire
from lmnas.runs.executors.base import Call, Setup, perform

PAUSE_SECONDS = 0.1
"""Least time between two progress updates of a call."""


class Worker:
    """Reads calls and the wish to stop in a thread of its own, does the calls in the main one."""

    def __init__(self, connection: Connection, setup: Setup):
        self.connection, self.setup = connection, setup
        self.calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self.stopping = threading.Event()
        self.reported = -PAUSE_SECONDS

    def listen(self) -> None:
        """Leaves at once when the driver is gone, since nobody waits for this work."""
        try:
            while True:
                message = wire.receive(self.connection)
                if "call" in message:
                    self.calls.put(Call(**message["call"]))
                else:
                    self.stopping.set()
        except (EOFError, OSError):
            os._exit(1)

    def report(self, update: Update) -> None:
        if isinstance(update, Progress) and update.done < update.total:
            now = time.monotonic()
            if now - self.reported < PAUSE_SECONDS:
                return
            self.reported = now
        self.send(update=wire.update_document(update))

    def send(self, **message: Any) -> None:
        try:
            wire.send(self.connection, **message)
        except OSError:
            os._exit(1)

    def work(self) -> None:
        while True:
            call = self.calls.get()
            try:
                if self.stopping.is_set():
                    raise Interrupted
                answer = {"result": perform(call, self.setup, self.report, self.stopping.is_set)}
                json.dumps(answer)  # a result that JSON cannot hold is the call's error
            except Exception as error:
                answer = {"error": wire.error_document(error)}
            self.send(**answer)


def main() -> None:
    # the driver hears these and tells the workers
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    connection = Connection(int(sys.argv[1]))
    try:
        worker = Worker(connection, Setup(**wire.receive(connection)["setup"]))
    except (EOFError, OSError):
        return
    threading.Thread(target=worker.listen, daemon=True).start()
    worker.work()


if __name__ == "__main__":
    main()
