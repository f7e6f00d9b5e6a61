"""Augmentations of image batches in two halves: `draw` chooses the parameters, `apply` carries them out.

Whoever keeps the parameters can replay the very picture that a teacher saw, and two batches that are given the same
parameters are transformed alike. Every transform is differentiable in the pixels. Images are [B, C, H, W] in any
scaling; parameters are float32 [B, P], or [1, P] to treat the whole batch alike.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from limbeck.core.errors import BadInput, nearest

__all__ = ["Augment", "Chain", "Crop", "Erase", "Flip", "RandAugment", "ResizedCrop", "Siamese", "build"]


class Augment(Protocol):
    """What a batch source needs of an augmentation."""

    @property
    def width(self) -> int:
        """P, the number of parameters an image."""

    def draw(self, generator: Generator, batch: int) -> Tensor:
        """Parameters [batch, P] from `generator` alone."""

    def apply(self, images: Tensor, params: Tensor) -> Tensor:
        """The images [B, C, H, W] transformed by their own row of `params`."""


def _uniform(generator: Generator, batch: int, count: int) -> Tensor:
    return torch.rand(batch, count, generator=generator)


def _fill(images: Tensor, fill: tuple[float, ...]) -> Tensor:
    values = fill if len(fill) in (1, images.shape[1]) else fill[:1]
    return images.new_tensor(values).view(1, -1, 1, 1)


def _shift(images: Tensor, rows: Tensor, cols: Tensor, fill: tuple[float, ...]) -> Tensor:
    """Each picture moved by its own whole number of pixels [B]; what comes in from outside has the value `fill`."""
    b, _, h, w = images.shape
    y = torch.arange(h, device=images.device) + rows.to(images.device).long().view(-1, 1)
    x = torch.arange(w, device=images.device) + cols.to(images.device).long().view(-1, 1)
    y, x = y.expand(b, h), x.expand(b, w)
    inside = ((y >= 0) & (y < h))[:, None, :, None] & ((x >= 0) & (x < w))[:, None, None, :]
    flat = (y.clamp(0, h - 1)[:, :, None] * w + x.clamp(0, w - 1)[:, None, :]).flatten(1)
    moved = images.flatten(2).gather(2, flat[:, None, :].expand(-1, images.shape[1], -1)).view_as(images)
    return torch.where(inside, moved, _fill(images, fill))


def _warp(images: Tensor, theta: Tensor, padding: str = "zeros") -> Tensor:
    theta = theta.to(images.device, images.dtype).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode=padding, align_corners=False)


@dataclass(frozen=True)
class Crop:
    """Pad by `pad` pixels (>= 0) of value `fill` (one a channel) and cut the size out again: P = 2 offsets."""

    pad: int = 4
    fill: tuple[float, ...] = (0.0,)
    width: int = 2

    def draw(self, generator: Generator, batch: int) -> Tensor:
        return torch.randint(-self.pad, self.pad + 1, (batch, 2), generator=generator).float()

    def apply(self, images: Tensor, params: Tensor) -> Tensor:
        return _shift(images, params[:, 0], params[:, 1], self.fill)


@dataclass(frozen=True)
class Flip:
    """Mirror left and right with `probability` in [0, 1]: P = 1, which is 1 where mirrored."""

    probability: float = 0.5
    width: int = 1

    def draw(self, generator: Generator, batch: int) -> Tensor:
        return (_uniform(generator, batch, 1) < self.probability).float()

    def apply(self, images: Tensor, params: Tensor) -> Tensor:
        return torch.where(params.to(images.device).bool().view(-1, 1, 1, 1), images.flip(3), images)


@dataclass(frozen=True)
class ResizedCrop:
    """A box of a random part of the area, scaled to full size: P = 4 fractions (top, left, height, width).

    smallest: least area of the box as a fraction in (0, 1]. stretch: largest ratio of its sides, >= 1.
    """

    smallest: float = 0.35
    stretch: float = 4 / 3
    width: int = 4

    def draw(self, generator: Generator, batch: int) -> Tensor:
        u = _uniform(generator, batch, 4)
        area = self.smallest + (1 - self.smallest) * u[:, 0]
        ratio = torch.exp((2 * u[:, 1] - 1) * math.log(self.stretch))
        height, width = (area / ratio).sqrt().clamp(max=1), (area * ratio).sqrt().clamp(max=1)
        return torch.stack([u[:, 2] * (1 - height), u[:, 3] * (1 - width), height, width], 1)

    def apply(self, images: Tensor, params: Tensor) -> Tensor:
        top, left, height, width = params.unbind(1)
        zero = torch.zeros_like(top)
        rows = [
            torch.stack([width, zero, 2 * left + width - 1], 1),
            torch.stack([zero, height, 2 * top + height - 1], 1),
        ]
        return _warp(images, torch.stack(rows, 1), "border")


@dataclass(frozen=True)
class Erase:
    """Random erasing (Zhong et al. 2020): a box of each picture is blotted out with `probability`, P = 4 fractions.

    probability: in [0, 1]. smallest, largest: of the box's area as fractions in (0, 1]. stretch: largest ratio of its
    sides, >= 1. fill: value inside, one a channel. Parameters: (top, bottom, left, right), all 0 where there is no box.
    """

    probability: float = 0.25
    smallest: float = 0.02
    largest: float = 1 / 3
    stretch: float = 10 / 3
    fill: tuple[float, ...] = (0.0,)
    width: int = 4

    def draw(self, generator: Generator, batch: int) -> Tensor:
        u = _uniform(generator, batch, 5)
        area = self.smallest + (self.largest - self.smallest) * u[:, 1]
        ratio = torch.exp((2 * u[:, 2] - 1) * math.log(self.stretch))
        height, width = (area / ratio).sqrt().clamp(max=1), (area * ratio).sqrt().clamp(max=1)
        top, left = u[:, 3] * (1 - height), u[:, 4] * (1 - width)
        box = torch.stack([top, top + height, left, left + width], 1)
        return torch.where(u[:, :1] < self.probability, box, 0.0)

    def apply(self, images: Tensor, params: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        rows, cols = ((params[:, i : i + 2].to(images.device) * n).round() for i, n in ((0, height), (2, width)))
        y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
        tall, wide = (y >= rows[:, :1]) & (y < rows[:, 1:]), (x >= cols[:, :1]) & (x < cols[:, 1:])
        return torch.where((tall[:, :, None] & wide[:, None, :]).unsqueeze(1), _fill(images, self.fill), images)


RANDOM = ("identity", "shear_x", "shear_y", "shift_x", "shift_y", "rotate", "brightness", "contrast", "color", "sharp")


@dataclass(frozen=True)
class RandAugment:
    """`layers` operations drawn for each picture on its own (Cubuk et al. 2020), each as strong as `magnitude`.

    P = 2 a layer: which operation, and its direction and strength in [-1, 1]. Of the paper's fourteen those ten that
    are differentiable; at magnitude 1 they shear by 0.3, shift by 0.45 of the side, rotate by 30 degrees, and lessen or
    strengthen brightness, contrast, colour and sharpness by 0.9.

    layers: >= 1. magnitude: in [0, 1]; the paper's 9 of 30 is 0.3. fill: black after normalisation, one a channel.
    """

    layers: int = 2
    magnitude: float = 0.3
    fill: tuple[float, ...] = (0.0,)

    @property
    def width(self) -> int:
        return 2 * self.layers

    def draw(self, generator: Generator, batch: int) -> Tensor:
        op = torch.randint(len(RANDOM), (batch, self.layers), generator=generator)
        sign = 2.0 * torch.randint(2, (batch, self.layers), generator=generator) - 1
        return torch.stack([op.float(), self.magnitude * sign], 2).flatten(1)

    def apply(self, images: Tensor, params: Tensor) -> Tensor:
        for layer in params.to(images.device).view(len(params), self.layers, 2).unbind(1):
            op, strength = layer.unbind(1)
            images = self._layer(images, op.round().long(), strength)
        return images

    def _layer(self, images: Tensor, op: Tensor, s: Tensor) -> Tensor:
        """One operation a picture: `op` [B] of strength `s` [B] in [-1, 1]."""

        def of(name: str) -> Tensor:
            return torch.where(op == RANDOM.index(name), s, 0.0)

        angle, one = of("rotate") * math.pi / 6, torch.ones_like(s)
        rows = [
            torch.stack([angle.cos(), -angle.sin() + 0.3 * of("shear_x"), 0.9 * of("shift_x")], 1),
            torch.stack([angle.sin() + 0.3 * of("shear_y"), angle.cos(), 0.9 * of("shift_y")], 1),
        ]
        black = _fill(images, self.fill)
        moves = ((op > 0) & (op < RANDOM.index("brightness"))).view(-1, 1, 1, 1)
        x = torch.where(moves, _warp(images - black, torch.stack(rows, 1)) + black, images)
        grey = x.mean(1, keepdim=True)
        soft = F.avg_pool2d(F.pad(x, [1] * 4, mode="replicate"), 3, 1)
        targets = {"brightness": black, "contrast": grey.mean((2, 3), keepdim=True), "color": grey, "sharp": soft}
        for name, target in targets.items():
            factor = (one + 0.9 * of(name)).to(x).view(-1, 1, 1, 1)
            x = torch.where(factor == 1, x, target + factor * (x - target))
        return x


@dataclass(frozen=True)
class Chain:
    """Several augmentations one after the other; their parameters lie side by side."""

    parts: tuple[Augment, ...]

    @property
    def width(self) -> int:
        return sum(part.width for part in self.parts)

    def draw(self, generator: Generator, batch: int) -> Tensor:
        return torch.cat([part.draw(generator, batch) for part in self.parts], 1)

    def apply(self, images: Tensor, params: Tensor) -> Tensor:
        start = 0
        for part in self.parts:
            images = part.apply(images, params[:, start : start + part.width])
            start += part.width
        return images


OPS = ("color", "crop", "cutout", "flip", "scale", "rotate")


@dataclass(frozen=True)
class Siamese:
    """Differentiable siamese augmentation (Zhao and Bilen 2021): one operation a call, P = 1 + 4.

    `draw(generator, 1)` gives one row that treats every batch it is applied to alike (real and synthetic pictures get
    the same transform); `draw(generator, B)` gives each picture its own parameters of the one drawn operation.

    ops: which operations may be drawn; leave "flip" out for digits. every: apply all of them in order instead of one.
    brightness, saturation, contrast: strength of the colour change, >= 0. crop: largest shift as a part of the side.
    cutout: side of the hole as a part of the side. scale: largest zoom factor, >= 1. rotate: largest angle in degrees.
    fill: value behind the edges and in holes, one a channel.
    """

    ops: tuple[str, ...] = OPS
    every: bool = False
    brightness: float = 1.0
    saturation: float = 2.0
    contrast: float = 0.5
    crop: float = 0.125
    cutout: float = 0.5
    scale: float = 1.2
    rotate: float = 15.0
    fill: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        for op in self.ops:
            if op not in OPS:
                raise BadInput(f"siamese augmentation has no operation {op!r}{nearest(op, OPS)}")

    @property
    def width(self) -> int:
        return 1 + (4 * len(self.ops) if self.every else 4)

    def draw(self, generator: Generator, batch: int) -> Tensor:
        op = torch.randint(len(self.ops), (1, 1), generator=generator).float()
        return torch.cat([op.expand(batch, 1), _uniform(generator, batch, self.width - 1)], 1)

    def apply(self, images: Tensor, params: Tensor) -> Tensor:
        drawn = params[:, 0].long().cpu()
        if not self.every and bool((drawn == drawn[0]).all()):
            return self._one(self.ops[int(drawn[0])], images, params[:, 1:])
        if not self.every:  # rows of several draws, as when stored views are mixed
            groups = [(drawn == op).nonzero()[:, 0] for op in range(len(self.ops))]
            parts = [self._one(o, images[g], params[g, 1:]) for o, g in zip(self.ops, groups, strict=True) if len(g)]
            return torch.cat(parts)[torch.cat(groups).argsort()]
        for i, op in enumerate(self.ops):
            images = self._one(op, images, params[:, 1 + 4 * i : 5 + 4 * i])
        return images

    def _one(self, op: str, images: Tensor, u: Tensor) -> Tensor:
        """Operation `op` with four uniform numbers u [B or 1, 4] in [0, 1)."""
        u = u.to(images.device, images.dtype)
        height, width = images.shape[-2:]
        if op == "color":
            images = images + self.brightness * (u[:, 0] - 0.5).view(-1, 1, 1, 1)
            grey = images.mean(1, keepdim=True)
            images = (images - grey) * (self.saturation * u[:, 1]).view(-1, 1, 1, 1) + grey
            level = images.mean((1, 2, 3), keepdim=True)
            return (images - level) * (u[:, 2] + self.contrast).view(-1, 1, 1, 1) + level
        if op == "crop":
            rows, cols = (int(side * self.crop + 0.5) for side in (height, width))
            down = (u[:, 0] * (2 * rows + 1)).floor() - rows
            right = (u[:, 1] * (2 * cols + 1)).floor() - cols
            return _shift(images, down, right, self.fill)
        if op == "cutout":
            rows, cols = (int(side * self.cutout + 0.5) for side in (height, width))
            y_mid = (u[:, :1] * (height + 1 - rows % 2)).floor()  # an even hole may be centred on either border
            x_mid = (u[:, 1:2] * (width + 1 - cols % 2)).floor()
            y = torch.arange(height, device=images.device) - y_mid + rows // 2
            x = torch.arange(width, device=images.device) - x_mid + cols // 2
            hole = ((y >= 0) & (y < rows))[:, None, :, None] & ((x >= 0) & (x < cols))[:, None, None, :]
            return torch.where(hole, _fill(images, self.fill), images)
        if op == "flip":
            return torch.where((u[:, 0] < 0.5).view(-1, 1, 1, 1), images.flip(3), images)
        zero = torch.zeros_like(u[:, 0])
        if op == "scale":
            low = 1 / self.scale
            sx, sy = (low + u[:, i] * (self.scale - low) for i in (0, 1))
            theta = torch.stack([torch.stack([sx, zero, zero], 1), torch.stack([zero, sy, zero], 1)], 1)
        else:
            angle = (2 * u[:, 0] - 1) * self.rotate * math.pi / 180
            cos, sin = angle.cos(), angle.sin()
            theta = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
        back = _fill(images, self.fill)
        return _warp(images - back, theta) + back


def build(spec: Sequence[object], size: int = 32, fill: tuple[float, ...] = (0.0,)) -> Augment | None:
    """Augmentations from a recipe's list: names, {name: {knob: value}}, or ready objects; None when it is empty.

    size: side of the pictures in pixels, from which `crop` takes its default pad (an eighth). fill: the value of black
    after normalisation, one a channel, so that padding looks like the padding of raw pictures.
    """
    kinds: dict[str, type[Any]] = {
        "crop": Crop, "flip": Flip, "resized_crop": ResizedCrop, "siamese": Siamese, "randaugment": RandAugment,
        "erase": Erase,
    }  # fmt: skip
    defaults: dict[str, dict[str, object]] = {
        "crop": {"pad": max(1, round(size / 8)), "fill": fill},
        "siamese": {"fill": fill},
        "randaugment": {"fill": fill},
        "erase": {"fill": fill},
    }
    parts: list[Augment] = []
    for item in spec:
        if hasattr(item, "draw") and hasattr(item, "apply"):
            parts.append(item)  # type: ignore[arg-type]
            continue
        named = item if isinstance(item, Mapping) else {item: None}
        for name, knobs in named.items():
            if name not in kinds:
                raise BadInput(f"no augmentation {name!r}{nearest(str(name), kinds)}")
            given = {**defaults.get(name, {}), **(knobs or {})}
            given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
            try:
                parts.append(kinds[name](**given))
            except TypeError:
                known = [f.name for f in fields(kinds[name]) if f.name != "width"]
                wrong = next(k for k in given if k not in known)
                raise BadInput(f"augmentation {name!r} has no knob {wrong!r}{nearest(wrong, known)}") from None
    return Chain(tuple(parts)) if parts else None
