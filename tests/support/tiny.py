"""A world of seconds: a small text, small pictures, and recipes of the whole job on them."""

import random
from pathlib import Path
from typing import Any

import pytest

from lmnas.core.contracts import Proposal, Trial
from lmnas.core.genotype import Genotype

TEXT = "the a cat dog bird house tree sees likes finds eats near under big small red old and"
WORDS = TEXT.split()


def text(n_lines: int = 60, seed: int = 0) -> str:
    """Lines of six words each."""
    draws = random.Random(seed)
    return "".join(" ".join(draws.choice(WORDS) for _ in range(6)) + "\n" for _ in range(n_lines))


def trial(what: Genotype | Proposal, value: float | None, number: int = 0) -> Trial:
    """A finished trial with one score; without one, a failed trial."""
    proposal = what if isinstance(what, Proposal) else Proposal(what)
    if value is None:
        return Trial(proposal, number, status="diverged", failure="diverged")
    return Trial(proposal, number, {"error": value})


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


COLOURS = {"red": (220, 40, 30), "green": (30, 200, 60), "blue": (20, 60, 230)}


def pictures(folder: Path, n_train: int = 8, n_test: int = 3, n_valid: int = 0, size: int = 8) -> Path:
    """A folder of `n` noisy PNG pictures of each of three colours per split: train/red/0.png, ..."""
    image = pytest.importorskip("PIL.Image", reason="the extra `images` is not installed")
    for split, n in (("train", n_train), ("valid", n_valid), ("test", n_test)):
        for name, colour in COLOURS.items():
            for number in range(n):
                draws = random.Random(f"{split}/{name}/{number}")
                pixels = bytes(max(0, min(255, c + draws.randint(-60, 60))) for _ in range(size**2) for c in colour)
                path = folder / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.frombytes("RGB", (size, size), pixels).save(path)
    return folder


def image_recipe(data: str | Path = "shapes", **changes: Any) -> dict[str, Any]:
    """A complete recipe on images."""
    training = {
        "epochs": 1,
        "model": {"width": 2},
        "batches": {"batch_size": 6, "crop": 1},
        "optimizer": {"learning_rate": 0.05, "momentum": 0.9, "clip": 5.0, "averaging": "none"},
    }
    return {
        "name": "tiny-images",
        "task": {"name": "image-classification", "data": str(data)},
        "space": {"name": "resnet", "max_blocks": 2},
        "strategy": {"name": "random"},
        "estimator": {"name": "standalone", "training": training},
        "search": {"seeds": 1, "candidates": 2, "batch": 2},
        "select": {"keep": 2, "epochs": 1, "seeds": 1},
        "train": {"seeds": 1, "training": training},
        "baselines": {"random": {"source": "random"}, "resnet": {"source": "resnet-8"}},
        "execution": {"device": "cpu", "workers": 1, "threads": 1},
        **changes,
    }
