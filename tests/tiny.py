"""A world of seconds: a small text, and a recipe of the whole job on it."""

import random
from pathlib import Path
from typing import Any

TEXT = "the a cat dog bird house tree sees likes finds eats near under big small red old and"
WORDS = TEXT.split()


def text(n_lines: int = 60, seed: int = 0) -> str:
    """Lines of six words each."""
    draws = random.Random(seed)
    return "".join(" ".join(draws.choice(WORDS) for _ in range(6)) + "\n" for _ in range(n_lines))


def training(**changes: Any) -> dict[str, Any]:
    return {
        "epochs": 1,
        "model": {"width": 4},
        "batches": {"batch_size": 4, "bptt": 10, "test_batch_size": 2, "eval_batch_size": 2},
        "optimizer": {"learning_rate": 1.0, "averaging": "none"},
        **changes,
    }


def recipe(data: str | Path, **changes: Any) -> dict[str, Any]:
    """A complete recipe; `changes` replace whole sections."""
    return {
        "name": "tiny",
        "task": {"name": "language-modeling", "data": str(data)},
        "space": {"name": "recurrent-cell", "n_nodes": 2},
        "strategy": {"name": "random"},
        "estimator": {"name": "shared", "training": training()},
        "search": {"seeds": 1, "candidates": 2, "batch": 2},
        "select": {"keep": 2, "epochs": 1, "seeds": 1},
        "train": {"seeds": 2, "training": training()},
        "baselines": {"random": {"source": "random"}, "lstm": {"source": "lstm-1"}},
        # `auto` would depend on what this machine has compiled
        "execution": {"device": "cpu", "workers": 1, "threads": 1, "kernel": "reference"},
        **changes,
    }
