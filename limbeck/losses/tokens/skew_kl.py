"""The student is compared with a mixture that holds a little of the teacher, so that no word can cost without end."""

from functools import partial

from torch import Tensor

from limbeck.core import maths
from limbeck.core.card import method, require
from limbeck.core.headloss import Term, divergences


def _head(*, alpha: float = 0.1, temperature: float = 1.0) -> Term:
    return Term(partial(divergences.skew_kl, alpha=alpha), temperature, temperature**2)


@method(
    paper="Ko et al. 2024 (DistiLLM), section 3.1",
    year=2024,
    arxiv="2402.03898",
    code="jongwooko/distillm@d47e77f:distillm/losses.py",
    differs="the code's value lacks the teacher's entropy, a constant without gradient",
    row="distillm",
    zero_at_match=True,
    head=_head,
)
def skew_kl(student_logits: Tensor, teacher_logits: Tensor, *, alpha: float = 0.1, temperature: float = 1.0) -> Tensor:
    """T^2 KL(p || alpha p + (1 - alpha) q), p = softmax(teacher / T), q = softmax(student / T).  [..., V] x 2 -> [...]

    Where the teacher says what the student would not, log p / q has no bound; with a share of p below it is at most
    -log alpha, and so is the loss (times T^2). The gradient to q_k is that of forward KL times (1 - alpha) q_k / m_k.

    alpha: share of the teacher in the mixture, in [0, 1]; 0 is `forward_kl`, 1 is 0 always.
    temperature: T > 0; language models are matched at 1.

    *Needs*: logits of both over one vocabulary, aligned.
    *Relates to*: alone, or beside `ce`, from a student that is trained already; use `skew_reverse_kl` on texts that the
        student wrote. Its limits of gradient make it a steady start where `forward_kl` explodes.
    *Differs*: see the card.
    """
    require(0 <= alpha <= 1, "alpha", alpha, "in [0, 1]")
    require(temperature > 0, "temperature", temperature, "> 0")
    return temperature**2 * maths.skew_kl(student_logits, teacher_logits.detach(), alpha, temperature)
