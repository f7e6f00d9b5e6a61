"""Every class is a question of yes or no, and the student learns how sure the teacher is of each answer."""

from torch import Tensor

from limbeck.core.bernoulli import bernoulli_kl
from limbeck.core.card import method, require
from limbeck.core.maths import pair


@method(
    paper="Yang et al. 2023, multi-label logits distillation",
    year=2023,
    arxiv="2308.06453",
    code="penghui-yang/L2D@ea7fa55:criterion/distiller_zoo/logits_based/mld.py",
    differs="the code cuts probabilities at 1e-8, beyond which it has no gradient. The temperature is that of row "
    "`explainable_kd_cxr`; at 1 it is the paper's loss",
    row=("l2d_multilabel", "explainable_kd_cxr"),
    zero_at_match=True,
)
def mld(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """T^2 sum_c KL(Bern(sigmoid(teacher_c / T)) || Bern(sigmoid(student_c / T))).  [..., C] x 2 -> [...]

    The classes do not compete, as in a softmax: any number of them may be present. Adding a constant to all logits,
    which `kd` does not see, changes every answer.

    temperature: T > 0; 1 in the paper, 2 to 4 when the teacher's answers are near 0 and 1.

    *Needs*: logits of both over the same classes, made for sigmoids; no labels.
    *Relates to*: add `bce` at weight 1, this at 10 / 64 to 10 (the code sums `bce` over a batch of 64 and takes the
        mean of this); `led` for the embeddings of present classes. Use `kd` when exactly one class is present.
    """
    require(temperature > 0, "temperature", temperature, "> 0")
    student, teacher = pair(student_logits, teacher_logits.detach())
    return temperature**2 * bernoulli_kl(student / temperature, teacher / temperature).sum(-1)
