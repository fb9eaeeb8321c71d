"""The embedded images: small coloured shapes, drawn here, so that the whole job runs without any download.

Ten classes. Centre, radius, turn, both colours, a tint across the ground, a stray bar and noise are random: pixels say
little one by one (a linear model is far off), while a small convolutional network tells the classes apart well, not
perfectly.
"""

from collections.abc import Callable

import numpy as np

from lmnas.core.seeds import derive

CLASSES = ("disc", "ring", "square", "frame", "triangle", "plus", "cross", "bars", "rungs", "checkers")
SIZE = 16
"""Pixels of a side."""
N_TRAIN, N_TEST = 8000, 2000
VERSION = 1
"""Version of the drawing, raised when the images change."""
_CHUNK = 1000


def draw(split: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, 3, 16, 16) uint8 images and (n,) labels; each split has a generator of its own, so none is in two of them."""
    draws = np.random.default_rng(derive(0, "shapes", split))
    labels = draws.integers(len(CLASSES), size=n)
    parts = [_draw(draws, labels[start : start + _CHUNK]) for start in range(0, n, _CHUNK)]
    return np.concatenate(parts), labels


def _draw(draws: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    n = len(labels)

    def uniform(low: float, high: float) -> np.ndarray:
        return draws.uniform(low, high, size=(n, 1, 1))

    y, x = np.mgrid[:SIZE, :SIZE][:, None] + 0.5
    radius = uniform(4.0, 6.5)
    margin = radius - 1.0  # a shape may leave the picture by a pixel or so
    dy, dx = (grid - (margin + (SIZE - 2 * margin) * uniform(0, 1)) for grid in (y, x))
    turn = uniform(-0.2, 0.2)
    u, v = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx
    coverage = np.empty((n, SIZE, SIZE))
    for number, name in enumerate(CLASSES):
        rows = labels == number
        distance = SHAPES[name](u[rows], v[rows], radius[rows])
        coverage[rows] = np.clip(0.5 - distance, 0, 1)  # a soft edge, one pixel wide

    ground = draws.uniform(0, 1, size=(n, 3, 1, 1))
    ink = draws.uniform(0, 1, size=(n, 3, 1, 1))
    # both colours at least this far apart, else nothing is to be seen: the farther corner of the cube serves
    near = np.abs(ink - ground).max(axis=1, keepdims=True) < 0.4
    ink = np.where(near, np.where(ground < 0.5, ground + 0.5, ground - 0.5), ink)
    tint = draws.normal(0, 0.015, size=(n, 3, 2, 1, 1))
    picture = ground + tint[:, :, 0] * (x - SIZE / 2) + tint[:, :, 1] * (y - SIZE / 2)
    angle, offset = uniform(0, np.pi), uniform(-6, 6)
    bar = np.abs(np.cos(angle) * (x - SIZE / 2) + np.sin(angle) * (y - SIZE / 2) - offset) - 0.5
    stray = draws.uniform(0, 1, size=(n, 3, 1, 1))
    picture = picture + np.clip(0.5 - bar, 0, 1)[:, None] * (stray - picture) * 0.6
    picture = picture + coverage[:, None] * (ink - picture)
    picture = picture + draws.normal(0, 0.07, size=picture.shape)
    return (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)


# Signed distances in pixels from a shape's edge, negative inside, of points (u, v) from its centre; r is its radius.


def _square(u: np.ndarray, v: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) - 0.85 * r


def _triangle(u: np.ndarray, v: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.maximum(v - 0.6 * r, np.abs(u) * np.cos(np.pi / 6) - v * np.sin(np.pi / 6) - 0.55 * r)


def _plus(u: np.ndarray, v: np.ndarray, r: np.ndarray) -> np.ndarray:
    arm = np.minimum(np.abs(u), np.abs(v)) - 0.28 * r
    return np.maximum(arm, np.maximum(np.abs(u), np.abs(v)) - r)


def _inside(pattern: np.ndarray, u: np.ndarray, v: np.ndarray, r: np.ndarray) -> np.ndarray:
    """A pattern (a wave of slope 1 a pixel), cut out by a disc."""
    return np.maximum(pattern, np.hypot(u, v) - r)


def _wave(w: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Stripes, positive and negative in turn, half a period every 0.55 radii."""
    step = 0.55 * r
    return (np.abs((w / step + 0.5) % 2 - 1) - 0.5) * step


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda u, v, r: np.hypot(u, v) - r,
    "ring": lambda u, v, r: np.abs(np.hypot(u, v) - 0.75 * r) - 0.25 * r,
    "square": _square,
    "frame": lambda u, v, r: np.abs(_square(u, v, 0.8 * r)) - 0.22 * r,
    "triangle": _triangle,
    "plus": _plus,
    "cross": lambda u, v, r: _plus((u + v) / np.sqrt(2), (v - u) / np.sqrt(2), r),
    "bars": lambda u, v, r: _inside(_wave(u, r), u, v, r),
    "rungs": lambda u, v, r: _inside(_wave(v, r), u, v, r),
    "checkers": lambda u, v, r: _inside(np.sign(_wave(u, r)) * _wave(v, r), u, v, r),
}
