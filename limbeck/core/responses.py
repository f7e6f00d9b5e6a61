"""What losses on class scores share: the rows that count, the other classes, standard scores and correlation."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.maths import upcast

# Added to the product of two lengths and to a standard deviation by the authors' code; kept, for the same numbers.
CORRELATION_EPSILON, STANDARD_EPSILON = 1e-8, 1e-7


def rows(logits: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Every element as one row [N, C], masked ones 0, and a column [N, 1], True where the row counts; None: all do."""
    flat = upcast(logits).flatten(0, -2)
    if mask is None:
        return flat, None
    counts = mask.reshape(-1, 1).bool()
    return torch.where(counts, flat, 0.0), counts


def average(x: Tensor, counts: Tensor | None = None) -> Tensor:
    """Mean over the rows that count: [N, C] -> [C]; 0 when none does."""
    if counts is None:
        return x.mean(0)
    return torch.where(counts, x, 0.0).sum(0) / counts.sum().clamp_min(1)


def others(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits of all classes but the label, in their order: [..., C], [...] -> [..., C - 1]."""
    place = torch.arange(logits.shape[-1] - 1, device=logits.device)
    return logits.gather(-1, place + (place >= labels.unsqueeze(-1)))


def standardized(logits: Tensor) -> Tensor:
    """(z - mean) / (std + 1e-7) over the classes of each element, with the unbiased deviation: [..., C] -> [..., C]."""
    logits = upcast(logits)
    return (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True) + STANDARD_EPSILON)


def row_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson correlation of each row of x with that of y: [..., C] x 2 -> [...]; 0 where either does not vary."""
    return _cosine(x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True), -1)


def column_correlation(x: Tensor, y: Tensor, counts: Tensor | None = None) -> Tensor:
    """Pearson correlation of each column over the rows that count: [N, C] x 2 -> [C]; 1 when none does."""
    x, y = x - average(x, counts), y - average(y, counts)
    if counts is None:
        return _cosine(x, y, 0)
    return torch.where(counts.any(), _cosine(torch.where(counts, x, 0.0), torch.where(counts, y, 0.0), 0), 1.0)


def _cosine(x: Tensor, y: Tensor, dim: int) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(x, dim=dim) * torch.linalg.vector_norm(y, dim=dim)
    return (x * y).sum(dim) / (lengths + CORRELATION_EPSILON)
