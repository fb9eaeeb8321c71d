"""Where jobs run makes no difference: one process or several, and whoever of them is killed."""

import os
import signal
from contextlib import suppress
from pathlib import Path

import killing
import pytest
import tiny
import torch
import yaml
from killing import assert_same, child, finished, go, incidents, until

from lmnas.cli import main as cli
from lmnas.core import registry
from lmnas.core.errors import Diverged, Interrupted, UserError
from lmnas.core.events import read_events
from lmnas.core.genotype import load_genotype
from lmnas.core.job import read_result
from lmnas.core.updates import Incident, Progress
from lmnas.runs.directory import Run
from lmnas.runs.executors.base import Call, Setup, open_executor
from lmnas.runs.executors.inline import Inline
from lmnas.runs.executors.processes import MAX_LOST, Processes
from lmnas.runs.recipe import load_recipe
from lmnas.runs.work import job_call


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
            if b"lmnas.runs.executors.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
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
            executor = Processes(2, Setup(), print, lambda: False)
            assert len(list(executor.run([job_call(tmp_path, "cpu", "train-lstm-0", spec)]))) == 1
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


# ------------------------------------------------------------------------------------------------------- the contract

EXECUTORS = registry.names("executor")


@pytest.fixture(params=EXECUTORS)
def executor(request):
    """`executor(stop)`: each executor with two workers where it has several, and what it reports."""
    opened = []

    def make(stop=lambda: False):
        reports = []
        opened.append(open_executor(request.param, 2, Setup(), reports.append, stop))
        return opened[0], reports

    yield make
    opened[0].close()


def call(function, name=None, **arguments):
    return Call(name or function, f"calls:{function}", arguments)


def squares(n):
    return [call("square", str(number), number=number) for number in range(n)]


def test_results_and_updates_do_not_depend_on_the_executor(executor):
    opened, reports = executor()
    expected = {str(n): n * n for n in range(5)}
    assert dict(opened.run(squares(5))) == expected
    assert sorted(report.message for report in reports if isinstance(report, Incident)) == [f"of {n}" for n in range(5)]
    assert len([report for report in reports if isinstance(report, Progress)]) == 5
    assert dict(opened.run(squares(3))) == {name: expected[name] for name in ("0", "1", "2")}


def test_calls_may_depend_on_results(executor):
    """The next call is asked for after the results so far; None waits for one more."""
    opened, _ = executor()
    found = []

    def calls():
        yield call("square", "first", number=3)
        while not found:
            yield None
        yield call("square", "second", number=found[0])

    for _, result in opened.run(calls()):
        found.append(result)
    assert found == [9, 81]


def test_errors_keep_their_meaning(executor):
    opened, _ = executor()
    with pytest.raises(UserError, match="no such word"):
        list(opened.run([call("fail", kind="user")]))
    with pytest.raises(Diverged, match="diverged at step 3: loss"):
        list(opened.run([call("fail", kind="diverged")]))
    with pytest.raises(Exception, match="bad 17"):
        list(opened.run([call("fail", kind="other")]))
    assert len(list(opened.run(squares(2)))) == 2


def test_a_stop_lets_calls_save(executor, tmp_path):
    opened, _ = executor((tmp_path / "started").exists)
    with pytest.raises(Interrupted):
        list(opened.run([call("until_stopped", folder=str(tmp_path)), *squares(1)]))
    assert (tmp_path / "saved").exists()


def test_a_consumer_that_leaves_lets_calls_save(tmp_path):
    with Processes(2, Setup(), lambda update: None, lambda: False) as opened:
        for _ in opened.run([call("until_stopped", folder=str(tmp_path)), *squares(1)]):
            until((tmp_path / "started").exists)
            break
    assert (tmp_path / "saved").exists()


def test_the_setup_reaches_workers():
    with Processes(1, Setup(3, environment={"LMNAS_TEST_WORD": "here"}), print, lambda: False) as opened:
        (found,) = dict(opened.run([call("surroundings", variable="LMNAS_TEST_WORD")])).values()
    assert found == {"variable": "here", "threads": 3}


def test_the_default_is_this_process_for_one_worker_and_processes_for_more():
    for workers, expected in ((1, Inline), (2, Processes), (7, Processes)):
        with open_executor(None, workers, Setup(), print, lambda: False) as opened:
            assert type(opened) is expected and opened.capacity == workers


def test_an_unknown_executor_is_refused(data):
    with pytest.raises(UserError, match=r"executor 'proceses' is unknown\. Did you mean 'processes'"):
        load_recipe(recipe(data, 1), {"execution.executor": "proceses"})


def test_a_call_whose_worker_died_runs_once_more(tmp_path):
    reports = []
    with Processes(2, Setup(), reports.append, lambda: False) as opened:
        results = dict(opened.run([call("die", times=MAX_LOST, folder=str(tmp_path)), *squares(3)]))
    assert results["die"] == MAX_LOST + 1 and len(results) == 4
    lost = [report for report in reports if isinstance(report, Incident) and report.job == "driver"]
    assert lost == [Incident("driver", "a worker died; its job starts again from its checkpoint")] * MAX_LOST


def test_workers_that_die_again_and_again_end_the_run_with_one_line(tmp_path):
    with (
        Processes(2, Setup(), lambda update: None, lambda: False) as opened,
        pytest.raises(UserError, match=r"workers died 4 times while doing die \(killed for want of memory\?\)"),
    ):
        list(opened.run([call("die", times=9, folder=str(tmp_path))]))


def test_workers_that_die_after_a_stop_was_asked_for_are_not_replaced(tmp_path):
    reports = []
    with (
        Processes(2, Setup(), reports.append, lambda: any(tmp_path.iterdir())) as opened,
        pytest.raises(Interrupted),
    ):
        list(opened.run([call("die", times=9, folder=str(tmp_path))]))
    assert not reports and len(list(tmp_path.iterdir())) == 1
