"""Besides what it says of each example, the student copies how examples correlate, through a kernel."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.layerwise import counted
from limbeck.core.maths import gram, upcast

KERNELS = ("gaussian", "bilinear")


@method(
    paper="Peng et al. 2019, section 3",
    year=2019,
    arxiv="1904.01802",
    code="yoshitomo-matsubara/torchdistill@3e4373c:torchdistill/losses/mid_level.py",
    differs="no code by the authors is public. torchdistill, named here, leaves out the unit length and takes the norm "
    "where the paper takes its square. The paper's third kernel, a discrepancy of two single vectors, is left out; its "
    "class-balanced batches are the recipe's business (train.per_class). What the authors gave to a benchmark is "
    "another loss: `correlation`",
)
class CCKD(nn.Module):
    """|C_s - C_t|^2 / B^2, C_ij = k(e_i, e_j), e unit vectors of learned linear maps.  [B, D], [B, E] -> []

    gaussian: k(x, y) = exp(-gamma |x - y|^2), as the series exp(-2 gamma) sum_{p <= order} (2 gamma x . y)^p / p!;
    bilinear: x . y. Both maps are learned, the teacher's too. B counts what is not masked.

    kernel: gaussian or bilinear.
    order: of the series, >= 1.
    gamma: of the gaussian, > 0; larger looks at close pairs only, and needs a higher order.
    width: of the unit vectors, >= 1; 0 takes the embeddings as they are: only correlations are compared, so widths may
        differ, and learned maps could meet in one point.

    *Needs*: embeddings, and batches with several examples a class (train.per_class).
    *Relates to*: beside `ce` and `kd`, which the paper always keeps; tune its weight from 1 to 1000. `sp`, `pkt` and
        `rkd` compare the same examples without learned maps.
    """

    def __init__(
        self,
        student_emb: tuple[int, ...],
        teacher_emb: tuple[int, ...],
        *,
        kernel: Literal["gaussian", "bilinear"] = "gaussian",
        order: int = 2,
        gamma: float = 0.4,
        width: int = 128,
    ) -> None:
        super().__init__()
        require(kernel in KERNELS, "kernel", kernel, "gaussian or bilinear")
        require(order >= 1, "order", order, ">= 1")
        require(gamma > 0, "gamma", gamma, "> 0")
        require(width >= 0, "width", width, ">= 0")
        self.kernel, self.order, self.gamma, self.width = kernel, order, gamma, width
        self.student_embed = nn.Linear(math.prod(student_emb[1:]), width) if width else nn.Identity()
        self.teacher_embed = nn.Linear(math.prod(teacher_emb[1:]), width) if width else nn.Identity()

    def forward(self, student_emb: Tensor, teacher_emb: Tensor, mask: Tensor | None = None) -> Tensor:
        """One number for the batch."""
        counts = counted(mask, student_emb)
        student = self._correlation(_unit(self.student_embed, student_emb))
        teacher = self._correlation(_unit(self.teacher_embed, teacher_emb.detach()))
        both = counts.unsqueeze(1) & counts
        return torch.where(both, student - teacher, 0.0).square().sum() / both.sum().clamp_min(1)

    def _correlation(self, unit: Tensor) -> Tensor:
        cosine = gram(unit)
        if self.kernel == "bilinear":
            return cosine
        terms = [(2 * self.gamma) ** p / math.factorial(p) * cosine**p for p in range(self.order + 1)]
        return math.exp(-2 * self.gamma) * torch.stack(terms).sum(0)


def _unit(embed: nn.Module, embedding: Tensor) -> Tensor:
    weight = next(embed.parameters(), embedding)
    return F.normalize(upcast(embed(embedding.flatten(1).to(weight.dtype))))
