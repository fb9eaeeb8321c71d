"""Kill anywhere, continue exactly: what a run leaves does not depend on how often it was killed or hindered."""

import errno
import json
import os
import random
import resource
import signal
import time
from dataclasses import replace
from functools import partial

import killing
import pytest
import tiny
import torch
import yaml
from killing import assert_same, child, finished, forked, go, history, incidents, until
from sqlalchemy.sql.ddl import SchemaGenerator

from lmnas.cli import main as cli
from lmnas.core import files
from lmnas.core.contracts import Objective
from lmnas.core.errors import UserError
from lmnas.core.events import Events, read_events
from lmnas.core.job import Job, read_result
from lmnas.core.nests import map_tensors
from lmnas.nn.training.weights import WeightTraining
from lmnas.runs.build import open_space
from lmnas.runs.directory import Run
from lmnas.runs.progress import Stop
from lmnas.runs.recipe import load_recipe
from lmnas.runs.record import Record

STRATEGIES = {
    "random": {},
    "reinforce": {
        "strategy": {"name": "reinforce", "hidden": 8, "rewards_per_round": 6, "rewards_per_update": 2},
        "search": {"seeds": 2, "candidates": 2, "batch": 1},
        "select": {"keep": 1},
    },
    "gradient-1": {
        "strategy": {"name": "gradient", "order": 1, "learning_rate": 0.05},
        "search": {"seeds": 2, "candidates": 1},
    },
    "gradient-2": {
        "strategy": {"name": "gradient", "order": 2, "learning_rate": 0.05},
        "train": {"seeds": 2, "training": tiny.training()},
    },
    "bayes": {
        "space": {"name": "recurrent-cell", "n_nodes": 2, "batch_norm": "none"},
        "strategy": {"name": "bayes", "strength": 0.001, "learning_rate": 5.0, "updates": 3, "curvature_batches": 1},
    },
    "standalone": {
        "estimator": {"name": "standalone", "training": tiny.training(checkpoint_steps=5)},
    },
    "images": None,
}
"""What differs from the recipe on a text; None: that on pictures."""


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    """About 2000 tokens of text."""
    folder = tmp_path_factory.mktemp("world")
    path = folder / "text.txt"
    path.write_text(tiny.text(n_lines=300))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMNAS_CACHE", str(folder / "cache"))
        # what a first run imports late and opens, children inherit
        go(folder / "run", killing.recipe(path))
        yield path
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def untouched(data, tmp_path_factory):
    """`untouched(strategy)`: (recipe, directory, boundaries, seconds) of a run that nobody disturbed."""
    known = {}

    def get(strategy):
        if strategy not in known:
            path = tmp_path_factory.mktemp(strategy) / "run"
            changes = STRATEGIES[strategy]
            if changes is None:
                document = killing.image_recipe(tiny.pictures(path.parent / "pictures", n_train=12))
            else:
                document = killing.recipe(data, **changes)
            known[strategy] = (document, path, *killing.measure(lambda: go(path, document)))
        return known[strategy]

    return get


def survive(folder, document, reference, kills):
    """Run, and be killed by one after the other of `kills`; then run to the end. It must equal `reference`.

    A run that ends before its time to die has come is compared as well, and the next one takes the remaining kills.
    """
    kills, life = list(kills), 0
    while True:
        path = folder / f"life-{life}"

        def work(path=path):
            go(path, document)

        while kills and kills[0](work):
            kills.pop(0)
            assert not any(event["event"] == "finished" for event in read_events(path / "incidents.jsonl"))
        assert life < 10, "the kills come too late"
        work()
        assert_same(path, reference)
        if not kills:
            return
        life += 1


