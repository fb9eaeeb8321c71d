"""Small worlds shared by the tests: tiny texts and tasks, one thread, caches in temporary folders."""

import os
import random
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """A corpus cache of the test session's own."""
    path = tmp_path_factory.mktemp("cache")
    os.environ["LMNAS_CACHE"] = str(path)
    return path


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory, cache) -> Path:
    """About 4,000 words over 30 types, the next one depending on the last: something to learn in seconds."""
    draws = random.Random(0)
    words = [f"w{i}" for i in range(30)]
    lines, current = [], 0
    for _ in range(400):
        line = []
        for _ in range(9):
            current = (3 * current + draws.choice((1, 1, 1, 2, 7))) % 30
            line.append(words[current])
        lines.append(" ".join(line))
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_task(tiny_text):
    """Language modelling on `tiny_text`."""
    from lmnas.tasks.language_modeling import LanguageModeling

    return LanguageModeling(data=str(tiny_text))


@pytest.fixture
def float64():
    """New tensors are float64 inside the test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data; the test is skipped where there is none."""
    folder = os.environ.get("LMNAS_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("LMNAS_DATA does not name a folder with the real data sets")
    return Path(folder)
