"""Splits KD into "is it the label?" and "which of the others?", and frees the weight of the second."""

from functools import partial

from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.headloss import Term, divergences
from limbeck.core.maths import kl_by_label, where_labelled


def _head(*, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> Term:
    return Term(partial(divergences.dkd, alpha=alpha, beta=beta), temperature, temperature**2)


@method(
    paper="Zhao et al. 2022, eq. 7",
    year=2022,
    arxiv="2203.08679",
    code="megvii-research/mdistiller@a08d46f:mdistiller/distillers/DKD.py",
    differs="the code hides the label by subtracting 1000 from its logit, which fails once logits differ by more; here "
    "it is left out, and everything stays in log space: same numbers",
    zero_at_match=True,
    head=_head,
)
def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """T^2 (alpha KL(b_t || b_s) + beta KL(q_t || q_s)).  [..., C] x 2, [...] -> [...]

    b = [p_label, 1 - p_label], q = softmax over the other classes, both at temperature T. KD is the case alpha = 1,
    beta = 1 - p_label of the teacher: the surer the teacher, the less KD says about the other classes.

    alpha: weight of the label against the rest, >= 0.
    beta: weight of the order among the others, >= 0; 8 for CIFAR-100 residual networks, 6 or 2 for others there, 0.5 to
        2 on ImageNet (with T = 1). With few classes start at 1 to 4.
    temperature: T > 0.

    *Needs*: logits of both and true labels, at least 2 classes.
    *Relates to*: use it instead of `kd` when the teacher is confident; together with `ce` at weight 1, and a warm-up of
        its weight over the first epochs.
    """
    require(alpha >= 0, "alpha", alpha, ">= 0")
    require(beta >= 0, "beta", beta, ">= 0")
    require(temperature > 0, "temperature", temperature, "> 0")
    weights = temperature**2 * alpha, temperature**2 * beta
    value = kl_by_label(student_logits, teacher_logits.detach(), labels.clamp_min(0), *weights, temperature)
    return where_labelled(value, labels)
