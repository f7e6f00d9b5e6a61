"""The label counts as much as the teacher believes in it; the other classes are matched among themselves."""

from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.maths import label_logprobs, log_probs, where_labelled
from limbeck.core.responses import others


@method(
    paper="Yang et al. 2023, normalized knowledge distillation",
    year=2023,
    arxiv="2303.13005",
    code="yzd-v/cls_KD@1e5d48f:mmcls/models/dis_losses/nkd.py",
    differs="labels are class indices: the code also takes mixed labels and goes by the largest",
    row="nkd_uskd",
)
def nkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
) -> Tensor:
    """-t_y log s_y - gamma T^2 sum_{i != y} t'_i log s'_i.  [..., C] x 2, [...] -> [...]

    t, s: probabilities at temperature 1; t', s': softmax over the classes other than the label y, at temperature T.
    Since t' and s' both sum to 1, the student can match them whatever it gives to the label.

    gamma: weight of the other classes, >= 0; 1.5 for convolutional networks on ImageNet, 1 for transformers there.
    temperature: T > 0 of the other classes alone; 1 on ImageNet.

    *Needs*: logits of both and true labels, at least 2 classes.
    *Relates to*: add `ce`, both at weight 1. `dkd` is its kin: there both terms are divergences; here the label term
        pulls only as far as the teacher is sure. `uskd` makes the soft labels without a teacher.
    *Differs*: see the card. Cross-entropies, so it is not 0 where the student is the teacher.
    """
    require(gamma >= 0, "gamma", gamma, ">= 0")
    require(temperature > 0, "temperature", temperature, "> 0")
    logits, known = (student_logits, teacher_logits.detach()), labels.clamp_min(0)
    log_s, log_t = (label_logprobs(z, labels) for z in logits)
    log_s_other, log_t_other = (log_probs(others(z, known), temperature) for z in logits)
    target = -log_t.exp() * log_s
    non_target = -(log_t_other.exp() * log_s_other).sum(-1)
    return where_labelled(target + gamma * temperature**2 * non_target, labels)
