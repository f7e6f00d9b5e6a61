"""Exits: small networks that read class logits off an inner feature of any form, for training only."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from limbeck.core.card import require
from limbeck.core.features import Shape

GRID = 7  # an exit from more tokens than 7 x 7 merges them first


def exit_from(shape: Shape, classes: int, *, later: int, width: int, class_token: bool = False) -> nn.Module:
    """An exit from features of `shape` to logits [B, classes], of the kind of network that gives such features.

    later: stages of the network that follow, >= 0: the exit does in short what they do. width: of what its last layer
    reads. class_token: whether tokens begin with one, which is then read in the place of their mean.

    Maps: `later` separable convolutions, each halving the side (a 1x1 convolution when none follow), then the mean.
    Tokens: a square picture of them is merged, two by two, towards 7 x 7, then max(1, later) transformer blocks.
    Vectors: max(1, later) layers with ReLU.
    """
    require(later >= 0, "later", later, ">= 0")
    require(width >= 1, "width", width, ">= 1")
    if len(shape) == 4:
        body: list[nn.Module] = [*_maps(shape[1], later, width), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    elif len(shape) == 3:
        body = [Tokens(shape[1], shape[2], max(1, later), width, class_token)]
    else:
        sizes = [shape[-1], *[width] * max(1, later)]
        body = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    made = nn.Sequential(*body, nn.Linear(width, classes))
    for layer in made.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear) and len(shape) > 2:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return made


def said(leave: nn.Module, feature: Tensor) -> Tensor:
    """What an exit says of a feature, in the dtype of its weights: [B, classes].

    A lone 1x1 convolution, whose mean over the places is read, is asked about the mean: the same for less work.
    """
    feature = feature.to(next(leave.parameters()).dtype)
    if isinstance(next(leave.children()), nn.Conv2d):
        feature = feature.mean((2, 3), keepdim=True)
    logits: Tensor = leave(feature)
    return logits


def _maps(width: int, later: int, out: int) -> list[nn.Module]:
    if later == 0:
        return [nn.Conv2d(width, out, 1)]
    widths = [width * 2**i for i in range(later)]
    return [separable(a, b) for a, b in pairwise([*widths, out])]


def separable(width: int, out: int) -> nn.Sequential:
    """Twice a depthwise 3x3 convolution, the first of stride 2, before a 1x1 convolution, batch norm and ReLU."""
    layers: list[nn.Module] = []
    for stride, wide in ((2, width), (1, out)):
        depthwise = nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False)
        layers += [depthwise, nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
    return nn.Sequential(*layers)


class Tokens(nn.Module):
    """Merges, transformer blocks of 4 heads, and the class token or the mean of the tokens: [B, T, D] -> [B, width]."""

    def __init__(self, count: int, width: int, blocks: int, out: int, class_token: bool) -> None:
        super().__init__()
        self.class_token = class_token
        side, merges = math.isqrt(count - class_token), 0
        if side * side == count - class_token:
            while side >= 2 * GRID and side % 2 == 0:
                side, merges = side // 2, merges + 1
        direct = merges > 0 and not class_token
        self.widen = nn.Identity() if width == out or direct else nn.Linear(width, out)
        widths = [width if direct else out, *[out] * merges]
        last = merges - 1
        acts = [nn.Identity() if 0 < i == last else nn.GELU() for i in range(merges)]
        self.merges = nn.Sequential(*[Merge(a, b, act) for (a, b), act in zip(pairwise(widths), acts, strict=True)])
        heads = math.gcd(out, 4)
        self.blocks = nn.Sequential(
            *[
                nn.TransformerEncoderLayer(out, heads, 4 * out, 0.0, "gelu", batch_first=True, norm_first=True)
                for _ in range(blocks)
            ]
        )

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.widen(tokens)
        first = int(self.class_token)
        out: Tensor = self.blocks(torch.cat([tokens[:, :first], self.merges(tokens[:, first:])], 1))
        return out[:, 0] if self.class_token else out.mean(1)


class Merge(nn.Module):
    """Each two by two tokens of a square picture become one."""

    def __init__(self, width: int, out: int, act: nn.Module) -> None:
        super().__init__()
        self.norm, self.reduce, self.act = nn.LayerNorm(4 * width), nn.Linear(4 * width, out, bias=False), act

    def forward(self, tokens: Tensor) -> Tensor:
        half = math.isqrt(tokens.shape[1]) // 2
        corners = tokens.unflatten(1, (half, 2, half, 2)).permute(0, 1, 3, 4, 2, 5)  # two rows before two columns
        merged: Tensor = self.act(self.reduce(self.norm(corners.flatten(3).flatten(1, 2))))
        return merged
