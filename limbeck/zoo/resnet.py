"""Residual networks for small pictures: those of He et al. 2015 (1512.03385, section 4.2) for CIFAR, and the wide ones
of Zagoruyko and Komodakis 2016 (1605.07146)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import require


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside an identity without weights (He's option A: strided, new channels are zero).

    stage: which of the three resolutions, 0 to 2. A block that does not `change` the shape may be left out.
    """

    def __init__(self, channels: int, width: int, stride: int, stage: int) -> None:
        super().__init__()
        self.stage, self.stride, self.changes = stage, stride, stride != 1 or channels != width
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.changes:
            x = x[:, :, :: self.stride, :: self.stride]
            more = y.shape[1] - x.shape[1]
            x = F.pad(x, (0, 0, 0, 0, more // 2, more - more // 2))
        out: Tensor = self.relu2(x + y)
        return out


class WideBlock(nn.Module):
    """Batch norm and ReLU before each of two 3x3 convolutions; a 1x1 convolution where the width changes."""

    def __init__(self, channels: int, width: int, stride: int, stage: int) -> None:
        super().__init__()
        self.stage, self.stride, self.changes = stage, stride, stride != 1 or channels != width
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False) if self.changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(x))
        residual = self.shortcut(y if self.changes else x)
        out: Tensor = residual + self.conv2(self.relu2(self.bn2(self.conv1(y))))
        return out


class Queries(nn.Module):
    """Every class looks for itself: its query attends to the places of a map, what it finds is its embedding.

    One layer of the decoder of Liu et al. 2021 (2107.10834) with one head. [B, D, H, W] -> [B, classes, D]
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(classes, width) * width**-0.5)
        self.keys, self.values = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        places = x.flatten(2).mT
        queries = self.queries.expand(len(x), -1, -1)
        found = F.scaled_dot_product_attention(queries, self.keys(places), self.values(places))
        out: Tensor = self.norm(queries + found)
        return out


class ResNet(nn.Module):
    """A stem, three stages of blocks at full, half and quarter resolution, global mean, one linear layer.

    Returns logits [B, classes], feats (the map after each stage), emb [B, widest], head [classes, widest] and
    head_bias. `blocks` holds every block. With `queries`, a class reads its own embedding: they come last in feats, as
    [B, classes, widest], and there is no emb and no head.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[WideBlock],
        each: int,
        stem: int,
        widths: list[int],
        classes: int,
        channels: int,
        queries: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, stem, 3, 1, 1, bias=False)
        wide = block is WideBlock
        self.norm = nn.BatchNorm2d(widths[-1] if wide else stem)
        self.relu = nn.ReLU()
        self.wide = wide
        self.blocks = nn.ModuleList()
        last = stem
        for stage, width in enumerate(widths):
            for i in range(each):
                self.blocks.append(block(last, width, 2 if stage and not i else 1, stage))
                last = width
        self.head = nn.Linear(last, classes)
        self.queries = Queries(classes, last) if queries else None
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        x = self.conv(inputs)
        x = x if self.wide else self.relu(self.norm(x))
        feats: list[Tensor] = []
        for block in self.blocks:
            while len(feats) < block.stage:  # type: ignore[operator]
                feats.append(x)  # a stage ends where the next begins, even if all its blocks are gone
            x = block(x)
        x = self.relu(self.norm(x)) if self.wide else x
        if self.queries is not None:
            found = self.queries(x)
            logits = (found * self.head.weight).sum(-1) + self.head.bias
            return {"logits": logits, "feats": [*feats, x, found]}
        emb = x.mean((2, 3))
        head = {"head": self.head.weight, "head_bias": self.head.bias}
        return {"logits": self.head(emb), "feats": [*feats, x], "emb": emb, **head}


def resnet(*, classes: int, channels: int, depth: int = 20, width: int = 16, queries: bool = False) -> ResNet:
    """depth: 6 n + 2 layers. width: channels of the first stage, doubled in each of the two others. queries: an
    embedding a class, last of the feats, in place of the mean over places, as for pictures with several labels."""
    require(depth >= 8 and (depth - 2) % 6 == 0, "depth", depth, "8, 14, 20, 26, ... (6 n + 2)")
    return ResNet(BasicBlock, (depth - 2) // 6, width, [width, 2 * width, 4 * width], classes, channels, queries)


def wrn(*, classes: int, channels: int, depth: int = 16, widen: int = 2, width: int = 16) -> ResNet:
    """depth: 6 n + 4 layers. widen: factor on the stages' channels. width: channels of the stem."""
    require(depth >= 10 and (depth - 4) % 6 == 0, "depth", depth, "10, 16, 22, 28, ... (6 n + 4)")
    widths = [widen * width * 2**stage for stage in range(3)]
    return ResNet(WideBlock, (depth - 4) // 6, width, widths, classes, channels)
