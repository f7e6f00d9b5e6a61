"""Small pieces of state that methods and the loop share: exponential moving averages and a queue of past rows."""

from collections.abc import Iterable, Iterator, Mapping
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
    for own, other in zip(target.buffers(), source.buffers(), strict=True):
        own.copy_(other)


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

    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """Go on from the average that `shadow` holds, on whatever device it lies."""
        self.shadow = {k: v.to(self.shadow[k].device) for k, v in shadow.items()}

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


class Reservoir(nn.Module):
    """A uniform sample of everything that was ever added, of fixed size, as registered buffers.

    size: examples kept. like: one batch of columns [B, ...], of which the buffers take shape and type.
    """

    added: Tensor

    def __init__(self, size: int, like: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.size, self.names = size, tuple(like)
        for name, column in like.items():
            self.register_buffer(f"of_{name}", torch.zeros(size, *column.shape[1:], dtype=column.dtype))
        self.register_buffer("added", torch.zeros((), dtype=torch.long))

    def __len__(self) -> int:
        return min(self.size, int(self.added))

    @torch.no_grad()
    def add(self, batch: Mapping[str, Tensor]) -> None:
        """Every example of the batch gets its fair chance of a place."""
        start = int(self.added)
        for i in range(len(batch[self.names[0]])):
            place = start + i if start + i < self.size else int(torch.randint(start + i + 1, ()))
            if place < self.size:
                for name in self.names:
                    getattr(self, f"of_{name}")[place] = batch[name][i]
            self.added += 1

    def draw(self, count: int) -> dict[str, Tensor]:
        """`count` different examples, or all there are when they are fewer."""
        rows = torch.randperm(len(self))[:count]
        return {name: (column := getattr(self, f"of_{name}"))[rows.to(column.device)] for name in self.names}


@torch.no_grad()
def average(target: nn.Module, sources: Iterable[nn.Module], weights: Tensor) -> None:
    """target <- sum_k weights_k source_k, parameters and buffers, as in federated averaging.

    weights: [K], >= 0, sum 1. Buffers of whole numbers are taken from the source with the largest weight.
    """
    states = [source.state_dict() for source in sources]
    if len(states) != len(weights):
        raise ValueError(f"there are {len(states)} networks to average but {len(weights)} weights")
    for key, mine in target.state_dict().items():
        if mine.is_floating_point():
            total = sum(w * s[key].to(torch.float64) for w, s in zip(weights.tolist(), states, strict=True))
            mine.copy_(total)
        else:
            mine.copy_(states[int(weights.argmax())][key])