def at_boundaries(n, draws, total):
    """`n` kills, so far apart that most runs suffer them all."""
    return [partial(killing.killed_at_boundary, number=draws.randint(1, 2 * total // n)) for _ in range(n)]


def at_instants(n, draws, seconds):
    return [partial(killing.killed_after, seconds=draws.uniform(0, 2 * seconds / n)) for _ in range(n)]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_five_kills_at_boundaries_and_five_at_any_instant_change_nothing(strategy, untouched, tmp_path):
    document, reference, total, seconds = untouched(strategy)
    draws = random.Random(strategy)
    survive(tmp_path / "boundaries", document, reference, at_boundaries(5, draws, total))
    survive(tmp_path / "instants", document, reference, at_instants(5, draws, seconds))


@pytest.mark.slow
def test_twenty_five_kills_in_a_row_change_nothing(untouched, tmp_path):
    document, reference, total, seconds = untouched("reinforce")
    draws = random.Random(25)
    kills = at_boundaries(13, draws, total) + at_instants(12, draws, seconds)
    draws.shuffle(kills)
    survive(tmp_path, document, reference, kills)


def test_same_seed_twice_is_the_same_run(untouched, tmp_path):
    document, reference, _, _ = untouched("random")
    go(tmp_path, document)
    assert_same(tmp_path, reference)
    events = read_events(tmp_path / "jobs" / "train-searched-0" / "events.jsonl")
    assert [event["epoch"] for event in events] == [1, 2, 3]
    assert len(killing.trials(reference)) == 3 + 4


# ------------------------------------------------------------------------------------------------------- broken files


def stopped_in(job, path, document):
    """A run killed in the middle of `job`, after its third checkpoint; returns the job's directory."""

    def third(self, *args, **kwargs):
        return self.name == job and self._index == 2

    killing.killed_in(lambda: go(path, document), Job, "save", third)
    directory = path / "jobs" / job
    assert len(list((directory / "checkpoints").iterdir())) == 2
    return directory


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.slow
def test_a_broken_checkpoint_is_named_and_the_one_before_it_used(untouched, tmp_path, capfd):
    document, reference, _, _ = untouched("gradient-1")
    for job, harm in (("search-1", flip), ("train-searched-0", cut)):
        directory = stopped_in(job, tmp_path, document)
        older, newest = sorted((directory / "checkpoints").iterdir())
        harm(newest)
        # the next start ends at once, after it has loaded the checkpoint
        killing.killed_in(lambda: go(tmp_path, document), Job, "load", lambda self, job=job: self.name == job)
        message = incidents(tmp_path)[-1]
        assert newest.name in message and older.name not in message
        assert newest.name in capfd.readouterr().err
    go(tmp_path, document)
    assert_same(tmp_path, reference)


@pytest.mark.slow
def test_broken_checkpoints_a_torn_event_and_a_lost_database_are_made_good(untouched, tmp_path):
    document, reference, _, _ = untouched("gradient-1")
    directory = stopped_in("train-searched-0", tmp_path, document)
    for path in (directory / "checkpoints").iterdir():
        flip(path)
    with open(directory / "events.jsonl", "a") as file:
        file.write('{"seq": 2, "event": "ep')
    (directory / "job.json").write_text("")
    cut(tmp_path / "results.json")
    (tmp_path / "study.db").unlink()
    go(tmp_path, document)
    assert incidents(tmp_path)[-1] == "no good checkpoint is left; starting over"
    assert_same(tmp_path, reference)


def test_a_kill_while_the_database_is_made(untouched, tmp_path):
    """Between a table and its index: without the index, a study would be made twice."""
    document, reference, _, _ = untouched("random")
    killing.killed_in(
        lambda: go(tmp_path, document), SchemaGenerator, "visit_index", lambda *_, **__: True, before=True
    )
    assert not (tmp_path / "study.db").exists()
    go(tmp_path, document)
    assert_same(tmp_path, reference)


def test_trials_are_neither_lost_nor_doubled_by_kills_while_they_are_recorded(data, tmp_path):
    recipe = load_recipe(killing.recipe(data))
    space, objective = open_space(recipe), Objective("perplexity", "per word", "minimize")
    genotypes = [space.sample(random.Random(k)) for k in range(20)]

    def record():
        with Run(tmp_path, recipe) as run:
            record = Record(run, "search", objective, space)
            for k, genotype in enumerate(genotypes):
                record.add(f"0/{k}", tiny.trial(genotype, float(k), k))

    draws = random.Random(0)
    n_killed = sum(killing.killed_after(record, draws.uniform(0, 0.25)) for _ in range(12))
    record()
    assert n_killed
    assert [(number, value) for _, number, _, value, _, _ in killing.trials(tmp_path)] == [(k, k) for k in range(20)]


# ------------------------------------------------------------------------------------------------------ the directory


def write_recipe(folder, document):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return str(path)


def test_a_second_process_on_one_directory_is_refused(untouched, tmp_path, capsys):
    document, _, _, _ = untouched("random")
    path = tmp_path / "run"

    def hold():
        with Run(path, load_recipe(document)):
            (tmp_path / "held").touch()
            time.sleep(60)

    with child(hold) as pid:
        until((tmp_path / "held").exists)
        with pytest.raises(UserError, match=rf"another process \(pid {pid}\) is working on it"):
            Run(path, load_recipe(document))
        assert cli.main(["search", write_recipe(tmp_path, document), "--run", str(path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("lmnas: ") and f"pid {pid}" in message and message.count("\n") == 1
    Run(path, load_recipe(document)).close()  # the lock died with its holder


def test_a_lock_that_is_a_link_is_not_followed(data, tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="cannot be written"):
        Run(tmp_path / "run", load_recipe(killing.recipe(data)))
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_changed_recipe_is_refused_and_another_way_to_execute_is_not(data, tmp_path):
    document = killing.recipe(data)
    Run(tmp_path, load_recipe(document)).close()
    with pytest.raises(UserError, match=r"train\.training\.epochs is 3 there and 4 here; give another --run"):
        Run(tmp_path, load_recipe(document, {"train.training.epochs": 4}))
    Run(tmp_path, load_recipe(document, {"execution.workers": 7})).close()


def test_changed_data_is_refused(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(n_lines=200))
    document = killing.recipe(text)
    go(tmp_path / "run", document, ("search",))
    before = (tmp_path / "run" / "results.json").read_bytes()
    text.write_text(tiny.text(n_lines=200, seed=1))
    with pytest.raises(UserError, match=r"its data had fingerprint \w+, the data found now has \w+"):
        go(tmp_path / "run", document, ("search",))
    assert (tmp_path / "run" / "results.json").read_bytes() == before


# --------------------------------------------------------------------------------------------------------- interrupts


@pytest.mark.slow
def test_interrupts_save_and_tell_how_to_continue(untouched, tmp_path, capfd, monkeypatch):
    """Ctrl-C in the search, SIGTERM twice at once (as `timeout` sends it) in a training, then an impatient second
    Ctrl-C: 130 each time, and the same end."""
    document, reference, _, _ = untouched("random")
    path = tmp_path / "run"
    command = ["search", write_recipe(tmp_path, document), "--run", str(path)]

    def signalled(job, *numbers):
        """The command, which gets these signals in the middle of `job`."""
        save = Job.save

        def with_signals(self, *args, **kwargs):
            if self.name == job and self._index == 1:
                for number in numbers:
                    os.kill(os.getpid(), number)
            save(self, *args, **kwargs)

        Job.save = with_signals
        return cli.main(command)

    for job, *numbers in (("search-0", signal.SIGINT), ("train-searched-0", signal.SIGTERM, signal.SIGTERM)):
        assert finished(forked(partial(signalled, job, *numbers))) == 130
        assert len(list((path / "jobs" / job / "checkpoints").glob("*-extra-*"))) == 1
        message = capfd.readouterr().err.splitlines()[-1]
        assert message.startswith("lmnas: stopped, everything is saved; the same command continues")
        assert f"lmnas {' '.join(command)}" in message
        assert read_events(path / "incidents.jsonl")[-1]["event"] == "interrupted"

    monkeypatch.setattr(Stop, "TOGETHER", 0.0)
    assert finished(forked(partial(signalled, "train-random-0", signal.SIGINT, signal.SIGINT))) == 130
    assert not list((path / "jobs" / "train-random-0" / "checkpoints").glob("*-extra-*"))
    go(path, document)
    assert_same(path, reference)


# ---------------------------------------------------------------------------------------------------------- divergence


def poison(patch, when):
    """Make the carried state NaN, and with it the loss, before every update for which `when(job, training)`."""
    job, update, start = "", WeightTraining.update, Job.__init__

    def started(self, directory, *args, **kwargs):
        nonlocal job
        job = directory.name
        start(self, directory, *args, **kwargs)

    def poisoned(self, batch, choice=None):
        if batch.state is not None and when(job, self):
            batch = replace(batch, state=map_tensors(lambda part: part * torch.nan, batch.state))
        return update(self, batch, choice)

    patch.setattr(Job, "__init__", started)
    patch.setattr(WeightTraining, "update", poisoned)


@pytest.mark.slow
def test_nan_goes_back_with_fresh_noise_and_kills_around_it_change_nothing(untouched, tmp_path, monkeypatch):
    document, undisturbed, _, _ = untouched("gradient-1")
    poison(monkeypatch, lambda job, training: training.steps == 12 and training.salt == 0)
    reference = tmp_path / "reference"
    go(reference, document)
    for job in ("search-0", "train-searched-0"):
        events = read_events(reference / "jobs" / job / "events.jsonl")
        (diverged,) = [event for event in events if event["event"] == "diverged"]
        assert (diverged["step"], diverged["cause"], diverged["recovery"]) == (12, "loss is not finite", 1)
    assert "loss is not finite at step 12: went back to step 10 with fresh noise" in incidents(reference)
    assert history(reference)["model.safetensors"] != history(undisturbed)["model.safetensors"]

    def diverging(self, event, **fields):
        return event == "diverged" and self.number == 0  # the first of its job

    def recovered(self, state, **kwargs):
        return self.name == "train-searched-0" and state["training"]["salt"] == 1

    path = tmp_path / "killed"
    for owner, name, when in ((Events, "emit", diverging), (Job, "save", recovered)):
        for before in (True, False):
            killing.killed_in(lambda: go(path, document), owner, name, when, before)
    go(path, document)
    assert_same(path, reference)


def test_a_candidate_that_always_diverges_fails_and_the_search_goes_on(untouched, tmp_path, monkeypatch):
    document, _, _, _ = untouched("standalone")
    poison(monkeypatch, lambda job, training: job == "search-0-trial-1")
    go(tmp_path, document, ("search",))
    states = [(state, value is None, attrs.get("failure")) for _, _, state, value, _, attrs in killing.trials(tmp_path)]
    cause = "diverged at step 1: loss is not finite (after 3 recoveries)"
    assert states == [("COMPLETE", False, None), ("FAIL", True, cause), ("COMPLETE", False, None)]


@pytest.mark.parametrize("strategy", ["standalone", "gradient-1"])
def test_when_all_diverge_the_run_ends_with_a_clear_message(strategy, untouched, tmp_path, monkeypatch):
    document, _, _, _ = untouched(strategy)
    poison(monkeypatch, lambda job, training: True)
    for _ in range(2):  # and says it again
        with pytest.raises(UserError, match=r"every candidate failed \(diverged at step 1: loss is not finite"):
            go(tmp_path, document, ("search",))


def test_where_all_kept_candidates_diverge_the_next_best_follow(untouched, tmp_path, monkeypatch):
    """The best two of four fail in selection: the other two are tried, and one of them wins; twice the same."""
    document, _, _, _ = untouched("random")
    document = {**document, "search": {"seeds": 1, "candidates": 4, "batch": 4}, "baselines": {}}
    document["select"] = {"keep": 2, "epochs": 1, "seeds": 1}
    for path in (tmp_path / "first", tmp_path / "second"):
        go(path, document, ("search",))
        rows = sorted((value, attrs["genotype_id"]) for _, _, _, value, _, attrs in killing.trials(path))
        ranked = [identity for _, identity in rows]
        best = {f"select-{identity}-0" for identity in ranked[:2]}
        with pytest.MonkeyPatch.context() as patch:
            poison(patch, lambda job, training, best=best: job in best)
            go(path, document)
        states = {name: read_result(path / "jobs" / f"select-{name}-0")["status"] for name in ranked}
        assert [states[name] for name in ranked] == ["diverged", "diverged", "ok", "ok"]
        assert json.loads((path / "results.json").read_text())["genotype"]["id"] in ranked[2:]


# -------------------------------------------------------------------------------------------------- memory and disk


def test_a_candidate_too_large_for_the_memory_fails_and_the_search_goes_on(untouched, tmp_path, monkeypatch):
    document, _, _, _ = untouched("standalone")
    document = {**document, "search": {"seeds": 1, "candidates": 4, "batch": 2}}
    errors = {
        "search-0-trial-0": MemoryError(),
        "search-0-trial-1": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"),
        "search-0-trial-2": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    }

    def fail(job, training):
        if job in errors:
            raise errors[job]
        return False

    poison(monkeypatch, fail)
    go(tmp_path, document, ("search",))
    assert [(state, attrs.get("failure")) for _, _, state, _, _, attrs in killing.trials(tmp_path)] == [
        ("FAIL", "MemoryError"),
        ("FAIL", "CUDA out of memory. Tried to allocate 1 GiB"),
        ("FAIL", "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        ("COMPLETE", None),
    ]
    results = [read_result(tmp_path / "jobs" / f"search-0-trial-{k}") for k in range(4)]
    assert [result["status"] for result in results] == ["out-of-memory"] * 3 + ["ok"]


def test_a_write_error_that_passes_changes_nothing(untouched, tmp_path, monkeypatch):
    document, reference, _, _ = untouched("gradient-1")
    monkeypatch.setattr(files, "PAUSE_SECONDS", 0.0)
    replace, calls = os.replace, 0

    def failing(*args):
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(*args)

    monkeypatch.setattr(os, "replace", failing)
    go(tmp_path, document)
    assert calls > 50
    assert_same(tmp_path, reference)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_one_line_and_leaves_the_old_checkpoint(untouched, tmp_path, monkeypatch, capsys):
    document, reference, _, _ = untouched("gradient-1")
    path = tmp_path / "run"
    directory = stopped_in("train-searched-0", path, document)
    good = {found: found.read_bytes() for found in (directory / "checkpoints").iterdir()}
    capsys.readouterr()

    replace = os.replace

    def full(source, target):
        if "checkpoints" in str(target):  # what is small still finds room
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files, "PAUSE_SECONDS", 0.0)
        patch.setattr(os, "replace", full)
        assert cli.main(["search", write_recipe(tmp_path, document), "--run", str(path)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lmnas: ")]
    assert str(directory / "checkpoints") in line
    assert line.endswith(
        "cannot be written (No space left on device); what was saved before is intact. Make room or repair the disk, "
        "then run the same command again to continue"
    )
    assert {found: found.read_bytes() for found in (directory / "checkpoints").iterdir()} == good
    go(path, document)
    assert_same(path, reference)


@pytest.mark.parametrize(
    ("limit", "place"), [(1_000, "recipe.yaml: cannot be written"), (50_000, "study.db cannot be")]
)
def test_a_disk_full_from_the_start_is_one_line(limit, place, untouched, tmp_path, capfd):
    """The operating system itself refuses all that would make a file larger than `limit` bytes."""
    document, _, _, _ = untouched("gradient-1")
    command = ["search", write_recipe(tmp_path, document), "--run", str(tmp_path / "run")]

    def limited():
        files.PAUSE_SECONDS = 0.0
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return cli.main(command)

    assert finished(forked(limited)) == 2
    message = capfd.readouterr().err.splitlines()[-1]
    assert message.startswith("lmnas: ") and place in message and "run the same command again" in message


def test_a_finished_jobs_weights_are_checked_when_they_are_read(data, tmp_path):
    """A bit flipped after training must not become a test score: the file is named, and how to mend it."""
    document = killing.recipe(data)
    go(tmp_path / "run", document, stages=("search", "select", "train"))
    weights = tmp_path / "run" / "jobs" / "train-lstm-0" / "model.safetensors"
    flip(weights)
    with pytest.raises(UserError, match=r"train-lstm-0/model.safetensors is broken; delete .*train-lstm-0 to make it"):
        go(tmp_path / "run", document)


def test_a_diverged_training_is_counted_in_the_verdict(data, tmp_path, monkeypatch):
    """It has no model to test, and the sentence says that it is left out."""
    document = killing.recipe(data)
    poison(monkeypatch, lambda job, training: job == "train-lstm-0")
    results = go(tmp_path / "run", document)
    (row,) = [row for row in results["verdict"]["models"] if row["model"] == "lstm"]
    assert row["diverged"] == 1 and "diverged" in results["verdict"]["sentence"]
