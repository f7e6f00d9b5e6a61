"""How the solution flows: the student copies the inner products of an early and a later layer's channels."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method
from limbeck.core.errors import BadInput
from limbeck.core.features import Shape, as_map, pick, width
from limbeck.core.layerwise import paired
from limbeck.core.maths import pair
from limbeck.core.project import Pointwise


@method(
    paper="Yim et al. 2017, section 3, A Gift from Knowledge Distillation, CVPR",
    year=2017,
    code="yoshitomo-matsubara/torchdistill@3e4373c:torchdistill/losses/mid_level.py",
    differs="no code by the authors is public. torchdistill, named here, sums lengths of columns where the paper sums "
    "squares; RepDistiller takes their mean over the m n entries, and average pooling. A student's layer of another "
    "width than the teacher's goes through a learned linear map. The paper trains the student by this alone first, "
    "then by the labels: `stagewise` does that; here it may also stand beside them",
)
class FSP(nn.Module):
    """Sum over flows of |G_s - G_t|^2, G = sum over places of F_1 F_2^T / places [m, n].  [B, ...] lists -> [B]

    F_1 [m, places] is an early layer and F_2 [n, places] a later one of the same network: G says which channels of the
    one call for which of the other.

    flows: pairs (early, later) of places among the paired layers, from shallow (0) or from deep (-1); () takes every
        layer with the next.

    *Needs*: at least two maps of each network; in the paper the first and the
        last of each stage of a residual network.
    *Relates to*: first stage of `stagewise`, then `ce`: a student that learns fast from little. The sum grows with the
        features: start at weight 0.001 (RepDistiller's 50 is 50 / (m n) here). `ickd` is a relation within one layer.
    """

    def __init__(
        self, student_feats: list[Shape], teacher_feats: list[Shape], *, flows: tuple[tuple[int, int], ...] = ()
    ) -> None:
        super().__init__()
        self.flows = flows
        pairs = paired(student_feats, teacher_feats)
        if len(pairs) < 2:
            raise BadInput(f"`fsp` needs at least two layers of each network, got {len(pairs)}; tap more")
        widths = [(width(s), width(t)) for s, t in pairs]
        ends = {i for flow in self._flows(pairs) for i in flow}
        self.maps = nn.ModuleDict(
            {str(i): Pointwise(nn.Linear(s, t, bias=False)) for i, (s, t) in enumerate(widths) if s != t and i in ends}
        )

    def forward(self, student_feats: list[Tensor], teacher_feats: list[Tensor]) -> Tensor:
        """Per example: a sum over pairs of channels."""
        pairs = paired(student_feats, teacher_feats)
        student, teacher = [self._mapped(i, s) for i, (s, _) in enumerate(pairs)], [t for _, t in pairs]
        losses = []
        for i, j in self._flows(pairs):
            ours, theirs = pair(_flow(student[i], student[j]), _flow(teacher[i], teacher[j]).detach())
            losses.append((ours - theirs).square().sum((1, 2)))
        return torch.stack(losses).sum(0)

    def _flows(self, pairs: list[tuple[Shape, Shape]] | list[tuple[Tensor, Tensor]]) -> list[tuple[int, int]]:
        chosen = self.flows or tuple(pairwise(range(len(pairs))))
        return [(pick("flows", pairs, i, "student"), pick("flows", pairs, j, "student")) for i, j in chosen]

    def _mapped(self, i: int, feature: Tensor) -> Tensor:
        if str(i) not in self.maps:
            return feature
        moved: Tensor = self.maps[str(i)](feature.to(next(self.maps.parameters()).dtype))
        return moved


def _flow(early: Tensor, later: Tensor) -> Tensor:
    """[B, m, n]: mean over places of the products of two layers' channels."""
    early, later = (as_map(x) for x in pair(early, later))
    size = (min(early.shape[2], later.shape[2]), min(early.shape[3], later.shape[3]))
    early, later = (x if x.shape[2:] == size else F.adaptive_max_pool2d(x, size) for x in (early, later))
    with torch.autocast(early.device.type, enabled=False):
        return early.flatten(2) @ later.flatten(2).mT / (size[0] * size[1])
