"""Projectors: small networks that take a student's feature to the width of a teacher's, for training only.

One for every kind of feature: maps [B, C, H, W], tokens [B, T, D] and vectors [B, D].
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from limbeck.core.card import require
from limbeck.core.errors import BadInput
from limbeck.core.features import Shape, as_map, tokens

Kind = Literal["linear", "mlp", "conv", "orthogonal", "grouped", "attention"]
KINDS = ("linear", "mlp", "conv", "orthogonal", "grouped", "attention")


def projector(kind: str, width: int, out: int, *, places: int = 1, bias: bool = True) -> nn.Module:
    """A projector from features of `width` channels to `out`.

    linear: one matrix at every place. mlp: two with a ReLU between, `out` wide. conv: two 3x3 convolutions with batch
    norm and a ReLU between, for maps and square pictures of tokens. orthogonal: a matrix whose columns (rows, when
    out < width) stay orthonormal, so that it keeps angles; without bias. grouped: a matrix of its own for each of
    `places` places. attention: each of `places` learned queries looks at all places of the feature.
    """
    if kind == "linear":
        return Pointwise(nn.Linear(width, out, bias=bias))
    if kind == "mlp":
        return Pointwise(nn.Sequential(nn.Linear(width, out), nn.ReLU(), nn.Linear(out, out, bias=bias)))
    if kind == "conv":
        return Convolution(width, out)
    if kind == "orthogonal":  # Householder's signs would not survive weight decay, the matrix exponential does
        matrix = nn.Linear(width, out, bias=False)
        return Pointwise(nn.utils.parametrizations.orthogonal(matrix, orthogonal_map="matrix_exp"))
    if kind == "grouped":
        return Grouped(places, width, out)
    if kind == "attention":
        return Queries(places, width, out)
    require(False, "projector", kind, f"one of {', '.join(KINDS)}")
    raise AssertionError


def map_regressor(student: Shape, teacher: Shape) -> nn.Sequential:
    """From maps [B, C, H, W] of one shape to those of another: a convolution that meets the size, batch norm, ReLU.

    Its stride is 2 from twice the size, it is transposed from half the size, else its kernel takes off the difference;
    to any other larger size maps are resized.
    """
    (_, c, *size), (_, out, *wanted) = student, teacher
    resize: nn.Module
    if size == [2 * s for s in wanted]:
        resize = nn.Conv2d(c, out, kernel_size=3, stride=2, padding=1)
    elif [2 * s for s in size] == wanted:
        resize = nn.ConvTranspose2d(c, out, kernel_size=4, stride=2, padding=1)
    elif all(a >= b for a, b in zip(size, wanted, strict=True)):
        resize = nn.Conv2d(c, out, kernel_size=(1 + size[0] - wanted[0], 1 + size[1] - wanted[1]))
    else:
        resize = nn.Sequential(nn.Conv2d(c, out, 1), nn.Upsample(tuple(wanted), mode="bilinear"))
    return nn.Sequential(resize, nn.BatchNorm2d(out), nn.ReLU())


def perceptron(*widths: int, bias: bool = True) -> nn.Sequential:
    """Linear maps from each of the widths to the next, with ReLUs between."""
    layers: list[nn.Module] = []
    for width, out in pairwise(widths):
        layers += [nn.Linear(width, out, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def through(module: nn.Module, feature: Tensor) -> Tensor:
    """What a module makes of a feature, in the dtype of its weights; one without weights takes it as it is."""
    out: Tensor = module(feature.to(next(module.parameters(), feature).dtype))
    return out


class Pointwise(nn.Module):
    """A network of vectors, applied at every place of a feature."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, feature: Tensor) -> Tensor:
        if feature.ndim == 4:
            moved: Tensor = self.inner(feature.movedim(1, -1)).movedim(-1, 1)
            return moved
        out: Tensor = self.inner(feature)
        return out


class Convolution(nn.Module):
    """Two 3x3 convolutions with batch norm and a ReLU between; tokens are seen as a square picture and given back."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(width, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1),
        )

    def forward(self, feature: Tensor) -> Tensor:
        out: Tensor = self.inner(as_map(feature))
        if feature.ndim == 3:
            return tokens(out)
        return out if feature.ndim == 4 else out.flatten(1)


class Grouped(nn.Module):
    """A matrix of its own for every place of a feature with `places` places."""

    def __init__(self, places: int, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(places, width, out))
        self.bias = nn.Parameter(torch.zeros(places, out))
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)

    def forward(self, feature: Tensor) -> Tensor:
        rows = tokens(feature)
        if rows.shape[1] != len(self.weight):
            raise BadInput(f"this projector was made for {len(self.weight)} places, got {rows.shape[1]}")
        out = torch.einsum("btd,tde->bte", rows, self.weight) + self.bias
        if feature.ndim == 4:
            picture: Tensor = out.mT.unflatten(2, feature.shape[2:])
            return picture
        return out if feature.ndim == 3 else out.squeeze(1)


class Queries(nn.Module):
    """`places` learned queries of width `out` look at all places of a feature -> tokens [B, places, out]."""

    def __init__(self, places: int, width: int, out: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(places, out))
        self.keys, self.values = nn.Linear(width, out), nn.Linear(width, out)

    def forward(self, feature: Tensor) -> Tensor:
        rows = tokens(feature)
        queries = self.queries.to(rows.dtype).expand(len(rows), -1, -1)
        return nn.functional.scaled_dot_product_attention(queries, self.keys(rows), self.values(rows))
