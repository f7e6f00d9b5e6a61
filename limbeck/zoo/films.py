"""Networks that mark something in every picture of a film: one that looks at each by itself, one that remembers.

A film is a strip [B, C, T W, W], see core/films; so are the marks, as logits [B, 1, T W, W].
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import require
from limbeck.core.films import frames_of, strip_of


class Frames(nn.Module):
    """Convolutions of 3x3 at full size with ever wider gaps, each with batch norm and ReLU; each picture by itself.

    Returns logits and feats, the maps of all pictures [B T, width, W, W] after each convolution.
    """

    def __init__(self, channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width if i else channels, width, 3, padding=2**i, dilation=2**i, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            )
            for i in range(depth)
        )
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        x, feats = frames_of(inputs), []
        count = x.shape[1]
        x = x.flatten(0, 1)
        for block in self.blocks:
            x = block(x)
            feats.append(x)
        return {"logits": strip_of(self.head(x).unflatten(0, (-1, count))), "feats": feats}


class Cell(nn.Module):
    """A convolutional LSTM (Shi et al. 2015, 1506.04214, without peepholes): maps of T pictures [B, T, C, H, W] -> what
    it makes of each and all before it [B, T, width, H, W]."""

    def __init__(self, takes: int, width: int) -> None:
        super().__init__()
        self.gates = nn.Conv2d(takes + width, 4 * width, 3, padding=1)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        state = memory = x.new_zeros(len(x), self.width, *x.shape[3:])
        told = []
        for now in x.unbind(1):
            enter, forget, show, new = self.gates(torch.cat([now, state], 1)).chunk(4, 1)
            memory = forget.sigmoid() * memory + enter.sigmoid() * new.tanh()
            state = show.sigmoid() * memory.tanh()
            told.append(state)
        return torch.stack(told, 1)


class Block(nn.Module):
    """Cells one after the other, each followed by batch norm."""

    def __init__(self, takes: int, width: int, layers: int) -> None:
        super().__init__()
        self.cells = nn.ModuleList(Cell(width if i else takes, width) for i in range(layers))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for cell, norm in zip(self.cells, self.norms, strict=True):
            x = each(norm, cell(x))
        return x


class ConvLSTM(nn.Module):
    """Blocks of convolutional LSTMs, each at half the size and twice the width of the one before; the last is brought
    up again by doublings and 3x3 convolutions with batch norm, as in the student of Petit et al. 2024 (2409.07566).

    Returns logits and feats, the maps of all pictures [B T, C, H, W] after each block.
    """

    def __init__(self, channels: int, width: int, blocks: int, layers: int) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(blocks)]
        self.blocks = nn.ModuleList(Block(a, b, layers) for a, b in zip([channels, *widths], widths, strict=False))
        self.ups = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2 * w, w, 3, padding=1), nn.BatchNorm2d(w)) for w in reversed(widths[:-1])
        )
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        x, feats, sizes = frames_of(inputs), [], []
        for i, block in enumerate(self.blocks):
            if i:
                sizes.append(x.shape[-2:])
                x = each(lambda maps: F.max_pool2d(maps, 2), x)
            x = block(x)
            feats.append(x.flatten(0, 1))
        for up in self.ups:
            size = sizes.pop()
            x = each(lambda maps, up=up, size=size: up(F.interpolate(maps, size, mode="nearest")), x)
        return {"logits": strip_of(each(self.head, x)), "feats": feats}


def each(layer: Any, x: Tensor) -> Tensor:
    """A layer on every picture of films [B, T, C, H, W]."""
    made: Tensor = layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    return made


def frames(*, channels: int, width: int = 16, depth: int = 4) -> Frames:
    """width: channels of every layer. depth: layers, >= 1; the i-th looks 2^i pixels far."""
    require(depth >= 1, "depth", depth, ">= 1")
    return Frames(channels, width, depth)


def conv_lstm(*, channels: int, width: int = 12, blocks: int = 3, layers: int = 3) -> ConvLSTM:
    """width: channels of the first block. blocks: >= 1, each at half the size. layers: cells of a block, >= 1."""
    for name, value in (("blocks", blocks), ("layers", layers)):
        require(value >= 1, name, value, ">= 1")
    return ConvLSTM(channels, width, blocks, layers)
