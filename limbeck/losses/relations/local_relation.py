"""Regions of feature maps relate to each other, within an image and across the batch, as the teacher's regions do."""

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.card import method
from limbeck.core.features import shared_regions
from limbeck.core.layerwise import counted, picked
from limbeck.core.maths import gram_squares
from limbeck.core.ranges import at_least


@method(
    paper="Li et al. 2020, Local Correlation Consistency for Knowledge Distillation, ECCV",
    year=2020,
    differs="without the attention that weighs regions by their class, which is trained on the teacher first; cosines "
    "and squares where the paper's abstract, the only text at hand, leaves the measure open",
    zero_at_match=True,
)
def local_relation(
    student_feats: list[Tensor],
    teacher_feats: list[Tensor],
    mask: Tensor | None = None,
    *,
    grid: int = 4,
    inside_weight: float = 1.0,
    same_weight: float = 1.0,
    across_weight: float = 1.0,
    cap: int = 1024,
    layer: int = -1,
) -> Tensor:
    """Sum of three means of (c_s - c_t)^2, c the cosines of regions.  [B, C, H, W] lists -> []

    A region is the mean of one of grid x grid parts of a map. inside: pairs of regions of one image; same: pairs of
    images, at one region; across: all pairs of regions of the batch. Only cosines are compared, so that widths may
    differ, and a rotation or a factor common to all regions changes nothing.

    grid: regions along a side, >= 1; at 1 only images are related, as in `sp`.
    inside_weight: >= 0. same_weight: >= 0. across_weight: >= 0.
    cap: regions in the last term, >= 1, drawn from the batch anew each time when it has more: the cost is cap^2.
    layer: which of the features, counted from shallow (0) or from deep (-1).

    *Needs*: one feature of each: maps, or tokens that make a square picture.
    *Relates to*: weight 1 to 100 beside `ce` and `kd`. `sp` relates whole images, `trg` tokens to their neighbours.
    """
    at_least(1, grid=grid, cap=cap)
    at_least(0, inside_weight=inside_weight, same_weight=same_weight, across_weight=across_weight)
    student, teacher = picked(student_feats, teacher_feats, layer)
    both, counts = shared_regions(student, teacher.detach(), grid), counted(mask, student)
    mine, aims = (F.normalize(torch.where(counts[:, None, None], x, 0.0), dim=-1) for x in both)  # 0: does not count
    images, parts = counts.sum(), mine.shape[1]
    inside = gram_squares(mine, aims) / (images * parts**2).clamp_min(1)
    same = gram_squares(mine.transpose(0, 1), aims.transpose(0, 1)) / (images**2 * parts).clamp_min(1)
    rows = counts.repeat_interleave(parts)
    drawn = torch.rand(len(rows), device=rows.device).topk(cap).indices if len(rows) > cap else slice(None)
    across = gram_squares(*(x.flatten(0, 1)[drawn] for x in (mine, aims))) / rows[drawn].sum().square().clamp_min(1)
    return inside_weight * inside + same_weight * same + across_weight * across
