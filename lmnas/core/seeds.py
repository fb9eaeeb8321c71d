"""One seeded generator per purpose.

A generator is derived from the run's seed and the purpose's name (and, where something is drawn again and again, its
index k). Nothing then needs saving or restoring: the k-th draw is the same in a continued run and in one never killed.
"""

import hashlib
import random

import torch


def derive(seed: int, *purpose: object) -> int:
    """A 63-bit seed for one purpose; distinct purposes give independent seeds."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def rng(seed: int, *purpose: object) -> random.Random:
    """A Python generator, for discrete choices."""
    return random.Random(derive(seed, *purpose))


def generator(seed: int, *purpose: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator, for tensors drawn on `device`."""
    return torch.Generator(device=device).manual_seed(derive(seed, *purpose))
