"""Both features are standardised over the batch, and the logarithm of one large sum tells how far apart they are."""

import torch
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.features import Shape, pooled, width
from limbeck.core.maths import pair

EPSILON = 1e-4  # of the variance, as in the code


@method(
    paper="Miles and Mikolajczyk 2023, eq. 6",
    year=2023,
    arxiv="2303.11098",
    code="roymiles/Simple-Recipe-Distillation@31e8477:imagenet/torchdistill/losses/single.py",
    differs="without the factor 2 and the KL of the code's total, which are weights in a recipe; running statistics, "
    "which only an evaluation of the loss would read, are not kept; features that agree in every digit give the "
    "logarithm of the smallest number, not of 0",
)
class SRD(nn.Module):
    """log sum over examples and channels of |BN(P z_s) - BN(z_t)|^power.  [B, D], [B, E] -> []

    P is a linear map to the teacher's width; BN takes mean and variance over the batch, without weights of its own. The
    logarithm makes a constant factor on all differences a constant: the gradient looks at their shares alone, and does
    not fade while the student comes closer. Below 0 when they agree well.

    power: >= 1; the higher, the more the largest differences count.

    *Needs*: embeddings of both; maps or tokens are averaged over their places. At least 2 examples.
    *Relates to*: weight 2 beside `ce` and `kd` with temperature 1. Use `vkd` when batches are small, since nothing
        there depends on them; `fitnets` for inner layers.
    """

    def __init__(self, student_emb: Shape, teacher_emb: Shape, *, power: float = 4.0) -> None:
        super().__init__()
        require(power >= 1, "power", power, ">= 1")
        self.power = power
        self.projector = nn.Linear(width(student_emb), width(teacher_emb))

    def forward(self, student_emb: Tensor, teacher_emb: Tensor, mask: Tensor | None = None) -> Tensor:
        """One value a batch; 0 when all of it is masked."""
        projected = self.projector(pooled(student_emb).to(self.projector.weight.dtype))
        student, teacher = pair(projected, pooled(teacher_emb.detach()))
        counts = torch.ones_like(student[:, :1]) if mask is None else mask.unsqueeze(1).to(student)
        apart = (_standardised(student, counts) - _standardised(teacher, counts)).abs() ** self.power
        total = (counts * apart).sum()
        distance = total.clamp_min(torch.finfo(total.dtype).tiny).log()
        return torch.where(counts.any(), distance, 0.0)


def _standardised(rows: Tensor, counts: Tensor) -> Tensor:
    """Mean 0 and variance 1 in every column over the rows that count; 0 in the others."""
    rows = torch.where(counts > 0, rows, 0.0)
    number = counts.sum().clamp_min(1)
    centred = counts * (rows - rows.sum(0) / number)
    return centred * (centred.square().sum(0) / number + EPSILON).rsqrt()
