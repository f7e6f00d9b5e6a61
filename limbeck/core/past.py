"""What a network said before, as registered buffers: of each example of a set, and of the batch before this one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from limbeck.core.bank import everyone
from limbeck.core.errors import BadInput


class Past(nn.Module):
    """What was last said of each example, equal on all processes, which must bring equally many rows.

    size: examples of the set. shape: of what is said of one, such as (C,), or (T, C) of texts of one length.
    """

    rows: Tensor
    seen: Tensor

    def __init__(self, size: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, *shape))
        self.register_buffer("seen", torch.zeros(size, *shape[:-1], dtype=torch.bool))

    def recall(self, index: Tensor, otherwise: Tensor) -> Tensor:
        """What was said of the examples `index` [B]: [B, ..., C], and `otherwise` of what was never seen."""
        return torch.where(self.seen[index].unsqueeze(-1), self.rows[index].to(otherwise.dtype), otherwise)

    @torch.no_grad()
    def remember(self, index: Tensor, now: Tensor, mask: Tensor | None = None) -> None:
        """From now on `now` [B, ..., C] was said of the examples `index` [B], where `mask` [B, ...] holds."""
        counts = torch.ones(now.shape[:-1], dtype=torch.bool, device=now.device) if mask is None else mask.bool()
        while counts.ndim < now.ndim - 1:
            counts = counts.unsqueeze(-1)
        counts = counts.expand(now.shape[:-1])
        now = torch.where(counts.unsqueeze(-1), now.detach().to(self.rows.dtype), self.rows[index])
        index, now, counts = everyone(index), everyone(now), everyone(counts.contiguous())
        self.rows[index] = now
        self.seen[index] |= counts


class LastBatch(nn.Module):
    """The batch before this one, as the network saw it, and what it said of it.

    like: a batch with "mask" [B, ...] and "logits" [B, ..., C]; what has a row an example is kept.
    """

    def __init__(self, like: Mapping[str, object]) -> None:
        super().__init__()
        self.names = tuple(name for name, column in like.items() if _counts(column, like))
        for name in self.names:
            column = like[name]
            assert isinstance(column, Tensor)
            self.register_buffer(f"of_{name}", torch.zeros_like(column))

    def read(self) -> dict[str, Tensor]:
        """Copies of all that is kept, by name; "mask" is False where there was no example."""
        return {name: getattr(self, f"of_{name}").clone() for name in self.names}

    @torch.no_grad()
    def keep(self, batch: Mapping[str, Tensor]) -> None:
        """Put this batch in the place of the one before; it may be shorter than the first, but not longer."""
        for name in self.names:
            mine, now = getattr(self, f"of_{name}"), batch[name].detach()
            if len(now) > len(mine) or now.shape[1:] != mine.shape[1:]:
                raise BadInput(
                    f"`{name}` has shape {tuple(now.shape)} in this batch and {tuple(mine.shape)} in the first; the "
                    "last batch is remembered in that shape: pad to one length, and begin with the longest batch"
                )
            mine[: len(now)] = now
            if name == "mask":
                mine[len(now) :] = False


def _counts(column: object, batch: Mapping[str, object]) -> bool:
    """Whether a column has a row an example."""
    mask = batch["mask"]
    assert isinstance(mask, Tensor)
    return isinstance(column, Tensor) and column.shape[:1] == mask.shape[:1]
