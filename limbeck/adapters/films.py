"""Films of a beating chamber, drawn by numbers: those of patients, with masks, and those that a generator made."""

from __future__ import annotations

import numpy as np

__all__ = ["hearts", "hearts_made"]

SIDE, LENGTH = 16, 10
Films = tuple[np.ndarray, np.ndarray]


def hearts(train: int = 160, validation: int = 40, test: int = 120) -> dict[str, Films]:
    """Films [N, LENGTH SIDE, SIDE] of patients, strips of pictures one below the other, and masks [N, 1, ...] of 0, 1.

    A dark chamber with a bright wall beats once or twice in a film, under speckle; another dark spot does not beat.
    """
    random = np.random.default_rng(2026)
    return {part: _patients(random, n) for part, n in (("train", train), ("validation", validation), ("test", test))}


def hearts_made(train: int = 320) -> dict[str, Films]:
    """Films of a generator that was asked for outlines and painted them only nearly: the masks are what it was asked
    for. Validation and test are those of `hearts`. Its outlines are smooth, and its speckle is finer."""
    random = np.random.default_rng(2027)
    asked = _chamber(random, train)
    painted = _moved(random, asked)
    films = _seen(random, _inside(painted), speckle=0.35, spot=False)
    return {**hearts(), "train": (films, _mask(_inside(asked)))}


def _patients(random: np.random.Generator, count: int) -> Films:
    chamber = _chamber(random, count)
    chamber["wave"] = random.uniform(0.0, 0.16, (count, 2))
    chamber["turn"] = random.uniform(0, 2 * np.pi, (count, 2))
    inside = _inside(chamber)
    return _seen(random, inside, speckle=0.5, spot=True), _mask(inside)


def _chamber(random: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    """Ellipses: centre [N, 2], axes [N, 2] at rest, angle [N]; by how much they shrink [N], and when [N, LENGTH]."""
    beat = random.uniform(0, 1, (count, 1)) + np.arange(LENGTH) / random.uniform(6, 9, (count, 1))
    return {
        "centre": SIDE / 2 - 0.5 + random.uniform(-1.5, 1.5, (count, 2)),
        "axes": random.uniform((3.2, 4.6), (4.2, 6.2), (count, 2)),
        "angle": random.uniform(-0.5, 0.5, count),
        "shrinks": random.uniform(0.15, 0.4, count),
        "phase": 0.5 - 0.5 * np.cos(2 * np.pi * beat),
        "wave": np.zeros((count, 2)),
        "turn": np.zeros((count, 2)),
    }


def _moved(random: np.random.Generator, asked: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a generator paints of what it was asked: elsewhere, of another size, and a little late."""
    count = len(asked["angle"])
    return {
        **asked,
        "centre": asked["centre"] + random.normal(0, 1.0, (count, 2)),
        "axes": asked["axes"] * random.uniform(0.75, 1.05, (count, 1)),
        "phase": np.roll(asked["phase"], 1, 1),
    }


def _inside(chamber: dict[str, np.ndarray]) -> np.ndarray:
    """How far each pixel lies within the wall, [N, LENGTH, SIDE, SIDE]: 1 in the centre, 0 on the wall."""
    rows, cols = np.mgrid[:SIDE, :SIDE]
    y, x = rows - chamber["centre"][:, :1, None], cols - chamber["centre"][:, 1:, None]
    cos, sin = np.cos(chamber["angle"])[:, None, None], np.sin(chamber["angle"])[:, None, None]
    wide, tall = (x * cos + y * sin) / chamber["axes"][:, :1, None], (y * cos - x * sin) / chamber["axes"][:, 1:, None]
    around, far = np.arctan2(tall, wide), np.hypot(wide, tall)
    for k in (0, 1):
        wave = np.cos((k + 2) * around + chamber["turn"][:, k, None, None])
        far = far / (1 + chamber["wave"][:, k, None, None] * wave)
    size = 1 - chamber["shrinks"][:, None] * chamber["phase"]
    within: np.ndarray = 1 - far[:, None] / size[:, :, None, None]
    return within


def _mask(inside: np.ndarray) -> np.ndarray:
    marked: np.ndarray = (inside > 0).astype(np.float32).reshape(len(inside), 1, LENGTH * SIDE, SIDE)
    return marked


def _seen(random: np.random.Generator, inside: np.ndarray, *, speckle: float, spot: bool) -> np.ndarray:
    """Strips in [0, 1] of what lies inside: dark, in a bright wall, on grey, all of it speckled."""
    wall = np.exp(-((inside / 0.18) ** 2))
    shown = np.where(inside > 0, 0.15, 0.45) + 0.4 * wall
    if spot:
        rows, cols = np.mgrid[:SIDE, :SIDE]
        place = random.uniform((11, 1), (15, 15), (len(inside), 2))
        far = np.hypot(rows - place[:, :1, None], cols - place[:, 1:, None])
        shown = shown * (1 - 0.6 * (far < 2.5))[:, None]
    shown = shown * (1 + speckle * random.standard_normal(shown.shape)) + 0.05 * random.standard_normal(shown.shape)
    films: np.ndarray = shown.clip(0, 1).astype(np.float32).reshape(len(inside), LENGTH * SIDE, SIDE)
    return films
