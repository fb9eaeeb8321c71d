"""Event logs have no gaps and no doubles, whenever the work was killed."""

import json

import pytest

from lmnas.core import files
from lmnas.core.events import Events, read_events
from lmnas.core.job import Job


def test_repeated_work_does_not_repeat_its_events(tmp_path):
    path = tmp_path / "events.jsonl"
    events = Events(path)
    for epoch in (1, 2, 3):
        events.emit("epoch", epoch=epoch)
    first = path.read_bytes()
    continued = Events(path)
    continued.number = 1  # the checkpoint was taken after the first
    for epoch in (2, 3, 4):
        continued.emit("epoch", epoch=epoch)
    assert path.read_bytes().startswith(first)
    assert [(event["seq"], event["epoch"]) for event in read_events(path)] == [(1, 1), (2, 2), (3, 3), (4, 4)]


@pytest.mark.parametrize("torn", ['{"seq": 3, "ev', "{", '{"seq": 3, "event": "epoch"}'])
def test_a_torn_last_line_is_cut_off(torn, tmp_path):
    path = tmp_path / "events.jsonl"
    events = Events(path)
    events.emit("one")
    events.emit("two")
    with open(path, "a") as file:
        file.write(torn)
    continued = Events(path)
    continued.number = 2
    continued.emit("three")
    assert [event["event"] for event in read_events(path)] == ["one", "two", "three"]


def test_a_job_continues_its_events_and_its_clock(tmp_path):
    job = Job(tmp_path / "job")
    job.events.emit("epoch", epoch=1)
    job._started -= 100  # it worked for so long
    job.save({"x": 1})
    job.events.emit("epoch", epoch=2)
    continued = Job(tmp_path / "job")
    assert continued.load() == {"x": 1}
    continued.events.emit("epoch", epoch=2)
    assert 100 <= continued.seconds < 160
    assert len(read_events(tmp_path / "job" / "events.jsonl")) == 2


def test_a_log_has_whole_lines_when_the_disk_fills_up_inside_one(tmp_path, monkeypatch):
    path = tmp_path / "events.jsonl"
    events = Events(path)
    events.emit("one")

    class Filling:
        """A file that takes ten bytes more, the first time."""

        full = True

        def __init__(self, *args, **kwargs):
            self.file = open(*args, **kwargs)  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()

        def write(self, data):
            part = data[:10] if Filling.full else data
            Filling.full = False
            return self.file.write(part)

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(files, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(files, "open", Filling, raising=False)
    events.emit("two")
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["one", "two"]
