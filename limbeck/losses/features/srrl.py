"""The student's feature must mean to the teacher's classifier what the teacher's own feature means to it."""

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.features import Shape, per_example, pick, pooled, tokens, width
from limbeck.core.maths import pair


@method(
    paper="Yang et al. 2021, ICLR, eq. 2-5",
    year=2021,
    code="jingyang2017/KD_SRRL@d2e802f:train_imagenet_distillation.py",
    differs="the code's squared error of logits, where the paper also derives a cross-entropy of them",
    exceptions={"mask": "the regressor's batch norm takes its statistics over the whole batch, masked examples too"},
)
class SRRL(nn.Module):
    """feature_weight mean (h - h_t)^2 + regression_weight mean (W_t h + b_t - z_t)^2.  lists, [B, D], [B, C] -> [B]

    h = the mean over the places of ReLU(BN(linear(F_s))), as wide as the teacher's embedding h_t; means are over its
    channels and over the classes. W_t and b_t are the teacher's classifier: the gradient passes through it to the
    student, but never moves it. The student keeps its own classifier; the regressor is dropped.

    layer: which of the student's features F_s, counted from shallow (0) or from deep (-1).
    feature_weight: of the first part, >= 0.
    regression_weight: of the second part, >= 0.

    *Needs*: a feature map, tokens or a vector of the student; embedding, logits and linear classifier of the teacher.
    *Relates to*: weight 1 beside `ce`; add `kd` when the classes are few. Use `simkd` to keep the teacher's classifier
        in the student, `fitnets` when there is none.
    """

    def __init__(
        self,
        student_feats: list[Shape],
        teacher_emb: Shape,
        teacher_head: Shape,
        *,
        layer: int = -1,
        feature_weight: float = 1.0,
        regression_weight: float = 1.0,
    ) -> None:
        super().__init__()
        require(feature_weight >= 0, "feature_weight", feature_weight, ">= 0")
        require(regression_weight >= 0, "regression_weight", regression_weight, ">= 0")
        self.layer, self.feature_weight, self.regression_weight = layer, feature_weight, regression_weight
        wide = width(student_feats[pick("srrl.layer", student_feats, layer, "student")])
        if teacher_head[-1] != teacher_emb[-1]:
            raise BadInput(
                f"srrl sends features of width {teacher_emb[-1]} through the teacher's classifier, which reads "
                f"{teacher_head[-1]}: tap as teacher_emb what teacher_head reads"
            )
        self.linear, self.norm = nn.Linear(wide, teacher_emb[-1], bias=False), nn.BatchNorm1d(teacher_emb[-1])

    def forward(
        self,
        student_feats: list[Tensor],
        teacher_emb: Tensor,
        teacher_logits: Tensor,
        teacher_head: Tensor,
        teacher_head_bias: Tensor | None = None,
    ) -> Tensor:
        """Per example."""
        places = tokens(student_feats[self.layer]).to(self.linear.weight.dtype)
        h = pooled(F.relu(self.norm(self.linear(places).mT).mT))
        h, wanted = pair(h, teacher_emb.detach())
        bias = None if teacher_head_bias is None else teacher_head_bias.detach().to(h)
        said, meant = pair(F.linear(h, teacher_head.detach().to(h), bias), teacher_logits.detach())
        feature, regression = per_example((h - wanted).square()), per_example((said - meant).square())
        return self.feature_weight * feature + self.regression_weight * regression
