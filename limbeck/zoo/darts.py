"""A small convolutional supernet: what stands on the edges of its cells is a mixture, searched and then chosen."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import require

# What may stand on an edge. "none" says that there is no edge.
OPERATIONS = ("none", "skip", "pool", "conv", "separable")


def _convolved(width: int, out: int, side: int, groups: int = 1) -> list[nn.Module]:
    """ReLU, convolution, batch norm without scale and shift, so that operations are mixed at one size (DARTS)."""
    norm = nn.BatchNorm2d(out, affine=False)
    return [nn.ReLU(), nn.Conv2d(width, out, side, 1, side // 2, groups=groups, bias=False), norm]


def _operation(name: str, width: int) -> nn.Module:
    if name == "conv":
        return nn.Sequential(*_convolved(width, width, 3))
    if name == "separable":
        deep = nn.Conv2d(width, width, 3, 1, 1, groups=width, bias=False)
        return nn.Sequential(nn.ReLU(), deep, *_convolved(width, width, 1)[1:])
    pool = nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.BatchNorm2d(width, affine=False))
    return pool if name == "pool" else nn.Identity()


class Cell(nn.Module):
    """Nodes 0 and 1 are what the two cells before gave, each later node is the sum over edges from all before it; the
    later nodes side by side are the output: [B, W, H, W'] x 2 -> [B, nodes W, H, W']."""

    def __init__(self, widths: tuple[int, int], width: int, nodes: int) -> None:
        super().__init__()
        self.takes = nn.ModuleList(nn.Sequential(*_convolved(w, width, 1)) for w in widths)
        self.edges = nn.ModuleList(
            nn.ModuleList(_operation(name, width) for name in OPERATIONS[1:])
            for node in range(nodes)
            for _ in range(2 + node)
        )
        self.nodes = nodes

    def forward(self, before: Tensor, last: Tensor, mix: Tensor, used: list[list[bool]]) -> Tensor:
        states = [take(x) for take, x in zip(self.takes, (before, last), strict=True)]
        edge = 0
        for _ in range(self.nodes):
            total = torch.zeros_like(states[0])
            for state in list(states):
                operations: Any = self.edges[edge]
                for i, operation in enumerate(operations, 1):
                    if used[edge][i]:
                        total = total + mix[edge, i] * operation(state)
                edge += 1
            states.append(total)
        return torch.cat(states[2:], 1)


class Darts(nn.Module):
    """Cells of one plan, with the side of pictures halved between them (Liu et al. 2018, 1806.09055, where every third
    cell has a plan of its own for that).

    mix [E, O] says how much of which operation stands on each edge; where `forward` is not given one, it is the buffer
    `chosen`: at first all alike, and after `choose` the plan that was found. What is 0 there is not computed; its
    weights stay in the file. Returns logits [B, classes], feats (after each cell), emb.
    """

    chosen: Tensor

    def __init__(self, classes: int, channels: int, width: int, cells: int, nodes: int) -> None:
        super().__init__()
        self.nodes = nodes
        stem = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(width))
        given = [width, width, *[nodes * width] * cells]
        self.cells = nn.ModuleList(Cell(pair, width, nodes) for pair in pairwise(given[:-1]))
        self.head = nn.Linear(nodes * width, classes)
        edges = sum(2 + node for node in range(nodes))
        self.register_buffer("chosen", torch.empty(edges, len(OPERATIONS)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to all operations alike; layers have a start of their own."""
        self.chosen.fill_(1 / len(OPERATIONS))

    def forward(self, inputs: Tensor, mix: Tensor | None = None) -> dict[str, Any]:
        used = [[True] * len(OPERATIONS)] * len(self.chosen) if mix is not None else (self.chosen != 0).tolist()
        mix = self.chosen if mix is None else mix
        before = last = self.stem(inputs)
        feats = []
        for i, cell in enumerate(self.cells):
            if i and last.shape[-1] > 3:
                before, last = F.avg_pool2d(before, 2), F.avg_pool2d(last, 2)
            before, last = last, cell(before, last, mix, used)
            feats.append(last)
        emb = last.mean((2, 3))
        head = {"head": self.head.weight, "head_bias": self.head.bias}
        return {"logits": self.head(emb), "feats": feats, "emb": emb, **head}

    @torch.no_grad()
    def choose(self, mix: Tensor) -> None:
        """Of each node keep the two incoming edges, and on each the one operation, of which there is most in `mix`
        [E, O]; "none" is no choice."""
        best, which = mix[:, 1:].max(1)
        self.chosen.zero_()
        first = 0
        for node in range(self.nodes):
            for edge in best[first : first + 2 + node].topk(2).indices + first:
                self.chosen[edge, 1 + which[edge]] = 1.0
            first += 2 + node


def darts(*, classes: int, channels: int, width: int = 8, cells: int = 2, nodes: int = 2) -> Darts:
    """width: channels of a node. cells: how many. nodes: of a cell, beside its two inputs."""
    for name, value in (("width", width), ("cells", cells), ("nodes", nodes)):
        require(value >= 1, name, value, ">= 1")
    return Darts(classes, channels, width, cells, nodes)
