"""The network that papers on small synthetic data sets train (Zhao et al. 2020, 2006.05929), and a perceptron."""

from typing import Any, Literal

from torch import Tensor, nn

from limbeck.core.card import require


class ConvNet(nn.Module):
    """`depth` blocks of convolution, norm, ReLU and 2x2 mean, then one linear layer on the flattened map.

    Returns logits [B, classes], feats (the map after each block), emb [B, width * h * w], which is the flattened last
    map, head [classes, width * h * w] and head_bias.
    Pictures of 28x28 are padded to 32x32 by the first convolution, as in the paper's code.
    """

    def __init__(self, classes: int, channels: int, size: int, width: int, depth: int, norm: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        side = size + 4 if size == 28 else size
        for i in range(depth):
            padding = 3 if i == 0 and size == 28 else 1
            layers = [nn.Conv2d(channels if i == 0 else width, width, 3, padding=padding)]
            if norm != "none":
                layers.append(nn.GroupNorm(width, width) if norm == "instance" else nn.BatchNorm2d(width))  # type: ignore[arg-type]
            self.blocks.append(nn.Sequential(*layers, nn.ReLU(), nn.AvgPool2d(2)))
            side //= 2
        self.head = nn.Linear(width * side * side, classes)

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        x, feats = inputs, []
        for block in self.blocks:
            x = block(x)
            feats.append(x)
        emb = x.flatten(1)
        head = {"head": self.head.weight, "head_bias": self.head.bias}
        return {"logits": self.head(emb), "feats": feats, "emb": emb, **head}


def convnet(
    *,
    classes: int,
    channels: int,
    size: int,
    width: int = 128,
    depth: int = 3,
    norm: Literal["instance", "batch", "none"] = "instance",
) -> ConvNet:
    """width: channels of every block. depth: blocks, each halving the side. norm: instance, batch or none."""
    require(norm in ("instance", "batch", "none"), "norm", norm, "'instance', 'batch' or 'none'")
    require(depth >= 1 and size >= 2**depth, "depth", depth, f"in [1, {size.bit_length() - 1}] for pictures of {size}")
    return ConvNet(classes, channels, size, width, depth, norm)


class MLP(nn.Module):
    """Linear layers and ReLUs on the flattened input. feats: each hidden layer [B, width]; emb: the last of them."""

    def __init__(self, classes: int, features: int, width: int, depth: int) -> None:
        super().__init__()
        sizes = [features, *[width] * depth]
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU()) for i in range(depth))
        self.head = nn.Linear(sizes[-1], classes)

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        x, feats = inputs.flatten(1), []
        for block in self.blocks:
            x = block(x)
            feats.append(x)
        head = {"head": self.head.weight, "head_bias": self.head.bias}
        return {"logits": self.head(x), "feats": feats, "emb": x, **head}


def mlp(*, classes: int, size: int, channels: int | None = None, width: int = 128, depth: int = 2) -> MLP:
    """width: units of each hidden layer. depth: hidden layers, >= 1."""
    require(depth >= 1, "depth", depth, ">= 1")
    return MLP(classes, size if channels is None else channels * size * size, width, depth)
