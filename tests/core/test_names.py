"""Names of jobs: made, read back, and nothing else taken for one."""

import pytest

from lmnas.core.names import JobName

NAMES = {
    "search-0": JobName("search", seed=0),
    "search-12-trial-5": JobName("search", seed=12, trial=5),
    "select-0123456789ab-3": JobName("select", "0123456789ab", 3),
    "train-searched-0": JobName("train", "searched", 0),
    "train-my-lstm-2-10": JobName("train", "my-lstm-2", 10),
    "test-lstm-2": JobName("test", "lstm", 2),
    "compress": JobName("compress"),
    "finetune": JobName("finetune"),
    "test": JobName("test"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_made_and_read_back(name):
    assert JobName.parse(name) == NAMES[name]
    assert str(NAMES[name]) == name


@pytest.mark.parametrize(
    "folder",
    ["", "search", "search-", "search-0-trial", "train-searched-0.bak", "train-searched-00", "train--0", "x-y-1"],
)
def test_other_folders_are_no_jobs(folder):
    assert JobName.parse(folder) is None
