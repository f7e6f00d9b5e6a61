"""What a search for an architecture learns and remembers, beside the supernet that it searches in."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


class Architecture(nn.Module):
    """What is searched: softmax of `alpha` [E, O] over the operations of each edge."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.alpha = nn.Parameter(1e-3 * torch.randn_like(like))

    def forward(self) -> Tensor:
        return self.alpha.softmax(-1)


class Past(nn.Module):
    """The newest supernets that are kept, each with its mixture in `chosen`, and how many were."""

    kept: Tensor

    def __init__(self, supernet: nn.Module, teachers: int) -> None:
        super().__init__()
        self.nets = nn.ModuleList(copy.deepcopy(supernet) for _ in range(teachers))
        self.register_buffer("kept", torch.tensor(0))

    @torch.no_grad()
    def keep(self, supernet: nn.Module, mix: Tensor) -> None:
        """Take a copy in the place of the oldest."""
        mine: Any = self.nets[int(self.kept) % len(self.nets)]
        mine.load_state_dict(supernet.state_dict())
        mine.chosen.copy_(mix)
        self.kept += 1
