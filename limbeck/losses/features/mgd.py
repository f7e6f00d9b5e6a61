"""From a student feature with holes in it, a small generator must restore the whole feature of the teacher."""

from typing import Literal

import torch
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.features import Shapes, as_map
from limbeck.core.layerwise import Layers, matched, widths
from limbeck.core.maths import pair


@method(
    paper="Yang et al. 2022, section 3",
    year=2022,
    arxiv="2205.01529",
    code="yzd-v/MGD@2c9da0b:cls/mmcls/distillation/losses/mgd.py",
    differs="alpha is the weight in the recipe. The paper masks places, and so does the code for detection and "
    "segmentation; its code for classification masks channels (`holes`). Where maps differ in size, which the code "
    "refuses, the larger is average-pooled",
    exceptions={"batch order": "each example draws its own holes"},
)
class MGD(nn.Module):
    """Sum over layers of |f_t - G(M r(f_s))|^2, summed over channels and places.  [B, ...] lists -> [B]

    M is 0 with probability `masked`, else 1, drawn anew for each place of each example; G is a 3x3 convolution, ReLU
    and a 3x3 convolution as wide as the teacher; r is a 1x1 convolution where the widths differ, else nothing.

    masked: share of holes (lambda), in [0, 1); 0.65 for one-stage detectors, 0.45 for two-stage ones, 0.75 for
        segmentation, 0.15 in the code for classification.
    holes: place: of all channels at a place; channel: of a channel everywhere.
    layers: which of the paired features, counted from shallow (0) or from deep (-1); () takes all.

    *Needs*: maps, or tokens whose number is a square (drop the class token); the last before the pooling for
        classification and segmentation, every level of the pyramid for detection.
    *Relates to*: use weight 7e-5 beside `ce` for 512 x 7 x 7 numbers, more for smaller features (it is a sum), 2e-5 for
        segmentation and detection. Holes are drawn from torch's global generator, in eval mode too.
    """

    def __init__(
        self,
        student_feats: Shapes,
        teacher_feats: Shapes,
        *,
        masked: float = 0.15,
        holes: Literal["place", "channel"] = "place",
        layers: Layers = (-1,),
    ) -> None:
        super().__init__()
        require(0 <= masked < 1, "masked", masked, "in [0, 1)")
        require(holes in ("place", "channel"), "holes", holes, "place or channel")
        self.masked, self.holes, self.layers = masked, holes, layers
        pairs = widths(student_feats, teacher_feats, layers)
        self.aligns = nn.ModuleList(nn.Identity() if s == t else nn.Conv2d(s, t, 1) for s, t in pairs)
        self.generators = nn.ModuleList(
            nn.Sequential(nn.Conv2d(t, t, 3, padding=1), nn.ReLU(), nn.Conv2d(t, t, 3, padding=1)) for _, t in pairs
        )

    def forward(self, student_feats: list[Tensor], teacher_feats: list[Tensor]) -> Tensor:
        """Per example: a sum over channels and places."""
        losses = []
        pairs = matched(student_feats, teacher_feats, self.layers)
        for (student, teacher), align, generator in zip(pairs, self.aligns, self.generators, strict=True):
            student = align(as_map(student).to(next(generator.parameters()).dtype))
            restored, teacher = pair(generator(student * self._mask(student)), as_map(teacher))
            losses.append((restored - teacher).square().sum((1, 2, 3)))
        return torch.stack(losses).sum(0)

    def _mask(self, feature: Tensor) -> Tensor:
        b, c, h, w = feature.shape
        shape = (b, 1, h, w) if self.holes == "place" else (b, c, 1, 1)
        return (torch.rand(shape, device=feature.device) >= self.masked).to(feature.dtype)
