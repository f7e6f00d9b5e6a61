"""Networks that say what noise hides, x [B, ...] and a time t [B] of order 1 -> a tensor like x, and one that makes
pictures out of codes. A Denoiser wraps the former."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import require


class Times(nn.Module):
    """t [B], and class labels [B] or None, as one vector [B, D] that conditions every block."""

    def __init__(self, width: int, classes: int | None) -> None:
        super().__init__()
        half = width // 2
        # from a quarter to sixteen turns over one unit of t: smooth enough for derivatives in t
        self.register_buffer("speed", 2 * math.pi * torch.exp2(torch.linspace(-2, 4, half)), persistent=False)
        self.first = nn.Linear(2 * half, 2 * width)
        self.second = nn.Linear(2 * width, 2 * width)
        self.classes = None if classes is None else nn.Embedding(classes, 2 * width)
        if self.classes is not None:
            nn.init.zeros_(self.classes.weight)

    speed: Tensor

    def forward(self, t: Tensor, labels: Tensor | None) -> Tensor:
        angle = t.view(-1, 1) * self.speed
        out: Tensor = self.second(F.silu(self.first(torch.cat([angle.cos(), angle.sin()], 1))))
        if labels is not None and self.classes is not None:
            out = out + self.classes(labels)  # no label is the zero vector, so one network serves both
        return F.silu(out)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with group norm beside an identity; the time scales and shifts in between."""

    def __init__(self, channels: int, width: int, condition: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(min(8, channels), channels)
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.time = nn.Linear(condition, 2 * width)
        self.norm2 = nn.GroupNorm(min(8, width), width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Identity() if channels == width else nn.Conv2d(channels, width, 1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(condition).unsqueeze(-1).unsqueeze(-1).chunk(2, 1)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        out: Tensor = self.skip(x) + h
        return out


class UNet(nn.Module):
    """Down to 7x7 or less by halves and up again, with the maps of the way down at hand on the way up.

    forward(x [B, C, H, W], t [B], labels [B] or None) -> [B, C, H, W]; with features=True the deepest map instead.
    """

    def __init__(self, channels: int, size: int, width: int, depth: int, classes: int | None) -> None:
        super().__init__()
        condition = 2 * width
        self.times = Times(width, classes)
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        widths = [width] + [width + width // 2] * depth
        self.down = nn.ModuleList(ResBlock(widths[max(0, i - 1)], widths[i], condition) for i in range(depth + 1))
        self.middle = ResBlock(widths[-1], widths[-1], condition)
        self.up = nn.ModuleList(
            ResBlock(widths[min(depth, i + 1)] + widths[i], widths[i], condition) for i in reversed(range(depth + 1))
        )
        self.norm = nn.GroupNorm(min(8, width), width)
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None, *, features: bool = False) -> Tensor:
        condition = self.times(t, labels)
        x = self.first(x)
        skips: list[Tensor] = []
        for i, block in enumerate(self.down):
            x = block(F.avg_pool2d(x, 2, ceil_mode=True) if i else x, condition)
            skips.append(x)
        x = self.middle(x, condition)
        if features:
            return x
        for block in self.up:
            skip = skips.pop()
            if x.shape[-1] != skip.shape[-1]:
                x = F.interpolate(x, skip.shape[-2:], mode="nearest")
            x = block(torch.cat([x, skip], 1), condition)
        out: Tensor = self.last(F.silu(self.norm(x)))
        return out


def unet(*, channels: int, size: int, classes: int | None = None, width: int = 32, depth: int | None = None) -> UNet:
    """width: channels at full resolution, half as many again below, a multiple of 16. depth: halvings; down to a side
    of 7 or less if left out. classes: how many labels it may be told; it works without as well."""
    require(width % 16 == 0, "width", width, "a multiple of 16")
    depth = max(1, math.ceil(math.log2(size / 8))) if depth is None else depth
    return UNet(channels, size, width, depth, classes)


class DenoiserMLP(nn.Module):
    """For points: forward(x [B, D], t [B], labels [B] or None) -> [B, D]; with features=True the last hidden layer."""

    def __init__(self, features: int, width: int, depth: int, classes: int | None) -> None:
        super().__init__()
        self.times = Times(width, classes)
        self.first = nn.Linear(features, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.conditions = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))
        self.last = nn.Linear(width, features)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None, *, features: bool = False) -> Tensor:
        condition = self.times(t, labels)
        h = self.first(x)
        for layer, told in zip(self.layers, self.conditions, strict=True):
            h = h + F.silu(layer(h) + told(condition))
        out: Tensor = h if features else self.last(h)
        return out


def denoiser_mlp(*, size: int, classes: int | None = None, width: int = 64, depth: int = 3) -> DenoiserMLP:
    """width: of the hidden layers. depth: how many. classes: how many labels it may be told."""
    return DenoiserMLP(size, width, depth, classes)


class Generator(nn.Module):
    """Codes [B, latent] -> pictures [B, C, H, W] by two doublings (after Chen et al. 2019, DAFL): zero mean, unit
    variance over a batch, since normalised pictures are what it stands for. `latent` is how many numbers it reads."""

    def __init__(self, channels: int, size: int, latent: int, width: int) -> None:
        super().__init__()
        self.latent, self.size, self.start = latent, size, -(-size // 4)
        self.first = nn.Linear(latent, width * self.start**2)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(width, eps=0.8)
        self.conv3 = nn.Conv2d(width, width // 2, 3, padding=1)
        self.norm3 = nn.BatchNorm2d(width // 2, eps=0.8)
        self.conv4 = nn.Conv2d(width // 2, channels, 3, padding=1)
        self.norm4 = nn.BatchNorm2d(channels, affine=False)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.norm1(self.first(codes).view(len(codes), -1, self.start, self.start))
        x = F.interpolate(x, scale_factor=2)
        x = F.leaky_relu(self.norm2(self.conv2(x)), 0.2)
        x = F.interpolate(x, [self.size, self.size])
        x = F.leaky_relu(self.norm3(self.conv3(x)), 0.2)
        out: Tensor = self.norm4(torch.tanh(self.conv4(x)))
        return out


def generator(*, channels: int, size: int, latent: int = 100, width: int = 128) -> Generator:
    """latent: numbers that go in. width: channels at a quarter and half of the side, half as many at full size."""
    return Generator(channels, size, latent, width)
