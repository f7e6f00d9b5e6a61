"""All pairs of layers with learned weights: each layer of one network meets a mixture of all layers of the other.

A layer that looks for partners is an anchor, the others are candidates; which network anchors is the method's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from limbeck.core.card import require
from limbeck.core.maths import upcast


class Alignment(nn.Module):
    """Weights [B, A, C] of the candidates for each anchor and example: softmax over C of q . k / temperature.

    queries: one network an anchor, from what is told of it [B, ...] to q [B, D]. keys: one a candidate, to k [B, D].
    temperature: > 0. positions: learned vectors of the layers [A, D] and [C, D], whose products are added to q . k,
    so that a pair may suit whatever the example; their width D, or 0 for none. bilinear: from keys [B C, D] to a key
    for each anchor [B C, A D]; without it all anchors see the same keys.
    """

    def __init__(
        self,
        queries: Iterable[nn.Module],
        keys: Iterable[nn.Module],
        *,
        temperature: float = 1.0,
        positions: int = 0,
        bilinear: nn.Module | None = None,
    ) -> None:
        super().__init__()
        require(temperature > 0, "temperature", temperature, "> 0")
        self.queries, self.keys = nn.ModuleList(queries), nn.ModuleList(keys)
        self.temperature, self.bilinear = temperature, bilinear
        self.places: nn.ParameterList | None = None
        if positions:
            self.places = nn.ParameterList(torch.empty(len(n), positions) for n in (self.queries, self.keys))
            for place in self.places:
                nn.init.xavier_normal_(place)

    def forward(self, anchors: Sequence[Tensor], candidates: Sequence[Tensor]) -> Tensor:
        """What is told of each anchor and of each candidate, [B, ...] each -> [B, A, C], rows of sum 1."""
        q = torch.stack([f(x) for f, x in zip(self.queries, anchors, strict=True)], 1)
        k = torch.stack([f(x) for f, x in zip(self.keys, candidates, strict=True)], 1)
        if self.bilinear is None:
            alike = torch.einsum("bad,bcd->bac", q, k)
        else:
            each = self.bilinear(k.flatten(0, 1)).unflatten(-1, (q.shape[1], -1)).unflatten(0, k.shape[:2])
            alike = torch.einsum("bad,bcad->bac", q, each)
        if self.places is not None:
            alike = alike + self.places[0] @ self.places[1].mT
        weights: Tensor = (upcast(alike) / self.temperature).softmax(-1)
        return weights


def all_pairs(cost: Callable[[int, int], Tensor], rows: int, columns: int) -> Tensor:
    """cost(row, column) [B] of every pair of layers -> [B, rows, columns]."""
    return torch.stack([torch.stack([cost(i, j) for j in range(columns)], -1) for i in range(rows)], -2)
