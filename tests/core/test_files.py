"""Files that survive a kill: checkpoints that come back bit by bit, logs without gaps or doubles, whole files only."""

import errno
import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmnas.core import files
from lmnas.core.errors import UserError
from lmnas.core.files import Checkpoints, Events, pack, read_events, unpack, write_atomic
from lmnas.core.job import Job

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    numbers = torch.arange(torch.Size(shape).numel() * 2).remainder(7) - 3
    tensor = numbers.to(draw(st.sampled_from(DTYPES)))[::2].reshape(shape)
    return tensor.transpose(0, -1) if shape and draw(st.booleans()) else tensor


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
states = st.recursive(
    scalars | tensors(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.none(), inner, max_size=4)
    ),
    max_leaves=12,
)


def same(first, second):
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second)) and type(first) is type(second)
    return type(first) is type(second) and repr(first) == repr(second)


@given(states)
def test_every_state_comes_back_as_it_was(state):
    assert same(unpack(pack(state)), state)


def test_nan_and_shared_memory_are_no_obstacle():
    weight = torch.tensor([[1.0, float("nan")], [3.0, 4.0]])
    back = unpack(pack({"a": weight, "b": weight, "c": weight[0], "d": float("nan"), "e": float("-inf")}))
    assert torch.equal(back["a"].nan_to_num(-1), weight.nan_to_num(-1)) and torch.equal(back["a"][1], back["b"][1])
    assert back["c"][0] == 1 and back["d"] != back["d"] and back["e"] == float("-inf")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": [object()]}, "cannot hold a object"),
        ({"a": {1, 2}}, "cannot hold a set"),
        ({"a": torch.nn.Linear(1, 1)}, "cannot hold a Linear"),
        ({(1, 2): "a"}, "a key of type tuple"),
    ],
)
def test_what_cannot_be_saved_is_refused(state, message):
    with pytest.raises(TypeError, match=message):
        pack(state)


# ------------------------------------------------------------------------------------------------------- checkpoints


def state(index):
    return {"index": index, "weights": torch.full((100,), float(index))}


def indices(directory):
    """(number, extra) of every checkpoint there is."""
    return sorted((int(path.name[:6]), "-extra-" in path.name) for path in directory.iterdir())


@pytest.fixture
def warnings_of(tmp_path):
    found = []
    return Checkpoints(tmp_path, found.append), found


def test_the_last_two_that_were_due_are_kept_and_an_extra_one_beside_them(warnings_of, tmp_path):
    checkpoints, said = warnings_of
    for index in range(1, 4):
        checkpoints.save(state(index))
    assert indices(tmp_path) == [(2, False), (3, False)]
    checkpoints.save({**state(3), "later": True}, extra=True)
    assert indices(tmp_path) == [(2, False), (3, False), (3, True)]
    assert checkpoints.load()["later"]
    assert "later" not in checkpoints.load(due_only=True)
    checkpoints.save({**state(3), "later": 2}, extra=True)
    assert indices(tmp_path) == [(2, False), (3, False), (3, True)]
    checkpoints.save(state(4))
    assert indices(tmp_path) == [(3, False), (4, False)]
    assert not said
    checkpoints.delete()
    assert checkpoints.load() is None and not said and not tmp_path.exists()


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_checkpoint_is_passed_over_by_name(keep, warnings_of, tmp_path):
    checkpoints, said = warnings_of
    checkpoints.save(state(1))
    checkpoints.save(state(2))
    newest = max(tmp_path.iterdir())
    newest.write_bytes(newest.read_bytes()[:keep])
    assert checkpoints.load()["index"] == 1
    assert len(said) == 1 and newest.name in said[0]


def test_any_flipped_byte_is_noticed(warnings_of, tmp_path):
    checkpoints, said = warnings_of
    checkpoints.save(state(1))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for place in range(0, len(whole), 11):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert checkpoints.load() is None
        assert path.name in said[-2] and said[-1] == "no good checkpoint is left; starting over"
    path.write_bytes(whole)
    assert same(checkpoints.load(), state(1))


def test_broken_checkpoints_do_not_push_good_ones_out(warnings_of, tmp_path):
    """After going back, what is saved next replaces the broken file of the same number."""
    checkpoints, said = warnings_of
    for index in (1, 2, 3):
        checkpoints.save(state(index))
    max(tmp_path.iterdir()).write_bytes(b"broken")
    assert checkpoints.load()["index"] == 2
    checkpoints.save({**state(3), "again": True})
    assert indices(tmp_path) == [(2, False), (3, False)]
    assert checkpoints.load()["again"] and len(said) == 1


def test_a_checkpoint_half_written_by_a_killed_process_is_swept_away(warnings_of, tmp_path):
    checkpoints, said = warnings_of
    checkpoints.save(state(1))
    (tmp_path / ".000002-0123456789abcdef.safetensors.tmp").write_bytes(b"half")
    assert checkpoints.load()["index"] == 1 and not said
    checkpoints.save(state(2))
    assert len(list(tmp_path.iterdir())) == 2


# ------------------------------------------------------------------------------------------------------------- events


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


# ----------------------------------------------------------------------------------------------------- write errors


@pytest.fixture
def errors(monkeypatch):
    """`errors(owner, name, n)`: the next `n` calls find the disk full."""
    monkeypatch.setattr(files, "PAUSE_SECONDS", 0.0)

    def fail(owner, name, n):
        original, left = getattr(owner, name, open), [n]

        def failing(*args, **kwargs):
            if left[0]:
                left[0] -= 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, failing, raising=False)

    return fail


PLACES = [(os, "replace"), (os, "fsync"), (files, "open")]


@pytest.mark.parametrize(("owner", "name"), PLACES)
def test_a_passing_write_error_is_not_noticed(owner, name, errors, tmp_path):
    path = tmp_path / "file"
    write_atomic(path, "old")
    errors(owner, name, files.WRITE_ATTEMPTS - 1)
    write_atomic(path, "new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("owner", "name"), PLACES)
def test_a_lasting_write_error_names_the_file_and_leaves_the_old_one(owner, name, errors, tmp_path):
    path = tmp_path / "file"
    write_atomic(path, "old")
    errors(owner, name, 100)
    with pytest.raises(UserError, match="file: cannot be written \\(No space left on device\\); what was saved"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_log_has_whole_lines_when_the_disk_fills_up_inside_one(errors, tmp_path, monkeypatch):
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
