"""Small pieces of state that methods and the loop share: exponential moving averages and a queue of past rows."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@torch.no_grad()
def ema_update(target: nn.Module, source: nn.Module, decay: float) -> None:
    """target <- decay * target + (1 - decay) * source, parameters; buffers are copied.

    Call it from a method's `after` (once an optimiser step), never inside `step` (once a micro-batch).
    """
    for mine, theirs in zip(target.parameters(), source.parameters(), strict=True):
        mine.lerp_(theirs.to(mine.dtype), 1 - decay)
    for mine, theirs in zip(target.buffers(), source.buffers(), strict=True):
        mine.copy_(theirs)


class Ema:
    """A moving average of a module's state, kept beside it; `swapped` puts it in place for evaluation."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """One step of the average."""
        for key, now in module.state_dict().items():
            mine = self.shadow[key]
            if mine.is_floating_point():
                mine.lerp_(now, 1 - self.decay)
            else:
                mine.copy_(now)

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[None]:
        """Inside, the module holds the average; afterwards its own weights again."""
        own = {k: v.detach().clone() for k, v in module.state_dict().items()}
        module.load_state_dict(self.shadow)
        try:
            yield
        finally:
            module.load_state_dict(own)


class Queue(nn.Module):
    """First in, first out rows as registered buffers, so that they are saved and resumed like weights.

    size: rows kept. width: numbers a row.
    """

    rows: Tensor
    head: Tensor
    filled: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, width))
        self.register_buffer("head", torch.zeros((), dtype=torch.long))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Add rows [B, width]; the oldest leave."""
        size = len(self.rows)
        places = (self.head + torch.arange(len(rows), device=rows.device)) % size
        self.rows[places] = rows.detach().to(self.rows.dtype)
        self.head.copy_((self.head + len(rows)) % size)
        self.filled.copy_((self.filled + len(rows)).clamp_max(size))

    def read(self) -> Tensor:
        """The rows held so far, [filled, width]."""
        return self.rows[: int(self.filled)]
