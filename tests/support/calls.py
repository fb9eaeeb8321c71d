"""Functions that the tests of executors call by name, as values."""

import os
import signal
import time
from pathlib import Path

from lmnas.core.errors import Diverged, Interrupted, UserError
from lmnas.core.updates import Incident, Progress


def square(*, number, report, stop):
    report(Incident("square", f"of {number}"))
    report(Progress("square", 1, 1, "done"))
    return number * number


def fail(*, kind, report, stop):
    raise {"user": UserError("no such word"), "diverged": Diverged(3, "loss"), "other": ValueError("bad 17")}[kind]


def die(*, times, folder, report, stop):
    """Is killed `times` times, then returns how often it was called."""
    calls = len(list(Path(folder).iterdir()))
    (Path(folder) / f"{calls}").touch()
    if calls < times:
        os.kill(os.getpid(), signal.SIGKILL)
    return calls + 1


def until_stopped(*, folder, report, stop):
    """Works until it is asked to stop, and saves."""
    (Path(folder) / "started").touch()
    while not stop():
        report(Progress("until_stopped", 1, 2))
        time.sleep(0.001)
    (Path(folder) / "saved").touch()
    raise Interrupted


def surroundings(*, variable, report, stop):
    import torch

    return {"variable": os.environ.get(variable), "threads": torch.get_num_threads()}
