"""Features before the ReLU: the student must reach what is positive and only stay below what is negative anyway."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from limbeck.core.card import method
from limbeck.core.errors import BadInput
from limbeck.core.features import Shapes, as_map
from limbeck.core.layerwise import Connector, Layers, deepest_most, matched, paired, widths
from limbeck.core.maths import pair, upcast


@method(
    paper="Heo et al. 2019, section 3",
    year=2019,
    arxiv="1904.01866",
    code="clovaai/overhaul-distillation@76344a8:CIFAR-100/distiller.py",
    differs="the code runs the teacher in training mode; here, as always, it uses its running statistics. Where maps "
    "differ in size the larger is average-pooled",
    exceptions={"mask": "the connectors' batch norm takes its statistics over the whole batch, masked examples too"},
)
class OFD(nn.Module):
    """Sum over layers of 2^(l + 1 - L) |r(f_s) - max(f_t, m)|^2, but 0 where r(f_s) <= max(f_t, m) <= 0.  -> [B]

    f are features before the ReLU, l = 0 .. L - 1 from shallow to deep, r a linear map at every place with batch norm.
    The margin m < 0 of a channel is its mean negative response: for a batch norm with weight s and bias b that is
    E[x | x < 0] of x ~ N(b, s^2) = b - |s| phi(b / |s|) / Phi(-b / |s|), or -3 |s| where hardly anything is negative.

    layers: which of the paired features, counted from shallow (0) or from deep (-1); () takes all.

    *Needs*: features before a ReLU, such as taps "blocks.2.relu2:in", and the weights and biases of the batch norms
        that those of the teacher come out of: taps {scales: ["blocks.2.bn2.weight"], shifts: ["blocks.2.bn2.bias"]}.
    *Relates to*: use weight 0.001 beside `ce` for stages of 32 x 32 to 8 x 8 places, larger where there are fewer: the
        sum grows with them. `ab` copies the signs only, `fitnets` everything.
    """

    def __init__(
        self,
        student_feats: Shapes,
        teacher_feats: Shapes,
        teacher_scales: Shapes,
        teacher_shifts: Shapes,
        *,
        layers: Layers = (),
    ) -> None:
        super().__init__()
        self.layers = layers
        for name, found in (("scales", teacher_scales), ("shifts", teacher_shifts)):
            if len(found) != len(teacher_feats):
                raise BadInput(f"`ofd` needs the teacher's {name} of {len(teacher_feats)} layers, got {len(found)}")
        self.connectors = nn.ModuleList(Connector(*pair) for pair in widths(student_feats, teacher_feats, layers))

    def forward(
        self,
        student_feats: list[Tensor],
        teacher_feats: list[Tensor],
        teacher_scales: list[Tensor],
        teacher_shifts: list[Tensor],
    ) -> Tensor:
        """Per example: a sum over channels and places."""
        losses = []
        pairs = matched(student_feats, teacher_feats, self.layers)
        margins = paired(student_feats, list(map(margin, teacher_scales, teacher_shifts)), self.layers)
        for (student, teacher), (_, m), connector in zip(pairs, margins, self.connectors, strict=True):
            student, teacher = pair(as_map(connector(student)), as_map(teacher))
            target = torch.maximum(teacher, m.to(teacher)[:, None, None])
            matters = (student > target) | (target > 0)
            losses.append(torch.where(matters, student - target, 0.0).square().sum((1, 2, 3)))
        return deepest_most(losses)


def margin(scale: Tensor, shift: Tensor) -> Tensor:
    """E[x | x < 0] for x ~ N(shift, scale^2), channel by channel; -3 |scale| where P(x < 0) <= 0.001."""
    spread, shift = upcast(scale.detach()).abs(), upcast(shift.detach())
    ratio = shift / spread.clamp_min(torch.finfo(spread.dtype).tiny)
    negative = torch.special.ndtr(-ratio)
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    usual = negative > 0.001
    return torch.where(usual, shift - spread * density / torch.where(usual, negative, 1.0), -3 * spread)
