"""The student says only what the teacher finds likely: divergence from the student's side."""

from torch import Tensor

from limbeck.core import maths
from limbeck.core.card import method, require
from limbeck.core.headloss import Term, divergences


def _head(*, temperature: float = 1.0) -> Term:
    return Term(divergences.reverse_kl, temperature, temperature**2)


@method(
    paper="Gu et al. 2023 (MiniLLM), section 2.1; the single-step term of section 2.2",
    year=2023,
    arxiv="2306.08543",
    code="jongwooko/distillm@d47e77f:distillm/losses.py",
    differs="the token-level divergence of the row only: exact over the vocabulary, no policy gradient and no sampling",
    zero_at_match=True,
    head=_head,
)
def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(student / T) || softmax(teacher / T)) at each place.  [..., V] x 2 -> [...]

    Mode-seeking: the student pays for what it would say and the teacher would not, so it picks some of the teacher's
    modes and leaves others out.

    temperature: T > 0; language models are matched at 1.

    *Needs*: logits of both over one vocabulary, aligned. A teacher that gives a word -inf forbids it to the student.
    *Relates to*: use `forward_kl` or `kd` when everything the teacher knows should be covered, and from a random
        start, where this one has little gradient; this one on the student's own samples.
    *Differs*: see the card; libraries that scale by T without T^2 agree at T = 1.
    """
    require(temperature > 0, "temperature", temperature, "> 0")
    return temperature**2 * maths.reverse_kl(student_logits, teacher_logits.detach(), temperature)
