"""The student learns the teacher's class probabilities, softened by a temperature."""

from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.headloss import Term, divergences
from limbeck.core.maths import kl


def _head(*, temperature: float = 4.0) -> Term:
    return Term(divergences.forward_kl, temperature, temperature**2)


@method(
    paper="Hinton et al. 2015, section 2",
    year=2015,
    arxiv="1503.02531",
    code="megvii-research/mdistiller@a08d46f:mdistiller/distillers/KD.py",
    zero_at_match=True,
    head=_head,
)
def kd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)).  [..., C] x 2 -> [...]

    The gradient to the student is T (softmax(student / T) - softmax(teacher / T)): T^2 keeps its size when T changes.

    temperature: T > 0; above 1 it brings out how the teacher ranks the wrong classes. 4 is usual on CIFAR-100, 1 on
        ImageNet and for language.

    *Needs*: logits of both over the same classes; no labels, so unlabelled inputs serve too.
    *Relates to*: add `ce` (0.1 ce + 0.9 kd is usual); use `dkd` when the teacher is so sure of the label that it hides
        the other classes, `reverse_kl` when the student is too small to cover all that the teacher does.
    *Differs*: the paper writes cross-entropy; this takes off the teacher's entropy, a constant without gradient.
    """
    require(temperature > 0, "temperature", temperature, "> 0")
    return temperature**2 * kl(student_logits, teacher_logits.detach(), temperature)
