"""Where jobs run makes no difference: one process or several, and whoever of them is killed."""

import os
import signal
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path

import killing
import pytest
import tiny
import torch
import yaml
from killing import assert_same, child, finished, go, incidents, until

from lmnas.cli.main import main as cli
from lmnas.core.errors import Interrupted, UserError
from lmnas.core.events import read_events
from lmnas.core.genotype import load_genotype
from lmnas.core.job import read_result
from lmnas.runs import build
from lmnas.runs.directory import Run
from lmnas.runs.executors.processes import MAX_LOST, Processes
from lmnas.runs.recipe import load_recipe


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    path = folder / "text.txt"
    path.write_text(tiny.text(n_lines=430))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMNAS_CACHE", str(folder / "cache"))
        yield path
    torch.set_num_threads(threads)
    build._open_task.cache_clear()


def recipe(data, workers):
    """Jobs of a second or two, which a signal can reach in the middle."""
    document = killing.recipe(
        data,
        estimator={"name": "standalone", "training": tiny.training(epochs=4, checkpoint_steps=10)},
        search={"seeds": 1, "candidates": 2, "batch": 2},
        select={"keep": 1},
        execution={"device": "cpu", "workers": workers, "threads": 1, "kernel": "reference"},
    )
    document["train"]["training"]["epochs"] = 8
    return document


@pytest.fixture(scope="module")
def inline(data, tmp_path_factory):
    """The run in one process."""
    path = tmp_path_factory.mktemp("inline") / "run"
    go(path, recipe(data, workers=1))
    return path


def workers_of(driver):
    """Process ids of a driver's workers."""
    found = []
    for pid in Path(f"/proc/{driver}/task/{driver}/children").read_text().split():
        with suppress(OSError):  # it ended meanwhile
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
    return found


def alive(pid):
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def at_work(driver, stage):
    """Those workers of a driver that are in the middle of a job of `stage`: they hold its lock."""
    found = []
    for pid in workers_of(driver):
        with suppress(OSError):
            files = [Path(os.readlink(fd)) for fd in Path(f"/proc/{pid}/fd").iterdir()]
            folders = [file.parent for file in files if file.name == "lock" and file.parent.name.startswith(stage)]
            if any((folder / "checkpoints").is_dir() for folder in folders):
                found.append(pid)
    return found


@pytest.mark.slow
def test_two_workers_give_what_one_process_gives(data, inline, tmp_path):
    go(tmp_path, recipe(data, workers=2))
    assert_same(tmp_path, inline)


@pytest.mark.slow
def test_killed_workers_and_drivers_change_nothing(data, inline, tmp_path, capfd):
    """A worker is killed in the search; the driver is interrupted in the training, then killed."""
    path = tmp_path / "run"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(data, workers=2)))
    command = ["search", str(tmp_path / "recipe.yaml"), "--run", str(path)]

    with child(lambda: cli.main(command)) as driver:
        (lost, *_) = until(lambda: at_work(driver, "search"))
        os.kill(lost, signal.SIGKILL)
        until(lambda: at_work(driver, "train"))
        workers = workers_of(driver)
        os.kill(driver, signal.SIGINT)
        assert finished(driver) == 130
    assert incidents(path) == ["a worker died; its job starts again from its checkpoint"]
    assert "the same command continues" in capfd.readouterr().err
    assert not any(map(alive, [lost, *workers]))
    assert list(path.glob("jobs/train-*/checkpoints/*-extra-*"))

    with child(lambda: cli.main(command)) as driver:
        until(lambda: at_work(driver, "train"))
        workers = workers_of(driver)
        os.kill(driver, signal.SIGKILL)
        until(lambda: not any(map(alive, workers)), seconds=10)

    go(path, recipe(data, workers=1))
    assert_same(path, inline)


@pytest.mark.slow
def test_an_idle_worker_leaves_when_its_driver_was_killed(data, tmp_path):
    document = recipe(data, workers=2)
    spec = {"kind": "fit", "genotype": load_genotype("lstm-1").to_dict(), "seed": 0, "epochs": 1, "model": {}}

    def drive():
        with Run(tmp_path, load_recipe(document)):
            executor = Processes(tmp_path, "cpu", 1, print, lambda: False, workers=2)
            assert len(list(executor.run([("train-lstm-0", spec)]))) == 1
            (tmp_path / "idle").touch()
            signal.pause()

    with child(drive) as driver:
        until((tmp_path / "idle").exists)
        workers = workers_of(driver)
        assert workers and all(map(alive, workers))
        os.kill(driver, signal.SIGKILL)
        until(lambda: not any(map(alive, workers)), seconds=10)
    assert read_result(tmp_path / "jobs" / "train-lstm-0")["status"] == "ok"
    assert len(read_events(tmp_path / "jobs" / "train-lstm-0" / "events.jsonl")) == 1


@pytest.fixture
def dying(tmp_path, monkeypatch):
    """`dying(stop)`: an executor whose workers die at once, and what it reports."""

    def submit(self, waiting):
        raise BrokenProcessPool

    made = []

    def make(stop):
        reports = []
        made.append(Processes(tmp_path, "cpu", 1, reports.append, stop, workers=2))
        return made[0], reports

    monkeypatch.setattr(Processes, "_submit", submit)
    yield make
    made[0].close()


def test_workers_that_die_again_and_again_end_the_run_with_one_line(dying):
    executor, reports = dying(lambda: False)
    with pytest.raises(UserError, match=r"workers died 4 times while doing a, b \(killed for want of memory\?\)"):
        list(executor.run([("a", {}), ("b", {})]))
    assert [report["message"] for report in reports] == [
        "a worker died; its job starts again from its checkpoint"
    ] * MAX_LOST


def test_workers_that_die_after_a_stop_was_asked_for_are_not_replaced(dying):
    executor, reports = dying(lambda: True)
    with pytest.raises(Interrupted):
        list(executor.run([("a", {})]))
    assert not reports
