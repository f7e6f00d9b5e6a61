"""A linear classifier asked about places of a picture, not about their mean: local logits and class activation maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import BadInput
from limbeck.core.features import Shape, as_map, width
from limbeck.core.maths import pair


def reads_mean(name: str, feature: Shape, head: Shape, side: str) -> None:
    """Raise BadInput unless a head [C, D] can read the mean over the places of a feature of that shape."""
    if width(feature) != head[-1]:
        raise BadInput(
            f"`{name}` sends the {side}'s feature, {width(feature)} wide, through its head, which reads {head[-1]}: it "
            "must be the feature whose mean over the places the head reads"
        )


def class_maps(feature: Tensor, head: Tensor, bias: Tensor | None = None) -> Tensor:
    """What the head says at every place: maps or square pictures of tokens -> [B, C, H, W], whose mean are the logits.

    Its positive part at one class is the class activation map, which is Grad-CAM for such a network.
    """
    return _asked(as_map(feature).movedim(1, -1), head, bias).movedim(-1, 1)


def grad_cam(logits: Tensor, feature: Tensor) -> Tensor:
    """sum_d (mean over places of d logit_c / d feature_d) feature_d: a map a class [B, C, H, W], before `activation`.

    logits [B, C] were made of the feature, maps or square pictures of tokens. For a head on the mean over places it is
    `class_maps` without the bias, over the number of places (Selvaraju et al. 2017, eq. 1).
    """
    picture = as_map(feature.detach())
    maps = []
    for c in range(logits.shape[-1]):
        (slope,) = torch.autograd.grad(logits[:, c].sum(), feature, retain_graph=True)
        maps.append(torch.einsum("bd,bdhw->bhw", as_map(slope).mean((2, 3)), picture))
    return torch.stack(maps, 1)


def local_logits(feature: Tensor, head: Tensor, bias: Tensor | None, scales: Sequence[int]) -> Tensor:
    """What the head says of every region: [B, R, C]; scale s cuts the picture into s x s, row by row, R = sum s^2."""
    picture = as_map(feature)
    regions = [F.adaptive_avg_pool2d(picture, scale).flatten(2) for scale in scales]
    return _asked(torch.cat(regions, -1).mT, head, bias)


def _asked(rows: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(rows.device.type, enabled=False):
        x, weight = pair(rows, head)
        return F.linear(x, weight, None if bias is None else bias.to(x))


def taught(rows: Tensor, head: Tensor, bias: Tensor | None = None) -> Tensor:
    """What a teacher's head says of rows [..., D]: [..., C]; there is a gradient to the rows alone."""
    return _asked(rows, head.detach(), None if bias is None else bias.detach())


def activation(maps: Tensor) -> Tensor:
    """Class activation maps [..., H, W] in [0, 1]: the positive part over its largest value; 0 where none is."""
    positive = maps.clamp_min(0)
    top = positive.amax((-2, -1), keepdim=True)
    return positive / torch.where(top > 0, top, 1.0)
