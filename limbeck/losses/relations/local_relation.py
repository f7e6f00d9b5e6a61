"""Regions of feature maps relate to each other, within an image and across the batch, as the teacher's regions do."""

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.features import as_map
from limbeck.core.layerwise import counted, picked
from limbeck.core.maths import gram, upcast


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
    require(grid >= 1, "grid", grid, ">= 1")
    require(cap >= 1, "cap", cap, ">= 1")
    weights = {"inside_weight": inside_weight, "same_weight": same_weight, "across_weight": across_weight}
    for name, weight in weights.items():
        require(weight >= 0, name, weight, ">= 0")
    student, teacher = picked(student_feats, teacher_feats, layer)
    counts = counted(mask, student)
    sizes = [as_map(x).shape[2:] for x in (student, teacher)]
    side = (min(grid, *(s[0] for s in sizes)), min(grid, *(s[1] for s in sizes)))
    mine, aims = _regions(student, side, counts), _regions(teacher.detach(), side, counts)
    pairs = counts.unsqueeze(1) & counts
    inside = _apart(gram(mine), gram(aims), counts[:, None, None])
    same = _apart(gram(mine.transpose(0, 1)), gram(aims.transpose(0, 1)), pairs)
    mine, aims, rows = mine.flatten(0, 1), aims.flatten(0, 1), counts.repeat_interleave(mine.shape[1])
    if len(rows) > cap:
        drawn = torch.rand(len(rows), device=rows.device).topk(cap).indices
        mine, aims, rows = mine[drawn], aims[drawn], rows[drawn]
    across = _apart(gram(mine), gram(aims), rows.unsqueeze(1) & rows)
    return inside_weight * inside + same_weight * same + across_weight * across


def _regions(feature: Tensor, side: tuple[int, int], counts: Tensor) -> Tensor:
    """Unit vectors of the parts of a map [B, parts, C]; 0 of images that do not count."""
    parts = F.adaptive_avg_pool2d(as_map(upcast(feature)), side).flatten(2).mT
    return F.normalize(torch.where(counts[:, None, None], parts, 0.0), dim=-1)


def _apart(student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
    """Mean of squares over what counts; 0 when nothing does."""
    counts = counts.expand_as(student)
    return torch.where(counts, (student - teacher).square(), 0.0).sum() / counts.sum().clamp_min(1)
