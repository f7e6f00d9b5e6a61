"""Pictures mixed with one another. A draw is kept, so that inputs, labels and whoever else looks are mixed alike.

Draws come from torch's global generator, on the CPU, so that they are the same on every device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Beta

from limbeck.core.errors import BadInput
from limbeck.core.nets import Batch

__all__ = ["Mix", "cutmix", "deranged", "drawn", "mixup", "neighbours", "pictures"]

Per = Literal["example", "batch"]


@dataclass(frozen=True)
class Mix:
    """Who is mixed with whom, and how much stays.

    partner: [B], the row that each is mixed with. share: [B] in [0, 1], what stays of the example itself; of its pixels
    where there is a box. box: [B, 4], rows and columns (top, bottom, left, right) where the partner shows, or None when
    the two are blended everywhere.
    """

    partner: Tensor
    share: Tensor
    box: Tensor | None = None

    def images(self, x: Tensor) -> Tensor:
        """Mixed pictures [B, C, H, W]; without a box anything [B, ...]."""
        other = x[self.partner.to(x.device)]
        if self.box is not None:
            return torch.where(inside(self.box.to(x.device), x.shape[-2], x.shape[-1]), other, x)
        return self.blend(x, other)

    def targets(self, p: Tensor) -> Tensor:
        """Mixed distributions [B, C]."""
        return self.blend(p, p[self.partner.to(p.device)])

    def blend(self, x: Tensor, other: Tensor) -> Tensor:
        """share x + (1 - share) other, [B, ...]; exactly x where the share is 1."""
        share = self.share.to(x.device, x.dtype).view(-1, *[1] * (x.ndim - 1))
        return share * x + (1 - share) * other

    def batch(self, batch: Batch) -> Batch:
        """What the networks read, mixed: "inputs" and "mask" (an example counts if both of its halves do).

        Whatever was said of the unmixed pictures, labels and a store's signals, is left out.
        """
        kept: Batch = {"inputs": self.images(batch["inputs"])}
        if "mask" in batch:
            kept["mask"] = batch["mask"].bool() & batch["mask"].bool()[self.partner.to(batch["mask"].device)]
        return kept


def inside(box: Tensor, height: int, width: int) -> Tensor:
    """True in the boxes [B, 4] of (top, bottom, left, right), ends left out: [B, 1, H, W]."""
    top, bottom, left, right = box.unsqueeze(-1).unbind(1)
    y, x = torch.arange(height, device=box.device), torch.arange(width, device=box.device)
    rows, cols = (y >= top) & (y < bottom), (x >= left) & (x < right)
    return (rows[:, :, None] & cols[:, None, :]).unsqueeze(1)


def neighbours(count: int) -> Tensor:
    """The row before, and the last for the first: [B]."""
    return torch.arange(count).roll(1)


def deranged(count: int) -> Tensor:
    """A random permutation in which nobody stays in place (for one alone there is none): [B]."""
    if count < 2:
        return torch.zeros(count, dtype=torch.long)
    while True:
        order = torch.randperm(count)
        if not (order == torch.arange(count)).any():
            return order


def drawn(count: int, alpha: float, per: Per = "example") -> Tensor:
    """Shares from Beta(alpha, alpha), uniform for 1: one an example or the same for the batch, [B]."""
    share: Tensor = Beta(alpha, alpha).sample((count if per == "example" else 1,))
    return share.expand(count).clone()


def mixup(count: int, *, alpha: float = 1.0, per: Per = "batch", partner: Tensor | None = None) -> Mix:
    """Blends each of `count` pictures with another; partner: a random permutation when None."""
    return Mix(torch.randperm(count) if partner is None else partner, drawn(count, alpha, per))


def cutmix(
    images: Tensor, *, alpha: float = 1.0, per: Per = "batch", partner: Tensor | None = None, least: float = 0.0
) -> Mix:
    """Cuts a box of its partner into each picture [B, C, H, W]; the share is that of the pixels that stay.

    The box has a part 1 - lambda of the area, lambda from Beta(alpha, alpha), and a centre that is uniform over the
    pixels; what sticks out is cut off. partner: a random permutation without fixed points when None. least: smallest
    lambda, in [0, 1).
    """
    if images.ndim != 4:
        raise BadInput(f"cutmix is for pictures [B, C, H, W], but inputs are {list(images.shape)}")
    count, height, width = len(images), images.shape[-2], images.shape[-1]
    many = count if per == "example" else 1
    lam = least + (1 - least) * drawn(many, alpha)
    edges: list[Tensor] = []
    for side in (height, width):
        length = (side * (1 - lam).sqrt()).long()
        centre = torch.randint(side, (many,))
        edges += [(centre - length // 2).clamp_min(0), (centre + length // 2).clamp_max(side)]
    box = torch.stack(edges, 1).expand(count, 4).clone()
    area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    return Mix(deranged(count) if partner is None else partner, 1 - area / (height * width), box)


def pictures(batch: Batch, who: str) -> Tensor:
    """The inputs of a batch, which must be pictures."""
    images: Tensor = batch["inputs"]
    if images.ndim != 4 or not images.is_floating_point():
        raise BadInput(f"`{who}` mixes pictures [B, C, H, W], but inputs are {list(images.shape)}")
    return images
