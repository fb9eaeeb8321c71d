"""Files are whole, new or old, whatever the disk does."""

import errno
import os

import pytest

from lmnas.core import files
from lmnas.core.errors import UserError
from lmnas.core.files import write_atomic


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
