"""How well a network's features suit a task, by a few labelled examples without training (PARC), and its weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from limbeck.core.bank import everyone


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1, ties sharing their mean rank: [N] -> [N], fp64."""
    _, group, size = torch.unique(values, sorted=True, return_inverse=True, return_counts=True)
    last = size.cumsum(0).double()
    shared: Tensor = (last - (size - 1) / 2)[group]
    return shared


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Correlation of two vectors [N] -> []; 0 where one is constant."""
    x, y = x - x.mean(), y - y.mean()
    value: Tensor = (x * y).sum() / (x.norm() * y.norm()).clamp_min(1e-12)
    return value


def apart(rows: Tensor) -> Tensor:
    """1 - correlation of every two rows, strictly below the diagonal: [N, D] -> [N (N - 1) / 2], rounded to 1e-9."""
    centred = rows.double() - rows.double().mean(1, keepdim=True)
    unit = centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-12)
    i, j = torch.tril_indices(len(rows), len(rows), -1, device=rows.device)
    far: Tensor = (1 - (unit @ unit.mT)[i, j]).round(decimals=9)  # so that equal pairs tie
    return far


def reduced(features: Tensor, components: int) -> Tensor:
    """On their first principal components: [N, D] -> [N, min(components, N, D)]; as they are where that is D or 0."""
    if not 0 < components < features.shape[1]:
        return features
    centred = features.double() - features.double().mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    rows: Tensor = u[:, :components] * s[:components]
    return rows


def parc(features: Tensor, labels: Tensor, *, components: int = 32) -> Tensor:
    """Spearman correlation of how pairs of examples differ in features [N, D] and in labels [N] -> [], in [-1, 1]."""
    hot = torch.nn.functional.one_hot(labels)
    return pearson(ranks(apart(reduced(features, components))), ranks(apart(hot)))


def powers(scores: Tensor, power: float) -> Tensor:
    """max(e, 0)^power, scaled to sum 1: [S] -> [S]; inf is all for the best; all alike where no score is above 0."""
    if scores.max() <= 0:
        return torch.full_like(scores, 1 / len(scores))
    raised = (scores.clamp_min(0) / scores.max()).pow(power)
    return raised / raised.sum()


class Probe(nn.Module):
    """Features of several sources on the first labelled examples that come, and the weights that follow, as buffers.

    widths: of each source's feature. size: examples that are gathered.
    """

    labels: Tensor
    count: Tensor
    scores: Tensor
    weights: Tensor
    done: Tensor

    def __init__(self, widths: Sequence[int], size: int) -> None:
        super().__init__()
        for i, width in enumerate(widths):
            self.register_buffer(f"features{i}", torch.zeros(size, width))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.long))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("scores", torch.zeros(len(widths), dtype=torch.float64))
        self.register_buffer("weights", torch.full((len(widths),), 1 / len(widths), dtype=torch.float64))
        self.register_buffer("done", torch.tensor(False))

    @torch.no_grad()
    def add(self, features: Sequence[Tensor], labels: Tensor, known: Tensor) -> None:
        """Take in features [B, D] a source, of those examples [B] that have a label, as long as there is room."""
        known = everyone(known)  # of all rows: each process brings as many, but not as many with a label
        labels = everyone(labels)[known][: len(self.labels) - int(self.count)]
        at = slice(int(self.count), int(self.count) + len(labels))
        self.labels[at] = labels
        for i, rows in enumerate(features):
            mine: Tensor = getattr(self, f"features{i}")
            mine[at] = everyone(rows.detach().to(mine.dtype))[known][: len(labels)]
        self.count += len(labels)

    @torch.no_grad()
    def settle(self, power: float, components: int) -> None:
        """Score every source by what has been gathered, and weigh it; for good."""
        n = int(self.count)
        if n > 2:
            found = [getattr(self, f"features{i}")[:n] for i in range(len(self.scores))]
            self.scores.copy_(torch.stack([parc(rows, self.labels[:n], components=components) for rows in found]))
            self.weights.copy_(powers(self.scores, power))
        self.done.fill_(True)
