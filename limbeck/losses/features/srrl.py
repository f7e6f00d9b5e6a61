"""The student's feature must mean to the teacher's classifier what the teacher's own feature means to it."""

from torch import Tensor, nn

from limbeck.core.card import method
from limbeck.core.features import Shape, Shapes, apart, pick, pooled, tokens, width
from limbeck.core.places import reads_mean, taught
from limbeck.core.ranges import at_least


@method(
    paper="Yang et al. 2021, ICLR, eq. 2-5",
    year=2021,
    code="jingyang2017/KD_SRRL@d2e802f:train_imagenet_distillation.py",
    differs="the code's squared error of logits, where the paper also derives a cross-entropy of them",
    exceptions={"mask": "the regressor's batch norm takes its statistics over the whole batch, masked examples too"},
)
class SRRL(nn.Module):
    """feature_weight mean_d (h - h_t)^2 + regression_weight mean_c (W_t h + b_t - z_t)^2.  lists, [B, D], [B, C] -> [B]

    h = the mean over the places of ReLU(BN(linear(F_s))), as wide as the teacher's embedding h_t. Its classifier (W_t,
    b_t) passes the gradient on to the student, but never moves. The student keeps its own; the regressor is dropped.

    layer: which of the student's features F_s, counted from shallow (0) or from deep (-1).
    feature_weight, regression_weight: of the two parts, >= 0.

    *Needs*: a feature map, tokens or a vector of the student; embedding, logits and linear classifier of the teacher.
    *Relates to*: weight 1 beside `ce`, and `kd` for few classes. `simkd` keeps the classifier; `fitnets` asks for none.
    """

    def __init__(
        self,
        student_feats: Shapes,
        teacher_emb: Shape,
        teacher_head: Shape,
        *,
        layer: int = -1,
        feature_weight: float = 1.0,
        regression_weight: float = 1.0,
    ) -> None:
        super().__init__()
        at_least(0, feature_weight=feature_weight, regression_weight=regression_weight)
        reads_mean("srrl", teacher_emb, teacher_head, "teacher")
        self.layer, self.feature_weight, self.regression_weight = layer, feature_weight, regression_weight
        wide = width(student_feats[pick("srrl.layer", student_feats, layer, "student")])
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
        h = pooled(self.norm(self.linear(places).mT).relu().mT)
        said = taught(h, teacher_head, teacher_head_bias)
        return self.feature_weight * apart(h, teacher_emb) + self.regression_weight * apart(said, teacher_logits)
