"""A learned critic bounds from below what the student's features tell of the teacher's; they raise the bound."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.features import Shape, pooled, width
from limbeck.core.layerwise import counted, paired
from limbeck.core.maths import FLOOR, log_mix, pair

HIGHEST = 80.0  # of an exponent, so that a bound that has come loose stays finite


@method(
    paper="He et al. 2021, MI-alpha (Poole et al. 2019, interpolated bound)",
    year=2021,
    arxiv="2109.11105",
    differs="critic and baseline, whose form is open, are two-layer networks, the critic's on both features; the other "
    "examples of the batch are the independent samples",
    row="distiller_mi_alpha",
)
class MIAlpha(nn.Module):
    """Sum over layers of -I, I = 1 + E[f(x, y) - log g] - E[e^f(x', y) / g'], g = alpha m + (1 - alpha) e^b(y).  -> []

    x is a teacher's feature, y the student's, averaged over their places [B, D]; x and y of one example are a joint
    sample, x' is of another example. m is the mean of e^f over the teacher's features of the batch, m' over those of
    other examples (g' has m' for m). f and b are two-layer networks that train with the student, as the bound asks.

    alpha: in [0, 1]. 1: InfoNCE, of low variance, but never above log B. 0: any height, of high variance (TUBA; NWJ
        where b = 1).
    layers: which of the paired features, counted from shallow (0) or from deep (-1); () takes all.
    hidden: width of critic and baseline, >= 1.

    *Needs*: features of both, of any shape; batches of at least 2, better 32 and more.
    *Relates to*: weight 0.1 to 1 beside `ce` and `kd`. `crd` keeps a memory of more negatives, by index; `vid` bounds
        the same from below by a Gaussian, one example at a time.
    """

    def __init__(
        self,
        student_feats: list[Shape],
        teacher_feats: list[Shape],
        *,
        alpha: float = 0.9,
        layers: tuple[int, ...] = (-1,),
        hidden: int = 128,
    ) -> None:
        super().__init__()
        require(0 <= alpha <= 1, "alpha", alpha, "in [0, 1]")
        require(hidden >= 1, "hidden", hidden, ">= 1")
        self.alpha, self.layers, self.hidden = alpha, layers, hidden
        pairs = paired(student_feats, teacher_feats, layers)
        self.critics = nn.ModuleList(Critic(width(s), width(t), hidden) for s, t in pairs)

    def forward(
        self,
        student_feats: list[Tensor],
        teacher_feats: list[Tensor],
        attention_mask: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """One value a batch; 0 when fewer than two examples of it count."""
        pairs = paired(student_feats, teacher_feats, self.layers)
        bounds = []
        for critic, (student, teacher) in zip(self.critics, pairs, strict=True):
            counts = counted(mask, student)
            real = attention_mask if student.ndim == teacher.ndim == 3 else None
            scores, baseline = critic(*pair(pooled(student, real), pooled(teacher.detach(), real)), counts)
            bounds.append(_bound(scores, baseline, counts, self.alpha))
        return -torch.stack(bounds).sum()


def _bound(scores: Tensor, baseline: Tensor, counts: Tensor, alpha: float) -> Tensor:
    """I_alpha [] of f(x_i, y_j) [B, B] and b(y_j) [B], from the examples that count."""
    number = counts.sum().to(scores)
    scores = torch.where(counts.unsqueeze(1), scores, FLOOR)
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    everyone = scores.logsumexp(0) - number.clamp_min(1).log()
    others = torch.where(own, FLOOR, scores).logsumexp(0) - (number - 1).clamp_min(1).log()
    joint = scores.diagonal() - log_mix(everyone, baseline, alpha)
    apart = (others - log_mix(others, baseline, alpha)).clamp_max(HIGHEST).exp()
    usable = counts & (number > 1)
    return torch.where(usable, 1 + joint - apart, 0.0).sum() / number.clamp_min(1)


class Critic(nn.Module):
    """f(x_i, y_j) [B, B] for all pairs of teacher x and student y, and the baseline b(y_j) [B]."""

    def __init__(self, student: int, teacher: int, hidden: int) -> None:
        super().__init__()
        self.of_teacher, self.of_student = nn.Linear(teacher, hidden), nn.Linear(student, hidden, bias=False)
        self.score = nn.Linear(hidden, 1)
        self.baseline = nn.Sequential(nn.Linear(student, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, student: Tensor, teacher: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        dtype = self.score.weight.dtype
        student, teacher = (torch.where(counts.unsqueeze(1), x.to(dtype), 0.0) for x in (student, teacher))
        with torch.autocast(student.device.type, enabled=False):
            both = F.relu(self.of_teacher(teacher).unsqueeze(1) + self.of_student(student))
            scores: Tensor = self.score(both).squeeze(-1)
            baseline: Tensor = self.baseline(student).squeeze(-1)
        return scores, baseline
