"""What losses over pairs of layers share: which layers, the sum over them, connectors, and examples that count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from limbeck.core.features import Shape, Shapes, per_example, pick, same_places, width
from limbeck.core.maths import pair
from limbeck.core.taps import spread

T = TypeVar("T", Tensor, Shape)
Layers = tuple[int, ...]


def paired(student: Sequence[T], teacher: Sequence[T], layers: Sequence[int] = ()) -> list[tuple[T, T]]:
    """Features of both, layer by layer; `layers` counts from shallow (0) or deep (-1), () takes all.

    With () and different numbers of layers those of equal relative depth are paired, the last with the last, and the
    network that has more keeps some to itself. Raises BadInput when a layer does not exist.
    """
    if layers:
        pairs = [(pick("layers", student, i, "student"), pick("layers", teacher, i, "teacher")) for i in layers]
    else:
        pairs = spread(len(student), len(teacher))
    return [(student[i], teacher[j]) for i, j in pairs]


def matched(student: Sequence[Tensor], teacher: Sequence[Tensor], layers: Layers = ()) -> list[tuple[Tensor, Tensor]]:
    """`paired` and upcast, with as many places in the one as in the other, and no gradient to the teacher."""
    return [same_places(*pair(s, t.detach())) for s, t in paired(student, teacher, layers)]


def widths(student: Shapes, teacher: Shapes, layers: Layers = ()) -> list[tuple[int, int]]:
    """How wide the features of `paired` layers are."""
    return [(width(s), width(t)) for s, t in paired(student, teacher, layers)]


def picked(student: Sequence[T], teacher: Sequence[T], layer: int) -> tuple[T, T]:
    """The feature of either at `layer`, from shallow (0) or deep (-1). Raises BadInput when there is none."""
    return student[pick("layer", student, layer, "student")], teacher[pick("layer", teacher, layer, "teacher")]


def each(error: Tensor) -> Tensor:
    """The mean an example, or a token: maps and vectors [B, ...] -> [B], tokens [B, T, D] -> [B, T]."""
    return error.mean(-1) if error.ndim == 3 else per_example(error)


def summed(layers: Sequence[Tensor]) -> Tensor:
    """The sum over layers of values [B] or [B, T]; [B], by the mean over tokens, unless all have the same tokens."""
    same = all(layer.shape == layers[0].shape for layer in layers)
    return torch.stack(
        [layer if same else layer.flatten(1).mean(1) if layer.ndim > 1 else layer for layer in layers]
    ).sum(0)


def deepest_most(layers: Sequence[Tensor]) -> Tensor:
    """The sum over layers, each with twice the weight of the one before it, the last with 1: [B] each -> [B]."""
    return torch.stack([loss / 2**i for i, loss in enumerate(reversed(layers))]).sum(0)


def counted(mask: Tensor | None, rows: Tensor) -> Tensor:
    """Which of the examples count: bool [B]. One with a mask over tokens counts if any of its tokens does."""
    if mask is None:
        return torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    return mask.bool().flatten(1).any(1) if mask.ndim > 1 else mask.bool()


class Connector(nn.Module):
    """A linear map at every place, without bias, and batch norm: a 1x1 convolution for maps, tokens and vectors alike.

    Weights start from a normal distribution with the variance 2 / out.
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, out, bias=False), nn.BatchNorm1d(out)
        nn.init.normal_(self.linear.weight, std=math.sqrt(2 / out))

    def forward(self, feature: Tensor) -> Tensor:
        last = feature.movedim(1, -1) if feature.ndim == 4 else feature
        rows = self.norm(self.linear(last.flatten(0, -2).to(self.linear.weight.dtype)))
        out: Tensor = rows.unflatten(0, last.shape[:-1])
        return out.movedim(-1, 1) if feature.ndim == 4 else out
