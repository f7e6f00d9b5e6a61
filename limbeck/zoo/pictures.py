"""Networks that make pictures of pictures: a convolutional painter, and a judge that says patch by patch how real."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import require


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norm beside an identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _convolution(width, width), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.norm(self.second(self.first(x)))
        return out


def _convolution(takes: int, gives: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(takes, gives, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(gives), nn.ReLU())


class Painter(nn.Module):
    """Pictures [B, C, H, W] -> pictures of the same size, after Johnson et al. 2016 (1603.08155): down by halves,
    residual blocks at the lowest resolution, up again.

    Returns logits, which are the pictures [B, C, H, W], and feats: the map before, amid and after the residual blocks,
    and the one that the last convolution reads.
    """

    def __init__(self, channels: int, width: int, blocks: int, depth: int) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(depth + 1)]
        self.first = _convolution(channels, width)
        self.down = nn.ModuleList(_convolution(widths[i], widths[i + 1], 2) for i in range(depth))
        self.blocks = nn.ModuleList(Residual(widths[-1]) for _ in range(blocks))
        self.up = nn.ModuleList(_convolution(widths[i + 1], widths[i]) for i in reversed(range(depth)))
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        x, sizes = self.first(inputs), []
        for block in self.down:
            sizes.append(x.shape[-2:])
            x = block(x)
        feats = [x]
        for i, block in enumerate(self.blocks, 1):
            x = block(x)
            if i in ((len(self.blocks) + 1) // 2, len(self.blocks)):
                feats.append(x)
        for block in self.up:
            x = block(F.interpolate(x, sizes.pop(), mode="nearest"))
        return {"logits": self.last(x), "feats": [*feats, x]}


def painter(*, channels: int, width: int = 16, blocks: int = 4, depth: int = 2) -> Painter:
    """width: channels at full resolution, twice as many at each lower one. blocks: residual ones, >= 2. depth: halvings
    of the side, >= 0."""
    require(blocks >= 2, "blocks", blocks, ">= 2")
    require(depth >= 0, "depth", depth, ">= 0")
    return Painter(channels, width, blocks, depth)


class PatchJudge(nn.Module):
    """Pictures [B, C, H, W] -> a score for each patch of them (Isola et al. 2017, 1611.07004), higher is more real.

    Returns logits [B, 1, h, w] and feats, the map after each halving. Reads pictures of any size.
    """

    def __init__(self, channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for i in range(depth):
            takes, gives = width * 2 ** (i - 1) if i else channels, width * 2**i
            norm = nn.GroupNorm(min(8, gives), gives) if i else nn.Identity()
            self.blocks.append(nn.Sequential(nn.Conv2d(takes, gives, 3, 2, 1), norm, nn.LeakyReLU(0.2)))
        self.head = nn.Conv2d(width * 2 ** (depth - 1), 1, 3, padding=1)

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        x, feats = inputs, []
        for block in self.blocks:
            x = block(x)
            feats.append(x)
        return {"logits": self.head(x), "feats": feats}


def patch_judge(*, channels: int, beside: bool = True, width: int = 16, depth: int = 2) -> PatchJudge:
    """width: channels after the first halving of the side, a power of 2, twice as many after each further one.
    depth: halvings, >= 1. beside: whether it reads the input beside the picture, so twice the channels."""
    require(depth >= 1, "depth", depth, ">= 1")
    require(width >= 1 and width & (width - 1) == 0, "width", width, "a power of 2")
    return PatchJudge(2 * channels if beside else channels, width, depth)
