"""Learned queries read a teacher's sequence off the student's feature, compared as it is and without its mean."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.features import Shape, as_map, grid, pick, tokens, width
from limbeck.core.maths import pair


@method(
    paper="Fan et al. 2024, section 3, eq. 1-3",
    year=2024,
    arxiv="2411.06786",
    code="deep-optimization/ScaleKD@478a7db:mmcls/models/dis_losses/fmdv2.py",
    differs="the discrete cosine transform whose first coefficient is dropped is written as what it amounts to, taking "
    "off the mean over the places; as many heads as the asked-for number and the teacher's width have in common",
    row="scalekd",
    exceptions={"mask": "the projector's batch norm takes its statistics over the whole batch, masked examples too"},
)
class DualView(nn.Module):
    """spatial_weight |n(P(F_s)) - n(F_t)|^2 + alternative_weight |n(Q(F_s) - mean) - n(F_t - mean)|^2.  lists -> [B]

    n makes unit vectors of the channels at each place, the mean is over the places, and the squares are summed over
    all of them. P and Q are cross-attention projectors of their own: queries, one for each place of the teacher, look
    at the student's map after a 3x3 convolution, with learned positions; layer norm and a feed-forward layer follow.

    layer: which of the features, counted from shallow (0) or from deep (-1).
    spatial_weight: >= 0. alternative_weight: >= 0; without the mean, what the places have in common hides the rest
        no longer.
    heads: of attention, >= 1.
    sharpness: factor on the scores of attention, > 0.

    *Needs*: one feature of each: maps, tokens that make a square picture, or vectors; the teacher's may be any tokens.
    *Relates to*: weight 1 beside `ce` and `kd` with temperature 1, both at 0.5. Made for transformer teachers of other
        students; the train method `scalekd` adds the teacher's own last stage. Use `vkd` for one pooled vector.
    """

    def __init__(
        self,
        student_feats: list[Shape],
        teacher_feats: list[Shape],
        *,
        layer: int = -1,
        spatial_weight: float = 0.08,
        alternative_weight: float = 0.06,
        heads: int = 16,
        sharpness: float = 5.0,
    ) -> None:
        super().__init__()
        require(spatial_weight >= 0, "spatial_weight", spatial_weight, ">= 0")
        require(alternative_weight >= 0, "alternative_weight", alternative_weight, ">= 0")
        require(heads >= 1, "heads", heads, ">= 1")
        require(sharpness > 0, "sharpness", sharpness, "> 0")
        self.layer, self.heads, self.sharpness = layer, heads, sharpness
        self.spatial_weight, self.alternative_weight = spatial_weight, alternative_weight
        student = student_feats[pick("dual_view.layer", student_feats, layer, "student")]
        teacher = teacher_feats[pick("dual_view.layer", teacher_feats, layer, "teacher")]
        shared = math.gcd(heads, width(teacher))
        self.spatial = CrossAttention(student, teacher, shared, sharpness)
        self.alternative = CrossAttention(student, teacher, shared, sharpness)

    def forward(self, student_feats: list[Tensor], teacher_feats: list[Tensor]) -> Tensor:
        """Per example."""
        feature = student_feats[self.layer]
        return self.compare(self.spatial(feature), self.alternative(feature), teacher_feats[self.layer])

    def compare(self, spatial: Tensor, alternative: Tensor, teacher: Tensor) -> Tensor:
        """Both projections, as sequences or in the teacher's form, against the teacher's feature, per example."""
        view, target = pair(tokens(spatial), tokens(teacher.detach()))
        other = tokens(alternative).to(view)
        alike = _apart(view, target)
        return self.spatial_weight * alike + self.alternative_weight * _apart(
            other - other.mean(1, keepdim=True), target - target.mean(1, keepdim=True)
        )


class CrossAttention(nn.Module):
    """From a student's feature of one shape to a sequence [B, places, width] of a teacher's."""

    def __init__(self, student: Shape, teacher: Shape, heads: int, sharpness: float) -> None:
        super().__init__()
        channels, wide = width(student), width(teacher)
        sides = student[2:] if len(student) == 4 else grid(student[1]) if len(student) == 3 else (1, 1)
        places = math.prod(teacher[2:]) if len(teacher) == 4 else teacher[1] if len(teacher) == 3 else 1
        self.heads, self.scale = heads, sharpness * (wide // heads) ** -0.5
        self.local = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, channels, *sides), std=0.02))
        self.queries: nn.Parameter | None = nn.Parameter(torch.randn(places, wide))
        self.asking = nn.Sequential(nn.Linear(wide, wide), nn.ReLU())
        self.query, self.key, self.value = nn.Linear(wide, wide), nn.Linear(channels, wide), nn.Linear(channels, wide)
        self.out, self.norm = nn.Linear(wide, wide), nn.LayerNorm(wide)
        self.feed = nn.Sequential(nn.Linear(wide, 4 * wide), nn.ReLU(), nn.Linear(4 * wide, wide))

    def forward(self, feature: Tensor, queries: Tensor | None = None) -> Tensor:
        """queries [B, places, width]: asked in the place of the learned ones, which may then be None."""
        seen = tokens(self.local(as_map(feature.to(self.positions.dtype))) + self.positions)
        if queries is None:
            assert self.queries is not None
            queries = self.queries.expand(len(seen), -1, -1)
        asked = self.query(self.asking(queries))
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (asked, self.key(seen), self.value(seen)))
        found = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        normed = self.norm(self.out(found.transpose(1, 2).flatten(2)))
        sequence: Tensor = normed + self.feed(normed)
        return sequence


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """Sum over places and channels of the squared difference of unit vectors: [B, T, D] x 2 -> [B]."""
    if one.shape[1:] != other.shape[1:]:
        raise BadInput(
            f"the projection has {tuple(one.shape[1:])} places and channels, the teacher {tuple(other.shape[1:])}"
        )
    return (F.normalize(one, dim=-1) - F.normalize(other, dim=-1)).square().sum((1, 2))
