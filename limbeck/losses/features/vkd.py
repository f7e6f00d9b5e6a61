"""The projector may only turn the student's feature, so that nothing is learned there and lost with it."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.features import Shape, per_example, pooled, width
from limbeck.core.layerwise import picked
from limbeck.core.maths import pair, upcast, whitened
from limbeck.core.project import projector


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
        student, teacher = picked(student_feats, teacher_feats, layer)
        self.projector = projector("orthogonal", width(student), width(teacher))

    def forward(self, student_feats: list[Tensor], teacher_feats: list[Tensor], mask: Tensor | None = None) -> Tensor:
        """Per example."""
        student, teacher = pooled(student_feats[self.layer]), upcast(pooled(teacher_feats[self.layer].detach()))
        whiten = self.normalise == "whiten"
        target = whitened(teacher, mask) if whiten else F.layer_norm(teacher, teacher.shape[1:], eps=1e-5)
        projected, target = pair(self.projector(student.to(next(self.parameters()).dtype)), target)
        return per_example(F.smooth_l1_loss(projected, target, reduction="none"))
