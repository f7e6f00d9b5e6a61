"""Made examples that are kept: a ring of the newest, and codes or pixels that are learned; exact under resume."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Memory(nn.Module):
    """The newest `size` examples that were added, as registered buffers. like: one batch of columns [B, ...], of which
    the buffers take shape and type."""

    added: Tensor

    def __init__(self, size: int, like: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.size, self.names = size, tuple(like)
        for name, column in like.items():
            self.register_buffer(f"of_{name}", column.new_zeros(size, *column.shape[1:]))
        self.register_buffer("added", torch.zeros((), dtype=torch.long))

    def __len__(self) -> int:
        return min(self.size, int(self.added))

    @torch.no_grad()
    def add(self, **columns: Tensor) -> None:
        """Take in examples [B, ...] by column; the oldest leave. Of more than `size` the last stay."""
        count = len(columns[self.names[0]])
        kept = min(count, self.size)
        places = (int(self.added) + count - kept + torch.arange(kept)) % self.size
        for name in self.names:
            mine = self.get_buffer(f"of_{name}")
            mine[places.to(mine.device)] = columns[name][count - kept :].detach().to(mine)
        self.added += count

    def draw(self, count: int) -> dict[str, Tensor]:
        """`count` examples, drawn from those that are kept; one may come twice."""
        return self._rows(torch.randint(len(self), (count,)))

    def some(self, count: int) -> dict[str, Tensor]:
        """`count` different examples, or all there are when they are fewer."""
        return self._rows(torch.randperm(len(self))[:count])

    def all(self) -> dict[str, Tensor]:
        """Every example that is kept."""
        return self._rows(torch.arange(len(self)))

    def _rows(self, rows: Tensor) -> dict[str, Tensor]:
        return {name: (mine := self.get_buffer(f"of_{name}"))[rows.to(mine.device)] for name in self.names}


class Noise(nn.Module):
    """Pixels or codes [B, ...] that are learned, and begin as standard normal noise. shape: [B, ...]."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.randn(*shape))

    def forward(self) -> Tensor:
        return self.values

    @torch.no_grad()
    def renew(self) -> None:
        """Noise again, the same on every process; its optimiser stays valid."""
        self.values.normal_()
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(self.values, 0)


class Best(nn.Module):
    """Labels [B] of the pictures in the making, and what they were when their cost was least."""

    labels: Tensor
    cost: Tensor
    pictures: Tensor

    def __init__(self, labels: Tensor, pictures: Tensor) -> None:
        super().__init__()
        self.register_buffer("labels", labels)
        self.register_buffer("cost", pictures.new_tensor(torch.inf))
        self.register_buffer("pictures", pictures.detach().clone())

    @torch.no_grad()
    def note(self, pictures: Tensor, cost: Tensor) -> None:
        """Keep the pictures if they cost less than any before."""
        better = cost < self.cost
        self.pictures.copy_(torch.where(better, pictures.to(self.pictures), self.pictures))
        self.cost.copy_(torch.where(better, cost.to(self.cost), self.cost))
