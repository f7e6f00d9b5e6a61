"""Inner features of any network, brought to one form: maps [B, C, H, W], tokens [B, T, D] and vectors [B, D].

A loss written with these serves convolutional networks, transformers and perceptrons alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import BadInput
from limbeck.core.maths import pair, upcast

Shape = tuple[int, ...]
Shapes = list[Shape]
Mask = Tensor | None  # what counts, True, of examples [B] or of their tokens [B, T]; None: everything


def width(shape: Shape) -> int:
    """Channels of a map, or the last dimension of tokens and vectors."""
    return shape[1] if len(shape) == 4 else shape[-1]


def grid(places: int) -> tuple[int, int]:
    """(H, W) of a square picture of that many tokens. Raises BadInput when there is none."""
    side = math.isqrt(places)
    if side * side != places:
        raise BadInput(
            f"{places} tokens are no square picture; match tokens with tokens, or drop the class token first"
        )
    return side, side


def tokens(feature: Tensor) -> Tensor:
    """[B, T, D]: the places of a map row by row, tokens as they are, a vector as one token."""
    if feature.ndim == 4:
        return feature.flatten(2).mT
    return feature if feature.ndim == 3 else feature.unsqueeze(1)


def as_map(feature: Tensor) -> Tensor:
    """[B, C, H, W]: a map as it is, tokens as a square picture, a vector as one place."""
    if feature.ndim == 4:
        return feature
    if feature.ndim == 2:
        return feature[:, :, None, None]
    picture: Tensor = feature.mT.unflatten(2, grid(feature.shape[1]))
    return picture


def picture(feature: Tensor) -> Tensor:
    """A map; tokens as a square picture, or as their mean when they make none; a vector as one place."""
    if feature.ndim == 3 and math.isqrt(feature.shape[1]) ** 2 != feature.shape[1]:
        feature = pooled(feature)
    return as_map(feature)


def patches(feature: Tensor, grid: int) -> Tensor:
    """[B, grid^2, C, places in a patch]; the whole feature, of any kind, where grid is 1."""
    if grid == 1:
        return tokens(feature).mT.unsqueeze(1)
    picture = as_map(feature)
    if picture.shape[2] % grid or picture.shape[3] % grid:
        raise BadInput(f"`grid` {grid} does not divide a map of {picture.shape[2]} x {picture.shape[3]}")
    split = picture.unflatten(3, (grid, -1)).unflatten(2, (grid, -1))  # [B, C, grid, h, grid, w]
    out: Tensor = split.permute(0, 2, 4, 1, 3, 5).flatten(4).flatten(1, 2)
    return out


def pooled(feature: Tensor, real: Tensor | None = None) -> Tensor:
    """[B, D]: the mean over places; real [B, T]: only over those tokens."""
    places = tokens(feature)
    if real is None:
        return places.mean(1)
    weight = real.unsqueeze(-1).to(places)
    return (places * weight).sum(1) / weight.sum(1).clamp_min(1)


def pick(name: str, feats: Sequence[object], layer: int, side: str) -> int:
    """`layer`, counted from shallow (0) or from deep (-1), as a place in `feats`. Raises BadInput when it is none."""
    if not -len(feats) <= layer < len(feats):
        raise BadInput(f"`{name}`: {layer} is none of the {len(feats)} features of the {side}")
    return layer % len(feats)


def same_places(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both with as many places, in the student's form or as maps: the larger picture is averaged down to the smaller.

    Tokens of equal number stay tokens, vectors stay vectors; else both become maps.
    """
    if student.ndim == teacher.ndim and student.shape[1:-1] == teacher.shape[1:-1] and student.ndim < 4:
        return student, teacher
    if student.ndim == 2 or teacher.ndim == 2:
        return pooled(student), pooled(teacher)
    one, other = as_map(student), as_map(teacher)
    size = (min(one.shape[2], other.shape[2]), min(one.shape[3], other.shape[3]))
    return shrunk(one, size), shrunk(other, size)


def shrunk(maps: Tensor, size: Shape | None) -> Tensor:
    """Maps averaged down to at most `size`, (H, W)."""
    if size is None or (maps.shape[2] <= size[0] and maps.shape[3] <= size[1]):
        return maps
    return F.adaptive_avg_pool2d(maps, (min(maps.shape[2], size[0]), min(maps.shape[3], size[1])))


def regions(feature: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Means over the parts of a grid of that many parts, row by row: maps -> [B, parts, C]."""
    return F.adaptive_avg_pool2d(as_map(feature), size).flatten(2).mT


def shared_regions(student: Tensor, teacher: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """`regions` of both, upcast, for a grid x grid, or for as many as the smaller map has places."""
    one, other = as_map(upcast(student)), as_map(upcast(teacher))
    size = (min(grid, one.shape[2], other.shape[2]), min(grid, one.shape[3], other.shape[3]))
    return regions(one, size), regions(other, size)


def common(student: Shape, teacher: Shape) -> tuple[Shape, Shape]:
    """The shapes that `same_places` gives."""
    if len(student) == len(teacher) < 4 and student[1:-1] == teacher[1:-1]:
        return student, teacher
    if len(student) == 2 or len(teacher) == 2:
        return (student[0], width(student)), (teacher[0], width(teacher))
    sizes = [shape[2:] if len(shape) == 4 else grid(shape[1]) for shape in (student, teacher)]
    size = tuple(min(a, b) for a, b in zip(*sizes, strict=True))
    return (student[0], width(student), *size), (teacher[0], width(teacher), *size)


def per_example(error: Tensor) -> Tensor:
    """The mean over all but the batch: [B, ...] -> [B]."""
    return error.flatten(1).mean(1)


def apart(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference an example, without gradient to the teacher: [B, ...] x 2 -> [B]."""
    student, teacher = pair(student, teacher.detach())
    return per_example((student - teacher).square())
