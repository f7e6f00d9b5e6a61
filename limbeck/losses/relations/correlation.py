"""Errors of two neighbours in the batch are multiplied: where the student fails on both, it pays most."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.layerwise import counted
from limbeck.core.maths import pair


@method(
    paper="Peng et al. 2019, in the form that its authors gave to the benchmark of Tian et al. 2019",
    year=2019,
    arxiv="1904.01802",
    code="HobbitLong/RepDistiller@b84f547:distiller_zoo/CC.py",
    differs="no equation of the paper: `cckd` has those. Figures published as CC mostly come from this loss",
    row="cckd",
    exceptions={"batch order": "which examples are neighbours in the batch decides what is multiplied"},
)
class Correlation(nn.Module):
    """Mean over i of sum_d |e_s - e_t|_i,d |e_s - e_t|_i+1,d.  [B, D], [B, E] -> []

    e are linear maps of the embeddings, both learned; i and i + 1 are neighbours in the batch, of which both must
    count.

    width: of the maps, >= 1.

    *Needs*: embeddings, at least 2 examples.
    *Relates to*: use weight 0.02 beside `ce`; add `kd`. Kept for comparison with published figures: `cckd`, `sp` and
        `rkd` compare how examples relate.
    """

    def __init__(self, student_emb: tuple[int, ...], teacher_emb: tuple[int, ...], *, width: int = 128) -> None:
        super().__init__()
        require(width >= 1, "width", width, ">= 1")
        self.width = width
        self.student_embed = nn.Linear(math.prod(student_emb[1:]), width)
        self.teacher_embed = nn.Linear(math.prod(teacher_emb[1:]), width)

    def forward(self, student_emb: Tensor, teacher_emb: Tensor, mask: Tensor | None = None) -> Tensor:
        """One number for the batch."""
        dtype, counts = self.student_embed.weight.dtype, counted(mask, student_emb)
        student = self.student_embed(student_emb.flatten(1).to(dtype))
        teacher = self.teacher_embed(teacher_emb.detach().flatten(1).to(dtype))
        student, teacher = pair(student, teacher)
        error, both = (student - teacher).abs(), counts[:-1] & counts[1:]
        return torch.where(both, (error[:-1] * error[1:]).sum(1), 0.0).sum() / both.sum().clamp_min(1)
