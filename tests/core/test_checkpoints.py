"""Checkpoints come back bit by bit, and a broken one is passed over."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmnas.core.checkpoints import Checkpoints, pack, unpack

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
