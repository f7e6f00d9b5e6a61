"""A new model that seldom disagrees with the one in service: labels are mixed with what the old model says."""

from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.maths import log_probs, where_labelled


@method(
    paper="Jiang et al. 2021, proposition 1",
    year=2021,
    arxiv="2106.02654",
    differs="the loss is cross-entropy, for which the paper's divergence is KL(base || new)",
)
def churn_distill(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, share: float = 0.5) -> Tensor:
    """-sum_c q_c log softmax(student)_c, q = (1 - share) onehot(y) + share softmax(teacher).
    [..., C] x 2, [...] -> [...]

    The teacher is the base model, in service now, at temperature 1. Up to a constant this is the Lagrangian of "least
    cross-entropy with E KL(base || new) <= budget"; churn, the share of changed decisions, is what the KL stands for.

    share: of the base model in the target, in [0, 1]; the larger, the tighter the budget. 0 is `ce`, 1 imitates. The
        paper chooses it on validation data, for the churn at an accuracy, or the accuracy at a churn, that is wanted.

    *Needs*: logits of both over the same classes and true labels, usually more data than the base model had.
    *Relates to*: alone, at weight 1; `agreement` measures 1 - churn. `kd` softens both sides by a temperature, since it
        wants the order of the wrong classes; here decisions count, so there is none.
    """
    require(0 <= share <= 1, "share", share, "in [0, 1]")
    log_new, base = log_probs(student_logits), log_probs(teacher_logits.detach()).exp()
    hard = -log_new.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return where_labelled((1 - share) * hard - share * (base.to(log_new) * log_new).sum(-1), labels)
