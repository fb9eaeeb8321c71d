"""Runs that are killed, and what must not depend on it.

A run lives in a forked child of the test: a fresh interpreter would spend seconds on its imports at every kill.
"""

import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
import tiny

from lmnas.core.checkpoints import Checkpoints
from lmnas.core.events import Events, read_events
from lmnas.core.job import Job
from lmnas.runs.directory import Run
from lmnas.runs.experiment import STAGES, Experiment
from lmnas.runs.progress import Display
from lmnas.runs.recipe import load_recipe
from lmnas.runs.record import Record

WITHOUT_REPORT = STAGES[:-1]
"""Pictures take longer than all the rest of a tiny run, and have no state."""
TIMINGS = ("seconds", "tokens_per_second", "costs", "environment", "time")
BOUNDARIES = [
    (Events, "emit"),
    (Job, "save"),
    (Job, "finish"),
    (Checkpoints, "delete"),
    (Record, "add"),
    (os, "replace"),
    (Path, "unlink"),
]
"""A run changes its directory in these calls; it is killed just before or just after one of them."""


def recipe(data: Path, **changes: Any) -> dict[str, Any]:
    """The whole job on a small text, with dropout, momentum and averaging, so that there is much to save."""
    searching = tiny.training(
        epochs=2,
        model={"width": 6, "dropout_x": 0.1, "dropout_output": 0.1},
        batches={"batch_size": 8, "bptt": 10, "eval_batch_size": 4, "length_std": 2.0},
        checkpoint_steps=5,
    )
    fitting = tiny.training(
        epochs=3,
        model={"width": 8, "dropout_embedding": 0.1, "dropout_output": 0.2, "tar": 0.001},
        batches={"batch_size": 16, "bptt": 10, "eval_batch_size": 4, "test_batch_size": 2, "short_probability": 0.1},
        optimizer={"learning_rate": 5.0, "momentum": 0.3, "weight_decay": 1e-6, "patience": 1},
        checkpoint_steps=5,
    )
    document = tiny.recipe(
        data,
        estimator={"name": "shared", "training": searching},
        search={"seeds": 1, "candidates": 3, "batch": 2},
        train={"seeds": 1, "training": fitting},
    )
    return {**document, **changes}


def image_recipe(data: Path) -> dict[str, Any]:
    """The whole job on small pictures, with augmentation, batch norm, paths left out, momentum and a cosine."""
    training = {
        "epochs": 3,
        "model": {"width": 2, "dropout": 0.2, "drop_path": 0.3, "label_smoothing": 0.1},
        "batches": {"batch_size": 4, "crop": 2, "cutout": 3},
        "optimizer": {"learning_rate": 0.05, "momentum": 0.9, "nesterov": True, "schedule": "cosine", "patience": 1},
        "checkpoint_steps": 5,
    }
    return tiny.image_recipe(
        data,
        estimator={"name": "standalone", "training": {**training, "epochs": 1}},
        train={"seeds": 1, "training": training},
    )


def go(path: Path, document: dict[str, Any], stages: tuple[str, ...] = WITHOUT_REPORT) -> dict[str, Any]:
    """Start or continue a run, in this process."""
    with Run(path, load_recipe(document)) as run, Display(quiet=True) as display:
        return Experiment(run, display).run_stages(stages)


# ------------------------------------------------------------------------------------------------------------- killing


def forked(work: Callable[[], Any]) -> int:
    """Do `work` in a child; returns its pid. It ends with what `work` returns (None: 0), or 1 after an exception."""
    with warnings.catch_warnings():
        # numpy's idle threads: nothing that they hold is used in the child
        warnings.simplefilter("ignore", DeprecationWarning)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = work() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finished(pid: int) -> int:
    """The child's exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextmanager
def child(work: Callable[[], Any]) -> Iterator[int]:
    """A child that does not outlive the block."""
    pid = forked(work)
    try:
        yield pid
    finally:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Wait until something is true, and return it; one that stays false fails the test."""
    limit = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.005)
    return found


@contextmanager
def counting(die_at: int | None = None) -> Iterator[list[int]]:
    """Count the places where this process changes its run, and kill it at the `die_at`-th."""
    passed = [0]

    def place() -> None:
        passed[0] += 1
        if passed[0] == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(owner: Any, name: str) -> Callable[..., Any]:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            place()
            result = original(*args, **kwargs)
            place()
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in BOUNDARIES:
            patch.setattr(owner, name, watched(owner, name))
        yield passed


def killed_at_boundary(work: Callable[[], Any], number: int) -> bool:
    """Do `work` in a child that dies at its `number`-th boundary; False: it came to its end before."""

    def dying() -> None:
        with counting(number):
            work()

    return _killed(finished(forked(dying)))


def killed_in(work: Callable[[], Any], owner: Any, name: str, when: Callable[..., bool], before: bool = False) -> None:
    """Do `work` in a child that dies in the first call of `owner.name` whose arguments fulfil `when`."""
    original = getattr(owner, name)

    def deadly(*args: Any, **kwargs: Any) -> Any:
        doomed = when(*args, **kwargs)
        if doomed and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if doomed:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def dying() -> None:
        setattr(owner, name, deadly)
        work()

    assert _killed(finished(forked(dying)))


def killed_after(work: Callable[[], Any], seconds: float) -> bool:
    """Do `work` in a child that is killed after `seconds`; False: it came to its end before."""
    pid = forked(work)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return _killed(finished(pid))


def _killed(code: int) -> bool:
    assert code in (0, -signal.SIGKILL), f"the child ended by itself with {code}"
    return code != 0


def measure(work: Callable[[], Any]) -> tuple[int, float]:
    """Do `work` here, unharmed: (boundaries it passed, seconds it took)."""
    began = time.monotonic()
    with counting() as passed:
        work()
    return passed[0], time.monotonic() - began


# ----------------------------------------------------------------------------------------------------------- comparing


def plain(value: Any) -> Any:
    """Without the wall clock's part."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in TIMINGS}
    return [plain(item) for item in value] if isinstance(value, list) else value


def trials(path: Path) -> list[Any]:
    """All trials of `study.db`, in order, by study."""
    storage = f"sqlite:///{path / 'study.db'}"
    return [
        (name, t.number, t.state.name, t.value, t.params, plain(t.user_attrs))
        for name in sorted(optuna.get_all_study_names(storage))
        for t in optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)
    ]


def history(path: Path) -> dict[str, Any]:
    """All that a run leaves but for its timings: equal for runs that did the same."""
    jobs = sorted((path / "jobs").iterdir())
    return {
        **{f"events of {job.name}": plain(read_events(job / "events.jsonl")) for job in jobs},
        **{f"result of {job.name}": plain(json.loads((job / "result.json").read_text())) for job in jobs},
        "results": plain(json.loads((path / "results.json").read_text())),
        "trials": trials(path),
        **{name: (path / name).read_bytes() for name in ("genotype.json", "model.safetensors", "model.json")},
    }


def assert_same(path: Path, other: Path) -> None:
    """Same history, and nothing left lying about."""
    first, second = history(path), history(other)
    assert first.keys() == second.keys()
    for part in first:
        assert first[part] == second[part], part
    for run in (path, other):
        assert not [found for found in run.rglob("*") if found.suffix == ".tmp" or found.name == "checkpoints"]


def incidents(path: Path) -> list[str]:
    """Messages that the jobs of a run sent."""
    return [event["message"] for event in read_events(path / "incidents.jsonl") if event["event"] == "incident"]
