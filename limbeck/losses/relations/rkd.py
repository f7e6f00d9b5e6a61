"""The student keeps the shape of the cloud of examples: their distances and the angles between them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.maths import arrows, gram_huber, upcast


@method(
    paper="Park et al. 2019, section 3.2",
    year=2019,
    arxiv="1904.05068",
    code="lenscloth/RKD@0a6c3c0:metric/loss.py",
    differs="mean over all N^2 pairs and N^3 triples as in the code; the paper's sums are N^2 and N^3 times that. "
    "Defaults are the weights of the classification recipes; the paper's own for metric learning are 1 and 2",
    zero_at_match=True,
)
def rkd(
    student_emb: Tensor, teacher_emb: Tensor, *, distance_weight: float = 25.0, angle_weight: float = 50.0
) -> Tensor:
    """distance_weight Huber(d_s, d_t) + angle_weight Huber(cos_s, cos_t) over a batch.  [B, D], [B, E] -> []

    d_ij = |e_i - e_j| over its mean in the batch; cos_ijk = <u_ij, u_kj> with u_ij = (e_i - e_j) / |e_i - e_j|. Huber
    has its threshold at 1. Rotating, shifting or scaling either cloud changes nothing, so widths may differ and no
    projector is needed.

    distance_weight: weight of the pairs, >= 0.
    angle_weight: weight of the triples, >= 0; the stronger term. Memory grows with B^3: 8 MiB a tensor at B = 128.

    *Needs*: embeddings of both, at least 3 examples (2 have one distance and no angle: the loss is 0).
    *Relates to*: alone (1 and 2, no task loss) for metric learning; for classification beside `ce` and `kd`. Use `crd`
        when examples should also be told apart, `fitnets` when coordinates matter.
    """
    require(distance_weight >= 0, "distance_weight", distance_weight, ">= 0")
    require(angle_weight >= 0, "angle_weight", angle_weight, ">= 0")
    student, teacher = upcast(student_emb).flatten(1), upcast(teacher_emb).flatten(1).detach()
    (student_lengths, student_units), (teacher_lengths, teacher_units) = arrows(student), arrows(teacher)
    distance = F.smooth_l1_loss(_relative(student_lengths), _relative(teacher_lengths))
    angle = gram_huber(student_units, teacher_units)  # cos of the angle at j between i and k: <u_ij, u_kj>
    return distance_weight * distance + angle_weight * angle


def _relative(d: Tensor) -> Tensor:
    """Distances [B, B] in units of their mean over the pairs of two examples."""
    n = len(d)
    return d * n * (n - 1) / d.sum().clamp_min(torch.finfo(d.dtype).tiny)
