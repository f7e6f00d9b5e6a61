"""The plain loss when any number of classes may be present: a question of yes or no for each."""

import torch.nn.functional as F
from torch import Tensor

from limbeck.core.bernoulli import multi_hot
from limbeck.core.card import method, require
from limbeck.core.maths import upcast


@method(
    paper="Yang et al. 2023, label term",
    year=2023,
    arxiv="2308.06453",
    code="penghui-yang/L2D@ea7fa55:criterion/loss/bce.py",
    differs="as old as the sigmoid; the code sums over the batch, here that is the mean. It cuts probabilities at 1e-8",
    row=("l2d_multilabel", "explainable_kd_cxr"),
)
def bce(student_logits: Tensor, labels: Tensor, *, positive_weight: float = 1.0) -> Tensor:
    """-sum_c [w y_c log sigmoid(student_c) + (1 - y_c) log sigmoid(-student_c)].  [..., C] x 2 -> [...]

    labels: 0 and 1 (or probabilities) for every class [..., C]; class indices [...] count as one class present.

    positive_weight: w > 0 of the classes that are present; above 1 where they are rare.

    *Needs*: labels of that form.
    *Relates to*: use it alone for the control, next to `mld` and `led` for the student; `ce` when exactly one class is
        present.
    """
    require(positive_weight > 0, "positive_weight", positive_weight, "> 0")
    z, y = upcast(student_logits), multi_hot(labels, student_logits)
    return -(positive_weight * y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z)).sum(-1)
