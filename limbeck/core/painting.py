"""Given pictures painted anew: partly noised and denoised again, pulled along a gradient on the way.

`Sketch` is a small network to do so with, where there is no better one.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.sampler import Denoiser, Flow, wide

Pull = Callable[[Tensor], Tensor]


class Sketch(nn.Module):
    """x [B, C, H, W], t [B] in [0, 1], labels [B] or None -> [B, C, H, W]; convolutions whose reach doubles."""

    def __init__(self, channels: int, classes: int, width: int = 32) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, channels, 3, padding=1)
        self.times, self.classes = nn.Linear(2, width), nn.Embedding(classes, width)
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=reach, dilation=reach) for reach in (1, 2, 4, 1))
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        told = self.times(torch.stack([t, 1 - t], 1).to(x))
        if labels is not None:
            told = told + self.classes(labels)
        h = self.first(x)
        for layer in self.layers:
            h = h + layer(F.silu(h + told[:, :, None, None]))
        out: Tensor = self.last(F.silu(h))
        return out


def sketcher(channels: int, classes: int, width: int = 32) -> Denoiser:
    """An untrained denoiser of pictures, on straight lines from data to noise."""
    return Denoiser(Sketch(channels, classes, width), Flow(), "flow", solver="ddim")


def repaint(
    denoiser: Denoiser,
    images: Tensor,
    labels: Tensor | None,
    *,
    strength: float,
    steps: int,
    pull: Pull | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Pictures like the given ones [B, ...]: noised up to level `strength` in (0, 1], and back in `steps` steps.

    pull: what is added to the data x_0 that the denoiser expects, in every step (guidance). Without it this is plain
    image-to-image by DDIM. noise: like images; drawn when None.
    """
    s = denoiser.schedule
    grid = s.at(strength * torch.linspace(1, 0, steps + 1))
    grid[-1] = 0
    x = s.noised(images, grid[0].expand(len(images)), torch.randn_like(images) if noise is None else noise)
    for now, then in pairwise(grid):
        with torch.no_grad():
            x0: Tensor = denoiser(x, now, labels)
        if pull is not None:
            x0 = x0 + pull(x0)
        a, b = wide(now, x), wide(then, x)
        keep = s.sigma(b) / s.sigma(a)
        x = keep * x + (s.alpha(b) - keep * s.alpha(a)) * x0
    return x.to(images.dtype)


class Painted(nn.Module):
    """One painted picture for each of N examples, and whether the teacher is sure enough of it.

    like: pictures [B, ...] of a batch. steps: in which all examples come; 0 for N / B.
    """

    images: Tensor
    done: Tensor
    kept: Tensor

    def __init__(self, examples: int, like: Tensor, steps: int = 0) -> None:
        super().__init__()
        self.register_buffer("images", like.new_zeros(examples, *like.shape[1:]))
        self.register_buffer("done", torch.zeros(examples, dtype=torch.bool))
        self.register_buffer("kept", torch.zeros(examples, dtype=torch.bool))
        # a pass over all examples may begin in the middle of an epoch
        self.look = 2 * (steps or max(1, examples // len(like))) - 1
