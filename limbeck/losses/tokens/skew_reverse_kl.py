"""Reverse divergence from a mixture that holds a little of the student: a word the teacher never says costs a bound."""

from functools import partial

from torch import Tensor

from limbeck.core import maths
from limbeck.core.card import method, require
from limbeck.core.headloss import Term, divergences


def _head(*, alpha: float = 0.1, temperature: float = 1.0) -> Term:
    return Term(partial(divergences.skew_reverse_kl, alpha=alpha), temperature, temperature**2)


@method(
    paper="Ko et al. 2024 (DistiLLM), section 3.1",
    year=2024,
    arxiv="2402.03898",
    code="jongwooko/distillm@d47e77f:distillm/losses.py",
    row="distillm",
    zero_at_match=True,
    head=_head,
)
def skew_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, alpha: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """T^2 KL(q || alpha q + (1 - alpha) p), p = softmax(teacher / T), q = softmax(student / T).  [..., V] x 2 -> [...]

    As `reverse_kl` the student pays for what it would say and the teacher would not, but at most -log alpha (times
    T^2). The gradient flows through both places where q stands.

    alpha: share of the student in the mixture, in [0, 1]; 0 is `reverse_kl`, 1 is 0 always.
    temperature: T > 0; language models are matched at 1.

    *Needs*: logits of both over one vocabulary, aligned.
    *Relates to*: the paper's choice on texts that the student wrote; `skew_kl` on given texts.
    """
    require(0 <= alpha <= 1, "alpha", alpha, "in [0, 1]")
    require(temperature > 0, "temperature", temperature, "> 0")
    # the skew divergence with the two sides exchanged
    return temperature**2 * maths.skew_kl(teacher_logits.detach(), student_logits, alpha, temperature)
