"""Labels are not used at all: student and teacher pay for disagreeing, each from its own side."""

from torch import Tensor

from limbeck.core.card import method
from limbeck.core.maths import kl, reverse_kl


@method(
    paper="Cui et al. 2021, section 3",
    year=2021,
    arxiv="2103.05959",
    code="PaddlePaddle/PaddleClas@024ddbd:ppcls/loss/dmlloss.py",
    differs="the paper calls it Jensen-Shannon; its code, followed here, takes the mean of the two divergences. The "
    "choice of unlabelled pictures and the fine-tuning on labels are stages of a recipe, not of this loss",
    zero_at_match=True,
)
def ssld(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """(KL(softmax(teacher) || softmax(student)) + KL(softmax(student) || softmax(teacher))) / 2.  [..., C] x 2 -> [...]

    Symmetric, 0 only where both agree, and without temperature.

    *Needs*: logits of both over the same classes; no labels, so that any unlabelled pictures serve.
    *Relates to*: use it alone, for long, on as many pictures as there are, with a strong teacher not too far in size;
        then fine-tune on labels at a rate 100 times lower. `kd` at temperature 1 is one of its halves, `reverse_kl` the
        other.
    """
    teacher_logits = teacher_logits.detach()
    return (kl(student_logits, teacher_logits) + reverse_kl(student_logits, teacher_logits)) / 2
