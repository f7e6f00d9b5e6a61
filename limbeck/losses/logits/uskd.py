"""A student without a teacher makes its own soft labels: from its certainty, and from how an inner layer ranks."""

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.features import Shape, pick, pooled, width
from limbeck.core.maths import log_probs, upcast
from limbeck.core.reduce import mean
from limbeck.core.responses import others

SMOOTHING = 0.1  # of the labels that the inner layer's classifier is trained on
EPSILON = 1e-6  # added to 1 - p of the label by the code


@method(
    paper="Yang et al. 2023, universal self-knowledge distillation",
    year=2023,
    arxiv="2303.13005",
    code="yzd-v/cls_KD@1e5d48f:mmcls/models/dis_losses/uskd.py",
    differs="classes are ranked by probabilities and among the others only, as in the paper; the code ranks by "
    "log-probabilities of the student and lets the label take up a rank, which `as_released` does. Labels are class "
    "indices: the two targets of mixed labels are left out",
    row="nkd_uskd",
    exceptions={"gradcheck": "the soft labels are made of the student's output, but constants in the gradient"},
)
class USKD(nn.Module):
    """alpha (-p log s_y) - beta sum_{i != y} z_i log s'_i + mu CE(smoothed y, w).  lists, [B, C], [B] -> [B]

    s: probabilities of the student, s' those among the classes other than the label y, w those of a linear classifier
    on an inner feature (places averaged), which this module owns. Soft labels, both without gradient: p = s_y^2 + 1 -
    mean over the batch of s_y^2, and z = 1 / rank, scaled to sum 1, where others are ranked by w_i / (1 - w_y) + s_i /
    (1 - s_y): Zipf's law.

    alpha: weight of the label, >= 0; 1 on ImageNet, 0.1 on CIFAR-100.
    beta: weight of the others, >= 0.
    mu: weight of the inner classifier, >= 0; 0.005 on ImageNet, 0.1 on CIFAR-100. It reaches the student's layers.
    layer: which of the student's features, from shallow (0) or from deep (-1); the paper's is the last stage but one.
    as_released: rank as the authors' code does.

    *Needs*: logits, labels and inner features of the student (maps, tokens or vectors); no teacher, >= 2 classes.
    *Relates to*: add `ce`, both at weight 1; compare with `ce` and label smoothing. Use `nkd` when there is a teacher.
    """

    def __init__(
        self,
        student_feats: list[Shape],
        student_logits: Shape,
        *,
        alpha: float = 1.0,
        beta: float = 0.1,
        mu: float = 0.005,
        layer: int = -2,
        as_released: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("alpha", alpha), ("beta", beta), ("mu", mu)):
            require(value >= 0, name, value, ">= 0")
        self.alpha, self.beta, self.mu, self.layer, self.as_released = alpha, beta, mu, layer, as_released
        feature = student_feats[pick("layer", student_feats, layer, "student")]
        self.weak = nn.Linear(width(feature), student_logits[-1])

    def forward(
        self, student_feats: list[Tensor], student_logits: Tensor, labels: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Per example; the mean over the batch leaves masked examples out."""
        weak = upcast(self.weak(pooled(student_feats[self.layer]).to(self.weak.weight.dtype)))
        log_s = log_probs(student_logits).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        certainty = log_s.detach().exp().square()
        label = -(certainty + 1 - mean(certainty, mask).value) * log_s
        zipf = self._zipf(weak.detach(), upcast(student_logits.detach()), labels)
        non_target = -(zipf * log_probs(others(student_logits, labels))).sum(-1)
        inner = F.cross_entropy(weak, labels, reduction="none", label_smoothing=SMOOTHING)
        return self.alpha * label + self.beta * non_target + self.mu * inner

    def _zipf(self, weak: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Soft labels of the classes other than the label [B, C - 1]."""
        if self.as_released:
            w, log_s = weak.softmax(-1), logits.log_softmax(-1)
            scores = [x / (1 - x.gather(-1, labels.unsqueeze(-1)) + EPSILON) for x in (w, log_s)]
            zipf = others(_inverse_rank(scores[0] + scores[1]), labels)
        else:  # w_i / (1 - w_y) is the softmax over the others
            zipf = _inverse_rank(others(weak, labels).softmax(-1) + others(logits, labels).softmax(-1))
        return zipf / zipf.sum(-1, keepdim=True)


def _inverse_rank(scores: Tensor) -> Tensor:
    """1 for the largest of each row, 1/2 for the next, and so on."""
    rank = scores.argsort(stable=True, descending=True).argsort()
    return (rank + 1).to(scores.dtype).reciprocal()
