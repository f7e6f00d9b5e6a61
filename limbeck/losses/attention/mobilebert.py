"""Layer by layer the student gives the feature that the teacher gives, and looks where the teacher looks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.features import Shape
from limbeck.core.heads import log_attention, looks_apart, real_mean, same_heads
from limbeck.core.layerwise import matched, paired, widths
from limbeck.core.project import projector, through


@method(
    paper="Sun et al. 2020, eq. 2-3",
    year=2020,
    arxiv="2004.02984",
    differs="the paper builds both networks with bottlenecks so that their layers are equally wide and many; here a "
    "linear map, dropped afterwards, meets other widths, and layers are spread over those of a deeper teacher",
    zero_at_match=True,
)
class MobileBERT(nn.Module):
    """sum_l feature_weight mean (H_s,l - H_t,l)^2 + attention_weight KL(A_t,l || A_s,l).  -> [B]

    H [B, T, D] are the outputs of the layers, compared as they are where they are equally wide; A [B, h, T, T] the
    attention after its softmax, head by head. Means over real tokens, features and heads; padding is not looked at.

    feature_weight, attention_weight: >= 0; the paper has 1 for both.

    *Needs*: `feats` and `attn` of both (`attn: true` in the zoo), the same tokens, as many heads.
    *Relates to*: `progressive_transfer` takes the layers one after the other, as the paper does; with `stagewise` they
        come all together and before the task, with `distill` beside it. `tinybert` compares scores before the softmax.
    """

    def __init__(
        self,
        student_feats: list[Shape],
        teacher_feats: list[Shape],
        student_attn: list[Shape],
        teacher_attn: list[Shape],
        *,
        feature_weight: float = 1.0,
        attention_weight: float = 1.0,
    ) -> None:
        super().__init__()
        require(feature_weight >= 0, "feature_weight", feature_weight, ">= 0")
        require(attention_weight >= 0, "attention_weight", attention_weight, ">= 0")
        self.feature_weight, self.attention_weight = feature_weight, attention_weight
        same_heads("mobilebert", (shape for pair in paired(student_attn, teacher_attn) for shape in pair))
        self.maps = nn.ModuleList(
            nn.Identity() if mine == its else projector("linear", mine, its)
            for mine, its in widths(student_feats, teacher_feats)
        )

    def forward(
        self,
        student_feats: list[Tensor],
        teacher_feats: list[Tensor],
        student_attn: list[Tensor],
        teacher_attn: list[Tensor],
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Per example."""
        apart = []
        for fit, (mine, its) in zip(self.maps, matched(student_feats, teacher_feats), strict=True):
            error = (through(fit, mine) - its).square()
            apart.append(real_mean(error.mean(-1), attention_mask if error.ndim == 3 else None))
        looks = [
            looks_apart(
                log_attention(mine, attention_mask), log_attention(its.detach(), attention_mask), attention_mask
            )
            for mine, its in paired(student_attn, teacher_attn)
        ]
        return self.feature_weight * torch.stack(apart).sum(0) + self.attention_weight * torch.stack(looks).sum(0)
