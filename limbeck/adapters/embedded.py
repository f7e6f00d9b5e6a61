"""The data sets inside the package: they need no network, no optional library and no folder."""

import bz2
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.adapters import films
from limbeck.core.errors import BadInput, nearest

__all__ = ["NAMES", "Embedded", "load", "record"]

FOLDER = Path(__file__).parent.parent / "zoo"


@dataclass(frozen=True)
class Embedded:
    """A set as it is stored. kind: images, language or vectors. parts: split ("all" when there is none) -> inputs
    (array, or a list with one text) and labels. mean, std: of its training images, a channel, where white is 1."""

    kind: str
    parts: Mapping[str, tuple[Any, np.ndarray | None]]
    classes: list[str] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


@cache
def record() -> dict[str, dict[str, Any]]:
    """What is known of each stored file: counts, source, licence, sha256."""
    return dict(json.loads((FOLDER / "embedded.json").read_text(encoding="utf-8")))


def _file(name: str) -> Path:
    """The stored file of a set, after a look at its checksum."""
    path = FOLDER / str(record()[name]["file"])
    if not path.is_file():
        raise BadInput(f"the embedded data {path.name} is missing from this installation; install limbeck again")
    if hashlib.sha256(path.read_bytes()).hexdigest() != record()[name]["sha256"]:
        raise BadInput(f"the embedded data {path} is not what was shipped (checksum differs); install limbeck again")
    return path


def fashion_mnist_small() -> Embedded:
    """Fashion-MNIST, the first 700 training and 250 test images of each class; 28x28 grey."""
    known = record()["fashion_mnist_small"]
    with np.load(_file("fashion_mnist_small"), allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    parts: dict[str, tuple[Any, np.ndarray | None]] = {
        part: (np.ascontiguousarray(arrays[f"x_{part}"].transpose(0, 2, 1)), arrays[f"y_{part}"])
        for part in ("train", "test")
    }
    return Embedded("images", parts, list(known["classes"]), tuple(known["mean"]), tuple(known["std"]))


def digits() -> Embedded:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, values in [0, 1]."""
    from sklearn.datasets import load_digits

    inputs, labels = load_digits(return_X_y=True)
    images = (inputs.reshape(-1, 8, 8) / 16).astype(np.float32)
    return Embedded("images", {"all": (images, labels.astype(np.int64))}, [str(digit) for digit in range(10)])


def shakespeare_small() -> Embedded:
    """700,000 characters of plays by Shakespeare."""
    return Embedded("language", {"all": ([bz2.decompress(_file("shakespeare_small").read_bytes()).decode()], None)})


def blobs() -> Embedded:
    """A toy: 900 points in the plane, from five Gaussians on a circle of radius 3, a class each; deviation 0.6."""
    random = np.random.default_rng(0)
    labels = np.arange(900) % 5
    angle = labels * 2 * np.pi / 5
    centres = 3 * np.stack([np.cos(angle), np.sin(angle)], 1)
    points = (centres + 0.6 * random.standard_normal((900, 2))).astype(np.float32)
    return Embedded("vectors", {"all": (points, labels)}, [str(c) for c in range(5)])


def hearts() -> Embedded:
    """A toy: 320 films of a beating chamber with its masks, drawn by numbers; strips of ten pictures of 16x16."""
    return Embedded("images", films.hearts(), mean=(0.0,), std=(1.0,))


def hearts_made() -> Embedded:
    """The same task, but its 320 training films are those that a generator painted, nearly as it was asked to."""
    return Embedded("images", films.hearts_made(), mean=(0.0,), std=(1.0,))


NAMES = {
    "fashion_mnist_small": fashion_mnist_small,
    "digits": digits,
    "shakespeare_small": shakespeare_small,
    "blobs": blobs,
    "hearts": hearts,
    "hearts_made": hearts_made,
}


def load(name: str) -> Embedded:
    """The embedded set called `name`."""
    if name not in NAMES:
        raise BadInput(f"no embedded data {name!r}{nearest(name, NAMES)}")
    return NAMES[name]()
