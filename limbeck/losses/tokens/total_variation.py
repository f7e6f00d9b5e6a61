"""Half the summed difference of the probabilities: how often speculative decoding would refuse the student's word."""

from torch import Tensor

from limbeck.core.card import method
from limbeck.core.headloss import Term, divergences
from limbeck.core.maths import pair


def _head() -> Term:
    return Term(divergences.total_variation)


@method(
    paper="Goel et al. 2024, TVD",
    year=2024,
    arxiv="2403.00858",
    code="jongwooko/distillm@d47e77f:distillm/losses.py",
    differs="the paper has no code; the numbers are those of a library of such losses",
    row="tvd_pp",
    zero_at_match=True,
    head=_head,
)
def total_variation(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """sum_v |softmax(teacher) - softmax(student)| / 2, in [0, 1].  [..., V] x 2 -> [...]

    1 - this = sum_v min(p, q), the chance that a target model accepts what a draft model says. Its gradient is one of
    policies, -E_q[r grad log q] with the reward r = 1 for words that the teacher finds likelier, else 0: bounded, and
    blind to how much is missing.

    *Needs*: logits of both over one vocabulary, aligned.
    *Relates to*: for draft models, late in training: its gradient is weak far from the teacher. `tvd_pp` steadies it;
        start with `forward_kl`.
    *Differs*: see the card.
    """
    student, teacher = pair(student_logits, teacher_logits.detach())
    return (teacher.softmax(-1) - student.softmax(-1)).abs().sum(-1) / 2
