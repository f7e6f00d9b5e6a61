"""The projector may only turn the student's feature, so that nothing is learned there and lost with it."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.features import Shape, per_example, pick, pooled, width
from limbeck.core.maths import pair, upcast
from limbeck.core.project import Pointwise

EPSILON = 1e-5


@method(
    paper="Miles et al. 2024, eq. 9-11",
    year=2024,
    arxiv="2403.06213",
    code="roymiles/vkd@4b48050:engine.py",
    differs="the matrix exponential of the paper, where the code's torch default is Householder reflections; a student "
    "wider than its teacher, which the paper does not treat, gets a projector of orthonormal rows",
)
class VKD(nn.Module):
    """Smooth L1 of P z_s and norm(z_t), mean over the teacher's width; P has orthonormal columns.  lists -> [B]

    z = the mean over the places of a feature. P^T P = I is kept by parametrisation (the matrix exponential of a skew-
    symmetric matrix), without bias, so that inner products of student features are those of their projections.
    Smooth L1 is d^2 / 2 below a difference of 1 and |d| - 1/2 above.

    layer: which of the features, counted from shallow (0) or from deep (-1).
    normalise: of z_t. "standardise": over its own channels, mean 0 and variance 1, for classifying and detecting.
        "whiten": over the batch, so that all directions count alike, for generating; wants more examples than channels.

    *Needs*: one feature of each: maps, tokens or vectors, of any sizes.
    *Relates to*: weight 1 beside `ce` and `kd` with temperature 1, more for short trainings. Use it where `fitnets`
        trains its regressor instead of the student; `srd` normalises both sides and lets the projector free.
    *Differs*: see the card.
    """

    def __init__(
        self,
        student_feats: list[Shape],
        teacher_feats: list[Shape],
        *,
        layer: int = -1,
        normalise: Literal["standardise", "whiten"] = "standardise",
    ) -> None:
        super().__init__()
        require(normalise in ("standardise", "whiten"), "normalise", normalise, "'standardise' or 'whiten'")
        self.layer, self.normalise = layer, normalise
        student = student_feats[pick("vkd.layer", student_feats, layer, "student")]
        teacher = teacher_feats[pick("vkd.layer", teacher_feats, layer, "teacher")]
        # By default torch keeps signs among the weights, which the first step of weight decay turns into zeros.
        linear = nn.Linear(width(student), width(teacher), bias=False)
        self.projector = Pointwise(nn.utils.parametrizations.orthogonal(linear, orthogonal_map="matrix_exp"))

    def forward(self, student_feats: list[Tensor], teacher_feats: list[Tensor], mask: Tensor | None = None) -> Tensor:
        """Per example."""
        student, teacher = pooled(student_feats[self.layer]), upcast(pooled(teacher_feats[self.layer].detach()))
        if self.normalise == "standardise":
            target = F.layer_norm(teacher, teacher.shape[1:], eps=EPSILON)
        else:
            target = _whitened(teacher, mask)
        projected, target = pair(self.projector(student.to(next(self.parameters()).dtype)), target)
        return per_example(F.smooth_l1_loss(projected, target, reduction="none"))


def _whitened(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Rows of mean 0 and covariance I over those that count: the nearest such rows (ZCA)."""
    weight = torch.ones_like(rows[:, 0]) if mask is None else mask.to(rows)
    weight = (weight / weight.sum().clamp_min(1)).unsqueeze(1)
    centred = rows - (weight * rows).sum(0)
    values, vectors = torch.linalg.eigh((weight * centred).mT @ centred)
    root: Tensor = vectors * (values.clamp_min(0) + EPSILON).rsqrt() @ vectors.mT
    return centred @ root
