"""Vectors that stand for parts of objects, and a neck that adds what it reads from them to a student's feature."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.maths import pairwise_distances


class Bank(nn.Module):
    """`count` prototypes of `width` numbers, which come to lie where the features do."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.zeros(count, width))

    @torch.no_grad()
    def start(self, features: Tensor) -> None:
        """Begin at features [N, width] drawn at random; the same is taken again only when there are too few."""
        count = len(self.prototypes)
        order = torch.randperm(len(features), device=features.device).repeat(-(-count // len(features)))
        self.prototypes.copy_(features[order[:count]])

    def forward(self, features: Tensor) -> Tensor:
        """Squared distance of features [..., width] to the nearest prototype [...]; only that one has a gradient."""
        flat = features.detach().flatten(0, -2).to(self.prototypes.dtype)
        nearest = self.prototypes[assign(flat, self.prototypes)]
        distance: Tensor = (nearest - flat).square().sum(1)
        return distance.view(features.shape[:-1])


def assign(features: Tensor, prototypes: Tensor) -> Tensor:
    """Number of the nearest prototype [K, D] of each feature [N, D]: [N]."""
    with torch.no_grad():
        return pairwise_distances(features, prototypes, squared=True).argmin(1)


class Guide(nn.Module):
    """A neck that asks fixed prototypes P: maps f [B, width, H, W] -> (W f - a P, f + V a P).

    a = softmax(W f . P / (temperature sqrt(D))) over prototypes at every place; W and V are 1x1 convolutions, V without
    bias, so that prototypes of 0 change nothing.
    """

    prototypes: Tensor

    def __init__(self, width: int, inner: int, count: int, temperature: float) -> None:
        super().__init__()
        self.width, self.out, self.inner, self.count, self.temperature = width, width, inner, count, temperature
        self.ask, self.answer = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1, bias=False)
        self.register_buffer("prototypes", torch.zeros(count, inner))

    def looks(self, asked: Tensor) -> Tensor:
        """How much each place of W f [B, D, H, W] looks at each prototype: [B, K, H, W], of sum 1 over K."""
        scores = torch.einsum("bdhw,kd->bkhw", asked, self.prototypes.to(asked.dtype))
        return (scores / (self.temperature * math.sqrt(self.inner))).softmax(1)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        asked = self.ask(maps)
        read = torch.einsum("bkhw,kd->bdhw", self.looks(asked), self.prototypes.to(asked.dtype))
        return asked - read, maps + self.answer(read)

    def spec(self) -> dict[str, Any]:
        """The arguments that build this again."""
        return {"width": self.width, "inner": self.inner, "count": self.count, "temperature": self.temperature}
