"""What is remembered of a whole training set: a row an example, and a mean a class; exact under resume, equal on all
processes, which must bring equally many rows."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def everyone(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of the processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    all_rows = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(all_rows, rows.contiguous())
    return torch.cat(all_rows)


class Bank(nn.Module):
    """A vector an example, at first a random one of unit length. size: examples of the set. width: of a vector."""

    rows: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, width)))

    @torch.no_grad()
    def remember(self, index: Tensor, now: Tensor, momentum: float, mask: Tensor | None = None) -> None:
        """rows[index] <- momentum rows[index] + (1 - momentum) now, for those examples that count."""
        now = now.detach().to(self.rows.dtype)
        if mask is not None:
            now = torch.where(mask.bool().unsqueeze(1), now, self.rows[index])
        index, now = everyone(index), everyone(now)
        self.rows[index] = momentum * self.rows[index] + (1 - momentum) * now

    def others(self, index: Tensor) -> Tensor:
        """The mean of the rows of all examples but one, for each of `index` [B] -> [B, width]."""
        return (self.rows.sum(0) - self.rows[index]) / max(1, len(self.rows) - 1)


class ClassMeans(nn.Module):
    """The mean vector of each class over everything seen so far. classes: how many. width: of a vector."""

    means: Tensor
    counts: Tensor

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(classes, width))
        self.register_buffer("counts", torch.zeros(classes, dtype=torch.long))

    @torch.no_grad()
    def add(self, rows: Tensor, labels: Tensor, mask: Tensor | None = None) -> None:
        """Take in rows [B, width] of those examples that count."""
        counts = torch.ones_like(labels) if mask is None else mask.to(labels)
        rows, labels, counts = everyone(rows.detach()), everyone(labels), everyone(counts)
        rows = torch.where(counts.unsqueeze(1) > 0, rows, 0.0).to(self.means.dtype)
        new = torch.zeros_like(self.counts).index_add_(0, labels, counts)
        sums = torch.zeros_like(self.means).index_add_(0, labels, rows)
        self.counts += new
        self.means += (sums - new.unsqueeze(1) * self.means) / self.counts.clamp_min(1).unsqueeze(1)
